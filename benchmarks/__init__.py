"""Lorikeet beside its peers: the same data and token counts, one machine, turn by turn."""

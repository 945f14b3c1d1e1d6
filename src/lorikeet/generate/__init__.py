"""Generation: prefill and decode, in batches."""

from lorikeet.generate.decode import generate

__all__ = ["generate"]

"""The contestants' side: one process each, which does one optimizer step when it is told to."""

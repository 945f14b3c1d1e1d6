"""Base models: loading, the machine they run on, packed attention and the loss.

The only part that imports `transformers`.
"""

from lorikeet.model.base import Base, empty_model, init_model, load_model, load_tokenizer
from lorikeet.model.fingerprint import fingerprint
from lorikeet.model.loss import token_nll
from lorikeet.model.machine import Machine, choose, describe, peak_memory

__all__ = [
    "Base",
    "Machine",
    "choose",
    "describe",
    "empty_model",
    "fingerprint",
    "init_model",
    "load_model",
    "load_tokenizer",
    "peak_memory",
    "token_nll",
]

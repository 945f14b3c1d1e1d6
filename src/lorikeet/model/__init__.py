"""Base models: loading, the machine they run on, packed attention, and the loss on either path.

The only part that imports `transformers`.
"""

from lorikeet.model.base import Base, empty_model, init_model, load_model, load_tokenizer, model_of
from lorikeet.model.budget import Fit, fit_memory, measure
from lorikeet.model.context import check_length, check_texts, position_limit
from lorikeet.model.fast import FastNll, int8_weights
from lorikeet.model.fingerprint import fingerprint, tokenizer_fingerprint
from lorikeet.model.graphs import graphed
from lorikeet.model.loss import TokenNll, token_nll
from lorikeet.model.machine import (
    Machine,
    can_multiply_int8,
    choose,
    describe,
    forget_peak_memory,
    keep_freed_memory,
    memory_held,
    memory_limit,
    peak_memory,
)

__all__ = [
    "Base",
    "FastNll",
    "Fit",
    "Machine",
    "TokenNll",
    "can_multiply_int8",
    "check_length",
    "check_texts",
    "choose",
    "describe",
    "empty_model",
    "fingerprint",
    "fit_memory",
    "forget_peak_memory",
    "graphed",
    "init_model",
    "int8_weights",
    "keep_freed_memory",
    "load_model",
    "load_tokenizer",
    "measure",
    "memory_held",
    "memory_limit",
    "model_of",
    "peak_memory",
    "position_limit",
    "token_nll",
    "tokenizer_fingerprint",
]

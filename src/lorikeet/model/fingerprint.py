"""Cheap fingerprints of a model's weights and of its tokenizer."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

SAMPLES = 256
"""Values read from each tensor: enough to notice any retrained or requantised weight."""


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over every parameter's name, shape and 256 evenly spaced values.

    Values are rounded to bfloat16 first, so that a model has one fingerprint whether it was loaded
    in fp32 or bf16. Tied parameters count once.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(_sample(parameter.detach()))
    return digest.hexdigest()


def _sample(values: Tensor) -> bytes:
    flat = values.reshape(-1)
    rows = torch.linspace(0, flat.numel() - 1, min(SAMPLES, flat.numel()), dtype=torch.float64)
    picked = flat[rows.long().to(flat.device)].to(torch.bfloat16).cpu()
    return picked.view(torch.int16).numpy().tobytes()


_PROBE = "Hello, wörld!  12,345 tokens\n\tdef f(x): return x  # 日本 🙂"


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 over a tokenizer's vocabulary and how it splits a text that is hard to split.

    Two files that write the same tokenizer in different ways have one fingerprint; templates and
    padding do not count.
    """
    digest = hashlib.sha256()
    for token, number in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        digest.update(f"{number}:{token}\n".encode())
    digest.update(str(tokenizer(_PROBE, add_special_tokens=False)["input_ids"]).encode())
    return digest.hexdigest()

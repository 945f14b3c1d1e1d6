"""Probe whether documents may share a row: no token may feel another document."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lorikeet.data.batch import pack
from lorikeet.data.example import Example
from lorikeet.model.attention import IMPLEMENTATION
from lorikeet.model.loss import token_nll


def enable_packing(model: Any, *, device: torch.device) -> bool:
    """Give a transformers model the packed attention if it can have it, else leave it its own.

    Ours is built on SDPA: a model that does not support that (soft-capped scores, attention sinks,
    ALiBi, no attention at all) or whose attention cannot be exchanged computes something else.
    """
    if not (model._supports_sdpa and model._supports_attention_backend):
        return False
    own = model.config._attn_implementation
    model.set_attn_implementation(IMPLEMENTATION)
    if can_pack(model, device=device):
        return True
    model.set_attn_implementation(own)
    return False


def can_pack(model: nn.Module, *, device: torch.device) -> bool:
    """Whether `model` keeps packed documents apart.

    Two documents share a row. Changing the first must leave the losses of the second bit-identical
    (isolation), and they must be those of the second alone (positions). Architectures that fail,
    or whose forward does not take a packed row at all, get one document per row.
    """
    if next(model.parameters()).device.type == "meta":
        return False
    vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    ids = [int(i) for i in torch.linspace(1, vocabulary - 1, 24)]
    first, other, second = ids[:9], ids[15:24], ids[5:18]
    try:
        with torch.no_grad():
            packed = _losses(model, [first, second], device)[-1]
            changed = _losses(model, [other, second], device)[-1]
            alone = _losses(model, [second], device)[-1]
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError):
        return False
    return bool(
        torch.equal(packed, changed) and torch.allclose(packed, alone, rtol=2e-2, atol=5e-2)
    )


def _losses(
    model: nn.Module, documents: list[list[int]], device: torch.device
) -> tuple[torch.Tensor, ...]:
    examples = [
        Example(tuple(ids), (False,) + (True,) * (len(ids) - 1), 0, "probe") for ids in documents
    ]
    batch = pack(examples).to(device)
    return token_nll(model, batch).split([len(ids) - 1 for ids in documents])

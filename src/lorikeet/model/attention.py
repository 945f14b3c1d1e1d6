"""Attention for packed rows: every document attends to itself alone, through any HF architecture.

A packed row is [1, T] tokens with the boundaries of its documents in `cu_seq_lens_q`, the keyword
that transformers hands through to a registered attention function. Without that keyword (padded
batches, generation with a cache) the function is transformers' own SDPA.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

IMPLEMENTATION = "lorikeet"
"""The name under which the function below is registered with transformers."""


def packed_inputs(ids: Tensor, positions: Tensor, cu_seqlens: Tensor) -> dict[str, Any]:
    """Keyword arguments of a model's forward for a packed row of T tokens.

    Args:
        ids: [T] token ids.
        positions: [T] positions, restarting at 0 for every document.
        cu_seqlens: [D + 1] document boundaries.
    """
    return {
        "input_ids": ids[None],
        "position_ids": positions[None],
        # A ready 4-D mask keeps transformers from building a dense [T, T] one; it is ignored here.
        "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids.device),
        "cu_seq_lens_q": cu_seqlens,
        "use_cache": False,
    }


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    cu_seq_lens_q: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """query [N, H, T, D], key and value [N, H_kv, T, D] -> [N, T, H, D]."""
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    lengths = cu_seq_lens_q.diff().tolist()
    window = _window(module, options)
    outputs = []
    for q, k, v in zip(
        query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True
    ):
        mask = _window_mask(q.shape[2], window, q.device)
        outputs.append(sdpa_attention_forward(module, q, k, v, mask, **options)[0])
    return torch.cat(outputs, dim=1), None


def _window(module: nn.Module, options: dict[str, Any]) -> int | None:
    """The layer's sliding window, which only a model that hands it over can have in a packed row.

    Raises:
        ValueError: the model keeps its window (or its chunks) to the mask, which is ignored here.
    """
    if "sliding_window" in options:
        return options["sliding_window"]
    for name in ("sliding_window", "attention_chunk_size"):
        if getattr(module.config, name, None) is not None:
            raise ValueError(f"{type(module).__name__} does not hand its {name} to the attention")
    return None


def _window_mask(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """[1, 1, L, L] mask of a sliding window; None where plain causal attention is the same."""
    if window is None or length <= window:
        return None
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    return ((distance >= 0) & (distance < window))[None, None]


AttentionInterface.register(IMPLEMENTATION, _attend)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)

"""Causal attention of packed documents without a score that is kept (compiled, bfloat16, CPU).

softmax(q kᵀ · scale) v over each document's own tokens, after FlashAttention-2 (Dao 2023,
arXiv:2307.08691). Where `takes` says no, PyTorch's own attention does the same one document at a
time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorikeet.kernels import native

_NO_WINDOW = 1 << 40


def takes(query: Tensor) -> bool:
    """Whether `attend` can work on such a query [T, H, D]."""
    return (
        query.dtype == torch.bfloat16
        and query.device.type == "cpu"
        and query.shape[-1] % 16 == 0
        and native.missing() is None
    )


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    *,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Attend within each document.

    Args:
        query: bfloat16 [T, H, D].
        key: bfloat16 [T, K, D]; H is a multiple of K.
        value: bfloat16 [T, K, D].
        cu_seqlens: int32 [documents + 1], from 0 to T.
        scale: of the scores, usually D ** -0.5.
        window: how many tokens a token sees, itself included; all before it if None.

    Returns:
        bfloat16 [T, H, D].
    """
    assert takes(query) and cu_seqlens.dtype == torch.int32
    return _Attend.apply(query, key, value, cu_seqlens, scale, window or _NO_WINDOW)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seqlens: Tensor,
        scale: float,
        window: int,
    ) -> Tensor:
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        tokens, heads, size = query.shape
        output = torch.empty_like(query)
        lse = query.new_empty((heads, tokens), dtype=torch.float32)
        ctx.shape = (tokens, heads, key.shape[1], size, len(cu_seqlens) - 1)
        native.call(
            "lk_attention", *ctx.shape, cu_seqlens, window, scale, query, key, value, output, lse
        )
        ctx.save_for_backward(query, key, value, output, lse, cu_seqlens)
        ctx.scale, ctx.window = scale, window
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, lse, cu_seqlens = ctx.saved_tensors
        gradient = gradient.contiguous()
        dquery, dkey, dvalue = (torch.empty_like(x) for x in (query, key, value))
        work = query.new_empty(2 * query.numel(), dtype=torch.float32)
        native.call(
            "lk_attention_backward",
            *ctx.shape,
            cu_seqlens,
            ctx.window,
            ctx.scale,
            *(query, key, value, output, gradient, lse, dquery, dkey, dvalue, work),
        )
        return dquery, dkey, dvalue, None, None, None

"""Causal attention of packed documents without a score that is kept.

softmax(q kᵀ · scale) v over each document's own tokens, after FlashAttention-2 (Dao 2023,
arXiv:2307.08691): compiled in bfloat16 on the CPU, PyTorch's own FlashAttention on a GPU. Where
`takes` says no, PyTorch's SDPA does the same one document at a time.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorikeet.kernels import native

_NO_WINDOW = 1 << 40


def takes(query: Tensor) -> bool:
    """Whether `attend` can work on such a query [T, H, D]."""
    if query.is_cpu:
        compiled = query.dtype == torch.bfloat16 and native.missing() is None
        return compiled and query.shape[-1] % 16 == 0
    return _on_flash(query)


@cache
def _flash() -> Callable[..., Any] | None:
    """PyTorch's FlashAttention for documents of several lengths, if this version has it."""
    try:
        from torch.nn.attention.varlen import varlen_attn  # here, for its import takes seconds
    except ImportError:
        return None
    return varlen_attn if "enable_gqa" in inspect.signature(varlen_attn).parameters else None


@cache
def flash_missing() -> str | None:
    """Why a GPU cannot run PyTorch's FlashAttention over packed documents here; None if it can."""
    if not torch.backends.cuda.is_flash_attention_available():
        return "this PyTorch was built without it"
    if torch.cuda.get_device_capability()[0] < 8:
        return "this GPU is older than Ampere"
    if _flash() is None:
        return f"PyTorch {torch.__version__} is too old for it"
    return None


def _on_flash(query: Tensor) -> bool:
    """Whether PyTorch's FlashAttention can work on a query."""
    half = query.dtype in (torch.bfloat16, torch.float16)
    fits = query.shape[-1] % 8 == 0 and query.shape[-1] <= 256
    return query.is_cuda and half and fits and flash_missing() is None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    *,
    scale: float,
    window: int | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """Attend within each document.

    Args:
        query: bfloat16 [T, H, D]; on a GPU float16 too.
        key: [T, K, D]; H is a multiple of K.
        value: [T, K, D].
        cu_seqlens: int32 [documents + 1], from 0 to T, on the query's device; documents may be
            empty.
        scale: of the scores, usually D ** -0.5.
        window: how many tokens a token sees, itself included; all before it if None.
        max_seqlen: no document is longer; T if None. Of use on a GPU, where it is never read.

    Returns:
        [T, H, D] in the query's dtype.
    """
    assert takes(query) and cu_seqlens.dtype == torch.int32
    if query.is_cpu:
        return _Attend.apply(query, key, value, cu_seqlens, scale, window or _NO_WINDOW)
    longest = query.shape[0] if max_seqlen is None else max_seqlen
    flash = _flash()
    assert flash is not None
    return flash(
        *(query, key, value, cu_seqlens, cu_seqlens, longest, longest),
        scale=scale,
        window_size=(window - 1 if window else -1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )


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

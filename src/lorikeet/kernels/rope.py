"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864, equation 34)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorikeet.kernels import native
from lorikeet.kernels.fused import fused


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """y = x cos + rotate_half(x) sin, where rotate_half([a, b]) = [-b, a].

    Args:
        x: [T, H, D].
        cos: [T, D], both halves equal, in float32 or wider.
        sin: [T, D], likewise.

    Returns:
        [T, H, D] in x's dtype.
    """
    return _Rotate.apply(x, cos, sin)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        # The halves of sin are equal, so the transposed rotation is the one by the opposite angle.
        return _rotated(dy.contiguous(), cos, sin, -1.0), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    if native.takes(x) and native.takes(cos, sin) and cos.dtype == torch.float32:
        y = torch.empty_like(x)
        native.call("lk_rotate", native.type_of(x), *x.shape, x, cos, sin, sign, y)
        return y
    return _turned(x, cos, sin, sign)


@fused
def _turned(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    wide = x.to(cos.dtype)
    first, second = wide.chunk(2, dim=-1)
    half = torch.cat([-second, first], dim=-1)
    return (wide * cos[:, None] + sign * half * sin[:, None]).to(x.dtype)

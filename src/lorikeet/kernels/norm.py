"""Root mean square normalisation (Zhang & Sennrich 2019, arXiv:1910.07467, equation 4)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorikeet.kernels import native


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y = weight · x / sqrt(mean(x²) + eps), row by row, summed in float32 (float64 for float64).

    Args:
        x: [T, I].
        weight: [I].
        eps: added to the mean square.

    Returns:
        [T, I]; x and a float per row are kept for the backward pass.
    """
    return _RmsNorm.apply(x, weight, eps)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, rstd = _normalise(x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, rstd = ctx.saved_tensors
        dy = dy.contiguous()
        dx = _input_gradient(dy, x, weight, rstd) if ctx.needs_input_grad[0] else None
        dweight = None
        if ctx.needs_input_grad[1]:
            wide = rstd.dtype
            dweight = (dy.to(wide) * x.to(wide) * rstd[:, None]).sum(0).to(weight.dtype)
        return dx, dweight, None


def _normalise(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y [T, I] and 1 / sqrt(mean(x²) + eps) [T]."""
    if native.takes(x, weight):
        y, rstd = torch.empty_like(x), x.new_empty(x.shape[0], dtype=torch.float32)
        native.call("lk_rms_norm", native.type_of(x), *x.shape, x, weight, eps, y, rstd)
        return y, rstd
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    rstd = (wide.square().mean(-1) + eps).rsqrt()
    return (wide * rstd[:, None] * weight.to(wide.dtype)).to(x.dtype), rstd


def _input_gradient(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    """rstd (w dy - x̂ mean(w dy x̂)) with x̂ = rstd x."""
    if native.takes(dy, x, weight):
        dx = torch.empty_like(x)
        name = "lk_rms_norm_backward"
        native.call(name, native.type_of(x), *x.shape, dy, x, weight, rstd, None, dx)
        return dx
    normal = x.to(rstd.dtype) * rstd[:, None]
    slope = dy.to(rstd.dtype) * weight.to(rstd.dtype)
    dx = rstd[:, None] * (slope - normal * (slope * normal).mean(-1, keepdim=True))
    return dx.to(x.dtype)

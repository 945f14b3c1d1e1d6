"""Root mean square normalisation (Zhang & Sennrich 2019, arXiv:1910.07467, equation 4)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorikeet.kernels import native
from lorikeet.kernels.fused import fused


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y = weight · x / sqrt(mean(x²) + eps), row by row, summed in float32 (float64 for float64).

    Args:
        x: [T, I].
        weight: [I].
        eps: added to the mean square.

    Returns:
        [T, I]; x and a float per row are kept for the backward pass.
    """
    return _RmsNorm.apply(x, None, weight, eps)[1]


class Origin(NamedTuple):
    """What normalised rows can be made of again, so that nobody needs to keep them.

    Attributes:
        total: [T, I], kept for the norm's own backward pass in any case.
        weight: [I].
        eps: added to the mean square.
    """

    total: Tensor
    weight: Tensor
    eps: float

    def rows(self) -> Tensor:
        """The normalised rows [T, I], the same bits."""
        return _normalise(self.total, None, self.weight, self.eps)[1]


class Normal(NamedTuple):
    """Normalised rows.

    Attributes:
        rows: [T, I].
        origin: what they are made of.
    """

    rows: Tensor
    origin: Origin


def add_rms_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Normal]:
    """Add what a sublayer computed to the residual stream, and normalise the sum.

    Args:
        x: [T, I], the stream.
        delta: [T, I], what is added to it; None for nothing.
        weight: [I].
        eps: added to the mean square.

    Returns:
        x + delta, and its norm; the gradients of both meet in one pass.
    """
    total, rows = _RmsNorm.apply(x, delta, weight, eps)
    return total, Normal(rows, Origin(total.detach(), weight.detach(), eps))


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        total, y, rstd = _normalise(x, delta, weight, eps)
        ctx.save_for_backward(total, weight, rstd)
        ctx.set_materialize_grads(False)
        return total, y

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dtotal: Tensor | None, dy: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        total, weight, rstd = ctx.saved_tensors
        if dy is None:
            return dtotal, dtotal if ctx.needs_input_grad[1] else None, None, None
        dy = dy.contiguous()
        dx = dweight = None
        if any(ctx.needs_input_grad[:2]):
            dx = _input_gradient(dy, total, weight, rstd, plus=dtotal)
        if ctx.needs_input_grad[2]:
            wide = rstd.dtype
            dweight = (dy.to(wide) * total.to(wide) * rstd[:, None]).sum(0).to(weight.dtype)
        return dx, dx if ctx.needs_input_grad[1] else None, dweight, None


def _normalise(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """x + delta (x itself without delta), its norm [T, I], and 1 / sqrt(mean square + eps) [T]."""
    if native.takes(x, weight) and (delta is None or native.takes(x, delta)):
        total = x.view_as(x) if delta is None else torch.empty_like(x)
        y, rstd = torch.empty_like(x), x.new_empty(x.shape[0], dtype=torch.float32)
        arguments = (*x.shape, x, delta, weight, eps, total, y, rstd)
        native.call("lk_rms_norm", native.type_of(x), *arguments)
        return total, y, rstd
    if delta is None:
        return x.view_as(x), *_norm(x, weight, eps)
    return _add_norm(x, delta, weight, eps)


@fused
def _add_norm(
    x: Tensor, delta: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    total = x + delta
    return total, *_formula(total, weight, eps)


@fused
def _norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _formula(x, weight, eps)


def _formula(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    rstd = (wide.square().mean(-1) + eps).rsqrt()
    return (wide * rstd[:, None] * weight.to(wide.dtype)).to(x.dtype), rstd


def _input_gradient(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, *, plus: Tensor | None
) -> Tensor:
    """rstd (w dy - x̂ mean(w dy x̂)) with x̂ = rstd x; plus another gradient of x, if there is one."""
    if native.takes(dy, x, weight) and (plus is None or native.takes(dy, plus)):
        dx = torch.empty_like(x)
        arguments = (*x.shape, dy, x, weight, rstd, plus, dx)
        native.call("lk_rms_norm_backward", native.type_of(x), *arguments)
        return dx
    return _norm_gradient(dy, x, weight, rstd, plus)


@fused
def _norm_gradient(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, plus: Tensor | None
) -> Tensor:
    normal = x.to(rstd.dtype) * rstd[:, None]
    slope = dy.to(rstd.dtype) * weight.to(rstd.dtype)
    dx = rstd[:, None] * (slope - normal * (slope * normal).mean(-1, keepdim=True))
    return dx.to(x.dtype) if plus is None else (dx + plus).to(x.dtype)

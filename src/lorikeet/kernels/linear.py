"""Linear maps of one input under LoRA: y_i = x W_iᵀ + b_i + s_i (drop(x) A_iᵀ) B_iᵀ.

The adapters of maps that share their input share one skinny product with [A_1; A_2; ...] and one
dropout mask. Frozen weights get no gradient and nothing is computed for one. Factors are float32
masters; products run in x's dtype, and gradients of the factors are float32 again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorikeet.kernels import int8, low_rank
from lorikeet.kernels.dropout import Dropout
from lorikeet.kernels.int8 import Int8Weight
from lorikeet.kernels.norm import Normal, Origin


class Projection(NamedTuple):
    """A linear map and its adapter.

    Attributes:
        weight: W [O, I].
        bias: b [O], or None.
        A: master [r, I], or None without an adapter.
        B: master [O, r], or None without an adapter.
        scale: s, what B A is multiplied by.
        rounded: the frozen weight in int8, which is multiplied in its place, or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    A: Tensor | None = None
    B: Tensor | None = None
    scale: float = 1.0
    rounded: Int8Weight | None = None

    @property
    def settings(self) -> tuple[float, Int8Weight | None]:
        """What autograd does not see."""
        return self.scale, self.rounded

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """What autograd sees, in the order of its arguments and gradients."""
        return self[:4]

    @property
    def r(self) -> int:
        """Rank of the adapter, 0 without one."""
        return 0 if self.A is None else self.A.shape[0]


TENSORS = 4  # of a projection
Settings = tuple[float, Int8Weight | None]


def project(
    x: Tensor | Normal, projections: Sequence[Projection], *, dropout: Dropout | None = None
) -> tuple[Tensor, ...]:
    """Map one input through several linear maps.

    Args:
        x: [T, I]; normalised rows are made again in the backward pass, others kept for it.
        projections: the maps, weights [O_i, I].
        dropout: of the adapters' input, one mask for all of them.

    Returns:
        [T, O_i] for every map.
    """
    settings = tuple(p.settings for p in projections)
    tensors = [tensor for p in projections for tensor in p.tensors]
    rows, origin = x if isinstance(x, Normal) else (x, None)
    return _Project.apply(rows, origin, dropout, settings, *tensors)


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        origin: Origin | None,
        dropout: Dropout | None,
        settings: tuple[Settings, ...],
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        projections = gather(tensors, settings)
        outputs, low = forward(x, projections, dropout)
        keep_input(ctx, x, origin, low, *tensors)
        ctx.dropout, ctx.settings = dropout, settings
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, low, *tensors = kept_input(ctx)
        projections = gather(tensors, ctx.settings)
        dys = [dy.contiguous() for dy in gradients]
        dlow = low_rank_gradient(dys, projections)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = input_gradient(dys, projections)
            add_low_rank_(dx, dlow, projections, ctx.dropout)
        parameters = parameter_gradients(
            dys, x, low, dlow, projections, ctx.dropout, needed=ctx.needs_input_grad[4:]
        )
        return dx, None, None, None, *parameters


def keep_input(ctx: Any, x: Tensor, origin: Origin | None, *others: Tensor | None) -> None:
    """Save for the backward pass what x can be had from, and other tensors."""
    ctx.eps = None if origin is None else origin.eps
    ctx.save_for_backward(*((x,) if origin is None else origin[:2]), *others)


def kept_input(ctx: Any) -> list[Tensor]:
    """What `keep_input` was given: x, and the others."""
    if ctx.eps is None:
        return list(ctx.saved_tensors)
    total, weight, *others = ctx.saved_tensors
    return [Origin(total, weight, ctx.eps).rows(), *others]


def gather(tensors: Sequence[Tensor | None], settings: Sequence[Settings]) -> list[Projection]:
    """Projections from their tensors laid flat, as autograd passes them."""
    return [
        Projection._make((*tensors[TENSORS * i : TENSORS * (i + 1)], *own))
        for i, own in enumerate(settings)
    ]


def forward(
    x: Tensor, projections: Sequence[Projection], dropout: Dropout | None
) -> tuple[list[Tensor], Tensor | None]:
    """The outputs [T, O_i], and the adapters' low-rank activations [T, R] (None without any)."""
    rows = int8.quantize_rows(x) if any(p.rounded for p in projections) else None
    factors = _factors(projections)
    low = low_rank.narrow(x, factors, dropout=dropout) if factors else None
    outputs = [
        _output(x, rows, p, part)
        for p, part in zip(projections, _split(low, projections), strict=True)
    ]
    return outputs, low


def _output(x: Tensor, rows: int8.Rows | None, p: Projection, low: Tensor | None) -> Tensor:
    """x Wᵀ + b + s low Bᵀ, [T, O]."""
    if p.rounded is not None and rows is not None:
        y = int8.multiply(rows, p.rounded, dtype=x.dtype)
        y = y if p.bias is None else y.add_(p.bias)
    else:
        y = F.linear(x, p.weight, p.bias)
    if low is not None and p.B is not None:
        low_rank.widen_(y, low, [p.B.t()], scale=p.scale)
    return y


def low_rank_gradient(dys: Sequence[Tensor], projections: Sequence[Projection]) -> Tensor | None:
    """Gradient of the low-rank activations, [T, R]: s_i dy_i B_i side by side."""
    if not any(p.r for p in projections):
        return None
    dlow = dys[0].new_empty(dys[0].size(0), sum(p.r for p in projections))
    for dy, p, part in zip(dys, projections, _split(dlow, projections), strict=True):
        if p.B is not None:
            low_rank.narrow(dy, [p.B.t()], scale=p.scale, out=part)
    return dlow


def input_gradient(dys: Sequence[Tensor], projections: Sequence[Projection]) -> Tensor:
    """Gradient of the shared input through the weights, [T, I]: the sum of dy_i W_i."""
    dx: Tensor | None = None
    for dy, p in zip(dys, projections, strict=True):
        if p.rounded is not None:
            dx = int8.input_gradient(dy, p.rounded, plus=dx)
        else:
            dx = dy @ p.weight if dx is None else dx.addmm_(dy, p.weight)
    assert dx is not None
    return dx


def add_low_rank_(
    dx: Tensor, dlow: Tensor | None, projections: Sequence[Projection], dropout: Dropout | None
) -> None:
    """Add the gradient of the shared input through the adapters to dx [T, I]."""
    if dlow is not None:
        low_rank.widen_(dx, dlow, _factors(projections), dropout=dropout)


def parameter_gradients(
    dys: Sequence[Tensor],
    x: Tensor,
    low: Tensor | None,
    dlow: Tensor | None,
    projections: Sequence[Projection],
    dropout: Dropout | None,
    *,
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients in the order of the projections' tensors; None where none is needed."""
    dA: Tensor | None = None
    if dlow is not None and any(needed[2::TENSORS]):
        dA = low_rank.outer(dlow, x, dropout=dropout)
    dAs = (
        [None] * len(projections) if dA is None else dA.split_with_sizes([p.r for p in projections])
    )
    gradients: list[Tensor | None] = []
    for i, (dy, p, part) in enumerate(zip(dys, projections, _split(low, projections), strict=True)):
        weight, bias, a, b = needed[TENSORS * i : TENSORS * (i + 1)]
        own = dAs[i]
        gradients += [
            dy.t() @ x if weight else None,
            dy.sum(0) if bias else None,
            own.to(p.A.dtype) if a and p.A is not None and own is not None else None,
            _factor_gradient(dy, part, p) if b and part is not None else None,
        ]
    return gradients


def _factor_gradient(dy: Tensor, low: Tensor, p: Projection) -> Tensor:
    """Gradient of a B, [O, r]: s dyᵀ low."""
    assert p.B is not None
    return low_rank.outer_transposed(low, dy, scale=p.scale).to(p.B.dtype)


def _factors(projections: Sequence[Projection]) -> list[Tensor]:
    """A_1, A_2, ... of those that have adapters."""
    return [p.A for p in projections if p.A is not None]


def _split(low: Tensor | None, projections: Sequence[Projection]) -> Sequence[Tensor | None]:
    """The columns of each adapter out of [..., R]."""
    if low is None:
        return [None] * len(projections)
    if len(projections) == 1:
        return [low]
    return low.split_with_sizes([p.r for p in projections], dim=1)

"""Linear maps of one input under LoRA: y_i = x W_iᵀ + b_i + s_i (drop(x) A_iᵀ) B_iᵀ.

The adapters of maps that share their input share one skinny product with [A_1; A_2; ...] and one
dropout mask. Frozen weights get no gradient and nothing is computed for one. Factors are float32
masters; products run in x's dtype, and gradients of the factors are float32 again.

A map may have a gain g_i by output, as DoRA has (Liu et al. 2024, arXiv:2402.09353, equation 5):
y_i = (x - drop(x)) W_iᵀ + b_i + g_i · u_i with u_i = drop(x) W_iᵀ + s_i (drop(x) A_iᵀ) B_iᵀ. Its
direction sees the dropped input throughout, as PEFT's does.
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
        gain: g [O], or None for one of 1.
        scale: s, what B A is multiplied by.
        rounded: the frozen weight in int8, which is multiplied in its place, or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    A: Tensor | None = None
    B: Tensor | None = None
    gain: Tensor | None = None
    scale: float = 1.0
    rounded: Int8Weight | None = None

    @property
    def settings(self) -> tuple[float, Int8Weight | None]:
        """What autograd does not see."""
        return self.scale, self.rounded

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """What autograd sees, in the order of its arguments and gradients."""
        return self[:5]

    @property
    def r(self) -> int:
        """Rank of the adapter, 0 without one."""
        return 0 if self.A is None else self.A.shape[0]


TENSORS = 5  # of a projection
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
        outputs, low, raws = forward(x, projections, dropout)
        keep_input(ctx, x, origin, low, *raws, *tensors)
        ctx.dropout, ctx.settings = dropout, settings
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, low, *kept = kept_input(ctx)
        count = len(ctx.settings)
        raws, projections = kept[:count], gather(kept[count:], ctx.settings)
        up = upstream([dy.contiguous() for dy in gradients], projections)
        dx = input_gradient(up, projections, ctx.dropout) if ctx.needs_input_grad[0] else None
        parameters = parameter_gradients(
            up, x, low, raws, projections, ctx.dropout, needed=ctx.needs_input_grad[4:]
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
) -> tuple[list[Tensor], Tensor | None, list[Tensor | None]]:
    """The outputs [T, O_i]; the adapters' low-rank activations [T, R], None without any; and the
    outputs before their gain [T, O_i], None where there is none."""
    factors = _factors(projections)
    low = low_rank.narrow(x, factors, dropout=dropout) if factors else None
    whole = _Input.of(x, projections)
    dropped = rest = None
    if dropout and any(p.gain is not None for p in projections):
        dropped = _Input.of(dropout(x), projections)
        rest = _Input.of(x - dropped.x, projections)
    outputs: list[Tensor] = []
    raws: list[Tensor | None] = []
    for p, part in zip(projections, _split(low, projections), strict=True):
        if p.gain is None:
            outputs.append(_add_low_rank_(whole.times(p, p.bias), part, p))
            raws.append(None)
            continue
        raw = _add_low_rank_((dropped or whole).times(p, None), part, p)
        base = p.bias if rest is None else rest.times(p, p.bias)
        gain = p.gain.to(x.dtype)
        outputs.append(raw * gain if base is None else torch.addcmul(base, raw, gain))
        raws.append(raw)
    return outputs, low, raws


class _Input(NamedTuple):
    """Rows that go through several maps, in int8 too where a map wants them so."""

    x: Tensor
    rows: int8.Rows | None

    @staticmethod
    def of(x: Tensor, projections: Sequence[Projection]) -> _Input:
        return _Input(x, int8.quantize_rows(x) if any(p.rounded for p in projections) else None)

    def times(self, p: Projection, bias: Tensor | None) -> Tensor:
        """x Wᵀ + bias, [T, O]."""
        if p.rounded is None or self.rows is None:
            return F.linear(self.x, p.weight, bias)
        y = int8.multiply(self.rows, p.rounded, dtype=self.x.dtype)
        return y if bias is None else y.add_(bias)


def _add_low_rank_(y: Tensor, low: Tensor | None, p: Projection) -> Tensor:
    """y + s low Bᵀ, in place, [T, O]."""
    if low is not None and p.B is not None:
        low_rank.widen_(y, low, [p.B.t()], scale=p.scale)
    return y


class Upstream(NamedTuple):
    """Gradients of the outputs of maps that share an input.

    Attributes:
        outputs: [T, O_i].
        raws: of the outputs before their gain, [T, O_i].
        low: of the low-rank activations [T, R]: s_i draw_i B_i side by side; None without any.
    """

    outputs: Sequence[Tensor]
    raws: Sequence[Tensor]
    low: Tensor | None


def upstream(dys: Sequence[Tensor], projections: Sequence[Projection]) -> Upstream:
    """What the backward pass begins with, from the gradients of the outputs [T, O_i]."""
    pairs = list(zip(dys, projections, strict=True))
    draws = [dy if p.gain is None else dy * p.gain.to(dy.dtype) for dy, p in pairs]
    if not any(p.r for p in projections):
        return Upstream(dys, draws, None)
    dlow = dys[0].new_empty(dys[0].size(0), sum(p.r for p in projections))
    for draw, p, part in zip(draws, projections, _split(dlow, projections), strict=True):
        if p.B is not None:
            low_rank.narrow(draw, [p.B.t()], scale=p.scale, out=part)
    return Upstream(dys, draws, dlow)


def input_gradient(
    up: Upstream, projections: Sequence[Projection], dropout: Dropout | None
) -> Tensor:
    """Gradient of the shared input [T, I], through the weights and the adapters."""
    gained = [i for i, p in enumerate(projections) if p.gain is not None]
    if dropout and gained:
        dx = _through_weights(up.outputs, projections)
        # What went through the gain went through the mask.
        own = [up.raws[i] - up.outputs[i] for i in gained]
        dropout.add_(dx, _through_weights(own, [projections[i] for i in gained]))
    else:
        dx = _through_weights(up.raws, projections)
    if up.low is not None:
        low_rank.widen_(dx, up.low, _factors(projections), dropout=dropout)
    return dx


def _through_weights(dys: Sequence[Tensor], projections: Sequence[Projection]) -> Tensor:
    """The sum of dy_i W_i, [T, I]."""
    dx: Tensor | None = None
    for dy, p in zip(dys, projections, strict=True):
        if p.rounded is not None:
            dx = int8.input_gradient(dy, p.rounded, plus=dx)
        else:
            dx = dy @ p.weight if dx is None else dx.addmm_(dy, p.weight)
    assert dx is not None
    return dx


def parameter_gradients(
    up: Upstream,
    x: Tensor,
    low: Tensor | None,
    raws: Sequence[Tensor | None],
    projections: Sequence[Projection],
    dropout: Dropout | None,
    *,
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients in the order of the projections' tensors; None where none is needed."""
    dA: Tensor | None = None
    if up.low is not None and any(needed[2::TENSORS]):
        dA = low_rank.outer(up.low, x, dropout=dropout)
    dAs = (
        [None] * len(projections) if dA is None else dA.split_with_sizes([p.r for p in projections])
    )
    gradients: list[Tensor | None] = []
    for i, (p, part) in enumerate(zip(projections, _split(low, projections), strict=True)):
        weight, bias, a, b, gain = needed[TENSORS * i : TENSORS * (i + 1)]
        dy, draw, raw, own = up.outputs[i], up.raws[i], raws[i], dAs[i]
        gradients += [
            _weight_gradient(dy, draw, x, p, dropout) if weight else None,
            dy.sum(0) if bias else None,
            own.to(p.A.dtype) if a and p.A is not None and own is not None else None,
            _factor_gradient(draw, part, p) if b and part is not None else None,
            _gain_gradient(dy, raw, p) if gain and raw is not None else None,
        ]
    return gradients


def _weight_gradient(
    dy: Tensor, draw: Tensor, x: Tensor, p: Projection, dropout: Dropout | None
) -> Tensor:
    """Gradient of W, [O, I]."""
    if p.gain is None or dropout is None:
        return draw.t() @ x
    return dy.t() @ x + (draw - dy).t() @ dropout(x)


def _gain_gradient(dy: Tensor, raw: Tensor, p: Projection) -> Tensor:
    """Gradient of a gain, [O]: the sum of dy u over the tokens."""
    assert p.gain is not None
    return (dy * raw).sum(0, dtype=p.gain.dtype)


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

"""The gated MLP (SwiGLU: Shazeer 2020, arXiv:2002.05202, equation 6) under LoRA, as one function.

y = down(silu(gate(x)) up(x)). Kept for the backward pass: x (or what it is made of), gate, up and
the low-rank activations; the product of the gates is formed again.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorikeet.kernels import linear, native
from lorikeet.kernels.dropout import Dropout
from lorikeet.kernels.fused import fused
from lorikeet.kernels.linear import TENSORS, Projection, Settings
from lorikeet.kernels.norm import Normal, Origin


def gated_mlp(
    x: Tensor | Normal,
    gate: Projection,
    up: Projection,
    down: Projection,
    *,
    dropout: tuple[Dropout | None, Dropout | None] = (None, None),
) -> Tensor:
    """Run a gated MLP.

    Args:
        x: [T, I]; normalised rows are made again in the backward pass, others kept for it.
        gate: weight [M, I].
        up: weight [M, I].
        down: weight [I, M].
        dropout: of the adapters' inputs: that of gate and up, that of down.

    Returns:
        [T, I].
    """
    settings = (gate.settings, up.settings, down.settings)
    tensors = (*gate.tensors, *up.tensors, *down.tensors)
    rows, origin = x if isinstance(x, Normal) else (x, None)
    return _GatedMlp.apply(rows, origin, dropout, settings, *tensors)


class _GatedMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        origin: Origin | None,
        dropout: tuple[Dropout | None, Dropout | None],
        settings: tuple[Settings, ...],
        *tensors: Tensor | None,
    ) -> Tensor:
        gate, up, down = linear.gather(tensors, settings)
        shared, inner = dropout
        (g, u), low, raws = linear.forward(x, [gate, up], shared)
        (y,), low_down, raws_down = linear.forward(_swiglu(g, u), [down], inner)
        linear.keep_input(ctx, x, origin, g, u, low, low_down, *raws, *raws_down, *tensors)
        ctx.dropout, ctx.settings = dropout, settings
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, g, u, low, low_down, *kept = linear.kept_input(ctx)
        raws, raws_down, tensors = kept[:2], kept[2:3], kept[3:]
        gate, up, down = linear.gather(tensors, ctx.settings)
        shared, inner = ctx.dropout
        needed = ctx.needs_input_grad[4:]

        back = linear.upstream([dy.contiguous()], [down])
        dact = linear.input_gradient(back, [down], inner)
        dg, du, act = _swiglu_backward(dact, g, u)
        down_gradients = linear.parameter_gradients(
            back, act, low_down, raws_down, [down], inner, needed=needed[2 * TENSORS :]
        )
        del dact, act, back
        back = linear.upstream([dg, du], [gate, up])
        dx = linear.input_gradient(back, [gate, up], shared) if ctx.needs_input_grad[0] else None
        gradients = linear.parameter_gradients(
            back, x, low, raws, [gate, up], shared, needed=needed[: 2 * TENSORS]
        )
        return dx, None, None, None, *gradients, *down_gradients


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up [T, M]."""
    if native.takes(gate, up):
        act = torch.empty_like(gate)
        native.call("lk_swiglu", native.type_of(gate), gate.numel(), gate, up, act)
        return act
    return _gated(gate, up)


def _swiglu_backward(dact: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of gate and up, and silu(gate) · up again, which may take dact's place.

    All [T, M].
    """
    if native.takes(dact, gate, up):
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        arguments = (gate.numel(), dact, gate, up, dgate, dup, dact)
        native.call("lk_swiglu_backward", native.type_of(gate), *arguments)
        return dgate, dup, dact
    return _gated_gradients(dact, gate, up)


@fused
def _gated(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


@fused
def _gated_gradients(dact: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    silu = F.silu(gate)
    dgate = torch.ops.aten.silu_backward(dact * up, gate)
    return dgate, dact * silu, silu * up

"""The gated MLP (SwiGLU: Shazeer 2020, arXiv:2002.05202, equation 6) under LoRA, as one function.

y = residual + down(silu(gate(x)) up(x)). Kept for the backward pass: x, gate, up and the low-rank
activations; the product of the gates is formed again.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorikeet.kernels import linear, native
from lorikeet.kernels.dropout import Dropout
from lorikeet.kernels.linear import TENSORS, Projection, Settings


def gated_mlp(
    x: Tensor,
    gate: Projection,
    up: Projection,
    down: Projection,
    *,
    residual: Tensor,
    dropout: tuple[Dropout | None, Dropout | None] = (None, None),
) -> Tensor:
    """Run a gated MLP and add the residual stream.

    Args:
        x: [T, I], the normalised input.
        gate: weight [M, I].
        up: weight [M, I].
        down: weight [I, M].
        residual: [T, I].
        dropout: of the adapters' inputs: that of gate and up, that of down.

    Returns:
        [T, I].
    """
    settings = (gate.settings, up.settings, down.settings)
    tensors = (*gate.tensors, *up.tensors, *down.tensors)
    return _GatedMlp.apply(x, residual, dropout, settings, *tensors)


class _GatedMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor,
        dropout: tuple[Dropout | None, Dropout | None],
        settings: tuple[Settings, ...],
        *tensors: Tensor | None,
    ) -> Tensor:
        gate, up, down = linear.gather(tensors, settings)
        (g, u), low = linear.forward(x, [gate, up], dropout=dropout[0])
        act = _swiglu(g, u)
        (y,), low_down = linear.forward(act, [down], dropout=dropout[1], residual=residual)
        ctx.save_for_backward(x, g, u, low, low_down, *tensors)
        ctx.dropout, ctx.settings = dropout, settings
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, g, u, low, low_down, *tensors = ctx.saved_tensors
        gate, up, down = linear.gather(tensors, ctx.settings)
        shared, inner = ctx.dropout
        needed = ctx.needs_input_grad[4:]
        dy = dy.contiguous()

        dlow = linear.low_rank_gradient([dy], [down])
        dact = linear.input_gradient([dy], [down], dlow, dropout=inner)
        dg, du, act = _swiglu_backward(dact, g, u)
        down_gradients = linear.parameter_gradients(
            [dy], act, low_down, dlow, [down], dropout=inner, needed=needed[2 * TENSORS :]
        )
        del act, dact
        dlow = linear.low_rank_gradient([dg, du], [gate, up])
        dx = None
        if ctx.needs_input_grad[0]:
            dx = linear.input_gradient([dg, du], [gate, up], dlow, dropout=shared)
        gradients = linear.parameter_gradients(
            [dg, du], x, low, dlow, [gate, up], dropout=shared, needed=needed[: 2 * TENSORS]
        )
        residual = dy if ctx.needs_input_grad[1] else None
        return dx, residual, None, None, *gradients, *down_gradients


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, [T, M]."""
    if native.takes(gate, up):
        act = torch.empty_like(gate)
        native.call("lk_swiglu", native.type_of(gate), gate.numel(), gate, up, act)
        return act
    return F.silu(gate) * up


def _swiglu_backward(dact: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of gate and up, and silu(gate) · up again; all [T, M]."""
    if native.takes(dact, gate, up):
        dgate, dup, act = (torch.empty_like(gate) for _ in range(3))
        arguments = (gate.numel(), dact, gate, up, dgate, dup, act)
        native.call("lk_swiglu_backward", native.type_of(gate), *arguments)
        return dgate, dup, act
    silu = F.silu(gate)
    dgate = torch.ops.aten.silu_backward(dact * up, gate)
    return dgate, dact * silu, silu * up

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
from lorikeet.kernels.dropout import NO_MASK, Dropout
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
        (g, u), low = linear.forward(x, shared(x) if shared else x, [gate, up])
        act, dropped = _swiglu(g, u, inner)
        (y,), low_down = linear.forward(act, dropped, [down])
        linear.keep_input(ctx, x, origin, g, u, low, low_down, *tensors)
        ctx.dropout, ctx.settings = dropout, settings
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, g, u, low, low_down, *tensors = linear.kept_input(ctx)
        gate, up, down = linear.gather(tensors, ctx.settings)
        shared, inner = ctx.dropout
        needed = ctx.needs_input_grad[4:]
        dy = dy.contiguous()

        dlow = linear.low_rank_gradient([dy], [down])
        dact = linear.input_gradient([dy], [down])
        through = None  # the mask lies between the adapter's input and act
        factors = linear.stacked([down], dy.dtype)
        if inner and dlow is not None and factors is not None:
            through = dlow @ factors
        else:
            linear.add_low_rank_(dact, dlow, [down], None)
        dg, du, act, dropped = _swiglu_backward(
            dact, through, g, u, inner, plain=needed[2 * TENSORS]
        )
        down_gradients = linear.parameter_gradients(
            [dy], act, dropped, low_down, dlow, [down], needed=needed[2 * TENSORS :]
        )
        del dact, through, act, dropped
        dlow = linear.low_rank_gradient([dg, du], [gate, up])
        dx = None
        if ctx.needs_input_grad[0]:
            dx = linear.input_gradient([dg, du], [gate, up])
            linear.add_low_rank_(dx, dlow, [gate, up], shared)
        adapted = shared(x) if shared and low is not None else x
        gradients = linear.parameter_gradients(
            [dg, du], x, adapted, low, dlow, [gate, up], needed=needed[: 2 * TENSORS]
        )
        return dx, None, None, None, *gradients, *down_gradients


def _swiglu(gate: Tensor, up: Tensor, mask: Dropout | None) -> tuple[Tensor, Tensor]:
    """silu(gate) · up [T, M], and the same under the mask."""
    if native.takes(gate, up):
        act = torch.empty_like(gate)
        dropped = torch.empty_like(gate) if mask else None
        words = mask.words if mask else NO_MASK
        arguments = (gate.numel(), gate, up, *words, act, dropped)
        native.call("lk_swiglu", native.type_of(gate), *arguments)
        return act, act if dropped is None else dropped
    act = F.silu(gate) * up
    return act, mask(act) if mask else act


def _swiglu_backward(
    dact: Tensor,
    through: Tensor | None,
    gate: Tensor,
    up: Tensor,
    mask: Dropout | None,
    *,
    plain: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of gate and up, and silu(gate) · up again, without and with the mask.

    All [T, M]. The gradient of the product is dact, plus `through` under the mask. Without `plain`
    the third is the fourth.
    """
    if native.takes(dact, gate, up) and not (plain and mask):
        dgate, dup, act = (torch.empty_like(gate) for _ in range(3))
        words = mask.words if mask else NO_MASK
        arguments = (gate.numel(), dact, through, gate, up, *words, dgate, dup, act)
        native.call("lk_swiglu_backward", native.type_of(gate), *arguments)
        return dgate, dup, act, act
    if through is not None and mask is not None:
        mask.add_(dact, through)
    silu = F.silu(gate)
    act = silu * up
    dgate = torch.ops.aten.silu_backward(dact * up, gate)
    return dgate, dact * silu, act, mask(act) if mask else act

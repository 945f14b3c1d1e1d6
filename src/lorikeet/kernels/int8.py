"""Products with a frozen weight in int8, forward and for the input's gradient (opt-in).

The weight is rounded once, with a scale for every output (W ≈ diag(s) Q); the other factor at
every use, with a scale for every row, as in LLM.int8() (Dettmers et al. 2022, arXiv:2208.07339,
section 2) without its split of outliers. Sums are exact in int32. Nothing is updated in int8:
adapters and their gradients stay as they are.

The compiled product takes the weight in panels, once for either direction. It is not used where
the processor has AMX, which only `torch._int_mm` knows how to drive.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from lorikeet.kernels import native

_PANEL = 64  # columns


class Panels(NamedTuple):
    """A right operand [K, n] as the compiled product reads it.

    Attributes:
        values: int8 [⌈n / 64⌉, ⌈K / 4⌉, 64, 4], zero beyond the operand's edges.
        start: int32 [64 ⌈n / 64⌉], -128 times the sum of each column.
    """

    values: Tensor
    start: Tensor


class Int8Weight(NamedTuple):
    """A weight [O, I] as int8 and a scale per output.

    Attributes:
        forward: its transpose [I, O] as a right operand: int8, or in panels.
        backward: itself [O, I] as a right operand, or None if no gradient goes through it.
        scale: float32 [O]; the weight is about scale · the int8 values.
        inputs: I.
    """

    forward: Tensor | Panels
    backward: Tensor | Panels | None
    scale: Tensor
    inputs: int


class Rows(NamedTuple):
    """Rows [T, n] as int8 and a scale per row.

    Attributes:
        values: int8 [T, n]; for panels uint8, 128 higher, with n rounded up to a multiple of 4.
        scale: float32 [T]; NaN for a row that held a NaN or an infinity.
    """

    values: Tensor
    scale: Tensor


def quantize_weight(weight: Tensor, *, backward: bool = True) -> Int8Weight:
    """Round a weight [O, I] to 127 steps on either side of zero, output by output.

    `backward` is for `input_gradient`; without it panels take half of the memory.
    """
    weight = weight.detach().contiguous()
    values, scale = _quantize(weight, None, unsigned=False)
    operand = _panels if _in_panels(weight) else lambda matrix: matrix
    own = operand(values) if backward else None
    return Int8Weight(operand(values.t()), own, scale, weight.shape[1])


def quantize_rows(x: Tensor) -> Rows:
    """Round rows [T, I] for `multiply`; maps that share an input share this."""
    return _quantize(x, None, unsigned=_in_panels(x))


def multiply(
    rows: Rows, weight: Int8Weight, *, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """x Wᵀ, [T, I] and [O, I] -> [T, O] in `dtype`, written to `out` if it is given."""
    shape = (len(rows.values), len(weight.scale))
    y = weight.scale.new_empty(shape, dtype=dtype) if out is None else out
    return _product(rows, weight.forward, weight.scale, y, add=False)


def input_gradient(dy: Tensor, weight: Int8Weight, *, plus: Tensor | None = None) -> Tensor:
    """dy W, [T, O] and [O, I] -> [T, I]; `plus` is added to in place and returned."""
    assert weight.backward is not None
    rows = _quantize(dy, weight.scale, unsigned=_in_panels(dy))
    y = dy.new_empty(len(dy), weight.inputs) if plus is None else plus
    return _product(rows, weight.backward, None, y, add=plus is not None)


@cache
def _has_amx() -> bool:
    return bool(torch.cpu.get_capabilities().get("amx_int8"))


def _in_panels(x: Tensor) -> bool:
    """Whether products of x's dtype are compiled ones; every processor that is offered them has
    VNNI."""
    return native.takes(x) and not _has_amx()


def _panels(operand: Tensor) -> Panels:
    """A right operand [K, n] in panels."""
    k, n = operand.shape
    count = -(-n // _PANEL)
    panels = Panels(
        operand.new_empty(count, -(-k // 4), _PANEL, 4),
        operand.new_empty(count * _PANEL, dtype=torch.int32),
    )
    native.call("lk_int8_pack", k, n, operand, *operand.stride(), *panels)
    return panels


def _quantize(x: Tensor, columns: Tensor | None, *, unsigned: bool) -> Rows:
    """x [T, n] rounded, its columns multiplied by `columns` first."""
    count, n = x.shape
    if native.takes(x):
        width, dtype = (-(-n // 4) * 4, torch.uint8) if unsigned else (n, torch.int8)
        values, scale = (
            x.new_empty(count, width, dtype=dtype),
            x.new_empty(count, dtype=torch.float),
        )
        arguments = (count, n, width, x, columns, 128 * unsigned, values, scale)
        native.call("lk_quantize", native.type_of(x), *arguments)
        return Rows(values, scale)
    wide = x.float() if columns is None else x.float() * columns
    scale = wide.abs().amax(1) / 127
    steps = wide / scale.where(scale > 0, 1.0)[:, None]
    values = steps.round().nan_to_num(0.0).to(torch.int8)
    return Rows(values, scale.where(scale.isfinite(), torch.nan))


def _product(
    rows: Rows, operand: Tensor | Panels, columns: Tensor | None, y: Tensor, *, add: bool
) -> Tensor:
    """y [T, n] (+)= the product, times the scales of rows [T] and columns [n]."""
    if isinstance(operand, Panels):
        shape = (len(y), operand.values.shape[1], y.shape[1])
        arguments = (*shape, rows.values, *operand, rows.scale, columns, int(add), y)
        native.call("lk_int8_multiply", native.type_of(y), *arguments)
        return y
    sums = torch._int_mm(rows.values, operand)
    if native.takes(y):
        arguments = (*sums.shape, sums, rows.scale, columns, int(add), y)
        native.call("lk_dequantize", native.type_of(y), *arguments)
        return y
    wide = sums * rows.scale[:, None]
    wide = wide if columns is None else wide * columns
    return y.add_(wide) if add else y.copy_(wide)

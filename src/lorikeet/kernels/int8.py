"""Products with a frozen weight in int8, forward and for the input's gradient (opt-in).

The weight is rounded once, with a scale for every output (W ≈ diag(s) Q); the other factor at
every use, with a scale for every row, as in LLM.int8() (Dettmers et al. 2022, arXiv:2208.07339,
section 2) without its split of outliers. Sums are exact in int32. Nothing is updated in int8:
adapters and their gradients stay as they are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lorikeet.kernels import native


class Int8Weight(NamedTuple):
    """A weight [O, I] as int8 and a scale per output.

    Attributes:
        values: int8 [O, I].
        scale: float32 [O]; the weight is about scale · values.
    """

    values: Tensor
    scale: Tensor


class Rows(NamedTuple):
    """Rows [T, n] as int8 and a scale per row.

    Attributes:
        values: int8 [T, n].
        scale: float32 [T]; NaN for a row that held a NaN or an infinity.
    """

    values: Tensor
    scale: Tensor


def quantize_weight(weight: Tensor) -> Int8Weight:
    """Round a weight [O, I] to 127 steps on either side of zero, output by output."""
    return Int8Weight(*_quantize(weight.detach().contiguous(), None))


def quantize_rows(x: Tensor) -> Rows:
    """Round rows [T, I] for `multiply`; maps that share an input share this."""
    return Rows(*_quantize(x, None))


def multiply(rows: Rows, weight: Int8Weight, *, dtype: torch.dtype) -> Tensor:
    """x Wᵀ, [T, I] and [O, I] -> [T, O] in `dtype`."""
    sums = torch._int_mm(rows.values, weight.values.t())
    return _dequantize(sums, rows.scale, weight.scale, torch.empty_like(sums, dtype=dtype))


def input_gradient(dy: Tensor, weight: Int8Weight, *, plus: Tensor | None = None) -> Tensor:
    """dy W, [T, O] and [O, I] -> [T, I]; `plus` is added to in place and returned."""
    rows = Rows(*_quantize(dy, weight.scale))
    sums = torch._int_mm(rows.values, weight.values)
    y = torch.empty_like(sums, dtype=dy.dtype) if plus is None else plus
    return _dequantize(sums, rows.scale, None, y, add=plus is not None)


def _quantize(x: Tensor, columns: Tensor | None) -> tuple[Tensor, Tensor]:
    """int8 [T, n] and scales [T] of x, its columns multiplied by `columns` first."""
    values = torch.empty_like(x, dtype=torch.int8)
    if native.takes(x):
        scale = x.new_empty(x.shape[0], dtype=torch.float32)
        native.call("lk_quantize", native.type_of(x), *x.shape, x, columns, values, scale)
        return values, scale
    wide = x.float() if columns is None else x.float() * columns
    scale = wide.abs().amax(1) / 127
    steps = wide / scale.where(scale > 0, 1.0)[:, None]
    values.copy_(steps.round().nan_to_num(0.0))
    return values, scale.where(scale.isfinite(), torch.nan)


def _dequantize(
    sums: Tensor, rows: Tensor, columns: Tensor | None, y: Tensor, *, add: bool = False
) -> Tensor:
    if native.takes(y):
        arguments = (*sums.shape, sums, rows, columns, int(add), y)
        native.call("lk_dequantize", native.type_of(y), *arguments)
        return y
    wide = sums * rows[:, None] if columns is None else sums * rows[:, None] * columns
    return y.add_(wide) if add else y.copy_(wide)

"""Products with the factors of adapters: into the low rank, out of it, and over the tokens.

A group of factors F_1 [r_1, n], F_2 [r_2, n], ... acts as one matrix F [R, n]. Masters may be
float32 where activations are bfloat16: they are rounded on the way, and what sums over the tokens
stays float32 where it is compiled. Dropout masks the wide operand.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorikeet.kernels import native
from lorikeet.kernels.dropout import NO_MASK, Dropout


def narrow(
    x: Tensor,
    factors: Sequence[Tensor],
    *,
    scale: float = 1.0,
    dropout: Dropout | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """drop(x) (scale F)ᵀ, [T, n] -> [T, R], written to `out` if it is given."""
    y = x.new_empty(x.size(0), sum(f.size(0) for f in factors)) if out is None else out
    if _compiled(x, y, factors):
        arguments = (*x.shape, x, *_words(dropout), len(factors), factors, scale, y, y.stride(0))
        native.call("lk_narrow", *arguments)
        return y
    x = dropout(x) if dropout else x
    return torch.mm(x, _stacked(factors, scale, x.dtype).t(), out=y)


def widen_(
    y: Tensor,
    x: Tensor,
    factors: Sequence[Tensor],
    *,
    scale: float = 1.0,
    dropout: Dropout | None = None,
) -> None:
    """y += drop(x (scale F)), in place, for y [T, n] and x [T, R]."""
    if _compiled(y, x, factors):
        arguments = (*y.shape, x, x.stride(0), len(factors), factors, scale, *_words(dropout), y)
        native.call("lk_widen", *arguments)
        return
    stacked = _stacked(factors, scale, y.dtype)
    if dropout:
        dropout.add_(y, x @ stacked)
    else:
        y.addmm_(x, stacked)


def outer(x: Tensor, wide: Tensor, *, scale: float = 1.0, dropout: Dropout | None = None) -> Tensor:
    """scale xᵀ drop(wide), [T, R] and [T, n] -> [R, n]: the gradient of a factor."""
    product = wide.new_empty((x.shape[1], wide.shape[1]), dtype=_sum_type(x, wide))
    return _outer(x, wide, product, scale, dropout)


def outer_transposed(x: Tensor, wide: Tensor, *, scale: float = 1.0) -> Tensor:
    """scale wideᵀ x, [T, R] and [T, n] -> [n, R]: the gradient of the transpose of a factor."""
    product = wide.new_empty((wide.shape[1], x.shape[1]), dtype=_sum_type(x, wide))
    _outer(x, wide, product.t(), scale, None)
    return product


def _outer(
    x: Tensor, wide: Tensor, product: Tensor, scale: float, dropout: Dropout | None
) -> Tensor:
    if _compiled(wide, x, ()):
        arguments = (*x.shape, x, x.stride(0), wide.shape[1], wide, *_words(dropout), scale)
        native.call("lk_outer", *arguments, product, *product.stride())
        return product
    wide = dropout(wide) if dropout else wide
    return torch.mm(x.t(), wide, out=product).mul_(scale)


def _sum_type(x: Tensor, wide: Tensor) -> torch.dtype:
    return torch.float32 if _compiled(wide, x, ()) else wide.dtype


def _compiled(wide: Tensor, low: Tensor, factors: Sequence[Tensor]) -> bool:
    if wide.dtype != torch.bfloat16 or low.dtype != torch.bfloat16 or low.stride(1) != 1:
        return False
    for factor in factors:
        if factor.dtype != torch.float32 or not factor.is_cpu:
            return False
    return native.takes(wide)


def _words(dropout: Dropout | None) -> tuple[int, int, float]:
    return dropout.words if dropout else NO_MASK


def _stacked(factors: Sequence[Tensor], scale: float, dtype: torch.dtype) -> Tensor:
    """scale F, [R, n]."""
    rounded = [f.to(dtype) if scale == 1.0 else (f * scale).to(dtype) for f in factors]
    return rounded[0] if len(rounded) == 1 else torch.cat(rounded)

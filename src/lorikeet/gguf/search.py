"""The searches for the scale of a sub-block, after llama.cpp's ggml-quants.c.

Every search works on many sub-blocks at once: arrays [n, S] hold element i of all S sub-blocks
side by side, so that a sum over the sub-block adds its elements one after another, as the C loops
do, while the processor adds many sub-blocks at a time. All of it is float32 in the order of the
C expressions: the search chooses among candidates whose errors are nearly equal, and the
choice must fall the same way.

Codes are whole numbers held as float32. Legend: n elements of a sub-block, S sub-blocks.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lorikeet.gguf.scratch import Floats, Scratch

EPSILON = np.float32(1e-15)
"""A sub-block whose largest magnitude is below counts as zero (GROUP_MAX_EPS)."""

_MAGIC = np.float32(12582912)  # 1.5 · 2²³: adding it rounds to a whole number


def added(x: Floats) -> Floats:
    """The sum over the first axis, one element after another.

    numpy adds along the first axis row by row, but a single column in pairs.
    """
    if x[0].size == 1:
        return np.add.accumulate(x, axis=0)[-1]
    return np.add.reduce(x, axis=0)


class Steps(NamedTuple):
    """The inverse scales that an affine search tries: (first + i · by + top) / (max - min).

    Attributes:
        first: numerator of the first try, less the top code.
        by: what each try adds.
        tries: how many.
        absolute: the error is |difference| rather than its square.
    """

    first: float
    by: float
    tries: int
    absolute: bool = False

    def numerators(self, top: int) -> list[np.float32]:
        """All numerators, summed in float32 from left to right."""
        return [
            np.float32(self.first) + np.float32(self.by) * np.float32(i) + np.float32(top)
            for i in range(self.tries)
        ]


class Affine(NamedTuple):
    """x ≈ scale · code + low, with codes from 0 to `top`; every array is [S].

    Attributes:
        scale: zero for a sub-block without spread.
        low: at most zero.
        inverse: codes are rint(inverse · (x - base)).
        base: see `inverse`: `low` as it was when these codes were found.
    """

    scale: Floats
    low: Floats
    inverse: Floats
    base: Floats


def affine(x: Floats, w: Floats, *, top: int, steps: Steps, scratch: Scratch) -> Affine:
    """Scale and minimum that make the error weighted by `w` [n, S] of x [n, S] small.

    Source: llama.cpp, ggml-quants.c, make_qkx2_quants and make_qkx3_quants. For each inverse
    scale it rounds, fits scale and minimum to the codes by least squares, and keeps the best. A
    try that is better moves the minimum from which the next tries round.
    """
    codes = scratch.floats("codes", *x.shape)
    terms = scratch.floats("terms", *x.shape)
    lowest = np.minimum(np.minimum.reduce(x, axis=0), np.float32(0))
    high = np.maximum.reduce(x, axis=0)
    sum_w = added(w)
    sum_x = added(np.multiply(w, x, out=terms))

    low, base = lowest.copy(), lowest.copy()
    inverse = np.float32(top) / (high - low)
    scale = np.float32(1) / inverse
    affine_codes(x, base, inverse, top=top, out=codes)
    best = _error(x, w, codes, scale, low, absolute=steps.absolute, out=terms)
    for numerator in steps.numerators(top):
        tried = numerator / (high - low)
        affine_codes(x, low, tried, top=top if numerator > top + 0.499 else None, out=codes)
        np.multiply(w, codes, out=terms)
        sum_l = added(terms)
        sum_xl = added(np.multiply(terms, x, out=scratch.floats("more", *x.shape)))
        sum_l2 = added(np.multiply(terms, codes, out=terms))
        spread = sum_w * sum_l2 - sum_l * sum_l
        fitted = np.divide(sum_w * sum_xl - sum_x * sum_l, spread)
        floor = np.divide(sum_l2 * sum_x - sum_l * sum_xl, spread)
        above = floor > 0
        np.copyto(fitted, sum_xl / sum_l2, where=above)
        np.copyto(floor, np.float32(0), where=above)
        error = _error(x, w, codes, fitted, floor, absolute=steps.absolute, out=terms)
        better = (spread > 0) & (error < best)
        for kept, new in ((best, error), (scale, fitted), (inverse, tried), (base, low)):
            np.copyto(kept, new, where=better)
        np.copyto(low, floor, where=better)

    flat = high == lowest
    for kept, value in ((scale, np.float32(0)), (inverse, np.float32(0)), (low, lowest)):
        np.copyto(kept, value, where=flat)
    return Affine(scale, low, inverse, base)


def affine_codes(
    x: Floats, base: Floats, inverse: Floats, *, top: int | None, out: Floats
) -> Floats:
    """Codes [n, S] of x from 0 up, and no higher than `top` where that is not certain anyway."""
    np.subtract(x, base, out=out)
    np.multiply(out, inverse, out=out)
    np.rint(out, out=out)
    np.fmax(out, np.zeros_like(base), out=out)  # also makes 0 of 0 · inf, as the C code does
    if top is not None:
        np.fmin(out, np.full_like(base, top), out=out)
    return out


def _error(
    x: Floats,
    w: Floats,
    codes: Floats,
    scale: Floats,
    low: Floats,
    *,
    absolute: bool,
    out: Floats,
) -> Floats:
    """Σ w · (scale · codes + low - x)², or with the absolute value, over the sub-block: [S]."""
    np.multiply(codes, scale, out=out)
    np.add(out, low, out=out)
    np.subtract(out, x, out=out)
    if absolute:
        np.abs(out, out=out)
    else:
        np.multiply(out, out, out=out)
    np.multiply(out, w, out=out)
    return added(out)


class Symmetric(NamedTuple):
    """x ≈ scale · code, with codes from -top to top - 1; every array is [S].

    Attributes:
        scale: of either sign; zero for a sub-block that is zero.
        inverse: codes are rint(inverse · x).
        empty: which sub-blocks are zero; their stored code is zero, not that of zero.
    """

    scale: Floats
    inverse: Floats
    empty: NDArray[np.bool_]


def symmetric(x: Floats, w: Floats | None = None, *, top: int, scratch: Scratch) -> Symmetric:
    """Scale that makes the error of x [n, S] weighted by `w` [n, S] (x² without it) small.

    Source: llama.cpp, ggml-quants.c, make_qx_quants with rmse_type 1: 19 inverse scales around
    -top / (the element of largest magnitude); best is the greatest (Σ w x l)² / Σ w l².
    """
    codes = scratch.floats("codes", *x.shape)
    terms = scratch.floats("terms", *x.shape)
    if w is None:
        w = np.multiply(x, x, out=scratch.floats("weights", *x.shape))
    wx = np.multiply(w, x, out=scratch.floats("more", *x.shape))
    largest, most = extreme(x)
    inverse = np.float32(-top) / largest
    sum_xl, sum_l2 = _products(x, w, wx, inverse, top, codes, terms)
    scale = np.where(sum_l2 != 0, sum_xl / sum_l2, np.float32(0))
    best = scale * sum_xl
    for i in range(-9, 10):
        if i == 0:
            continue
        tried = -(np.float32(top) + np.float32(0.1) * np.float32(i)) / largest
        sum_xl, sum_l2 = _products(x, w, wx, tried, top, codes, terms, within=i < 5)
        better = (sum_l2 > 0) & (sum_xl * sum_xl > best * sum_l2)
        fitted = sum_xl / sum_l2
        for kept, new in ((scale, fitted), (best, fitted * sum_xl), (inverse, tried)):
            np.copyto(kept, new, where=better)
    empty = most < EPSILON
    scale[empty] = 0
    inverse[empty] = 0
    return Symmetric(scale, inverse, empty)


def _products(
    x: Floats,
    w: Floats,
    wx: Floats,
    inverse: Floats,
    top: int,
    codes: Floats,
    terms: Floats,
    *,
    within: bool = True,
) -> tuple[Floats, Floats]:
    """Σ w x l and Σ w l² of the codes that `inverse` gives: [S] each."""
    symmetric_codes(x, inverse, top=top, out=codes, within=within)
    sum_xl = added(np.multiply(wx, codes, out=terms))
    np.multiply(w, codes, out=terms)
    return sum_xl, added(np.multiply(terms, codes, out=terms))


def symmetric_codes(
    x: Floats, inverse: Floats, *, top: int, out: Floats, within: bool = False
) -> Floats:
    """Codes [n, S] from -top to top - 1; `within`: none can come out below -top."""
    np.multiply(x, inverse, out=out)
    np.rint(out, out=out)
    if not within:
        np.fmax(out, np.full_like(inverse, -top), out=out)
    return np.fmin(out, np.full_like(inverse, top - 1), out=out)


def extreme(x: Floats) -> tuple[Floats, Floats]:
    """The element of largest magnitude, the first of equals, and its magnitude: [S] each."""
    high, low = np.maximum.reduce(x, axis=0), np.minimum.reduce(x, axis=0)
    most = np.maximum(high, -low)
    largest = np.abs(high)  # of zeros it makes +0, as in C
    np.copyto(largest, low, where=-low > high)
    tied = np.flatnonzero((high == -low) & (most > 0))
    if tied.size:
        picked = x[:, tied]
        largest[tied] = picked[np.argmax(np.abs(picked), axis=0), np.arange(tied.size)]
    return largest, most


def refined(x: Floats, *, top: int, scratch: Scratch) -> tuple[Floats, Floats]:
    """Scale [S] and codes [n, S] from -top to top - 1, improved element by element.

    Source: llama.cpp, ggml-quants.c, make_q3_quants: up to five rounds in which each element in
    turn takes the code that fits the scale of the others, if (Σ w x l)² / Σ w l² grows; w = x².
    """
    codes = scratch.floats("codes", *x.shape)
    terms = scratch.floats("terms", *x.shape)
    w = np.multiply(x, x, out=scratch.floats("weights", *x.shape))
    wx = np.multiply(w, x, out=scratch.floats("more", *x.shape))
    largest, most = extreme(x)
    sum_xl, sum_l2 = _products(x, w, wx, np.float32(-top) / largest, top, codes, terms)
    _improve(x, w, wx, codes, sum_xl, sum_l2, least=-top, top=top - 1)
    scale = np.where(sum_l2 > 0, sum_xl / sum_l2, np.float32(0))
    empty = most < EPSILON
    scale[empty] = 0
    codes[:, empty] = -top  # stored as zero
    return scale, codes


def positive(x: Floats, w: Floats, *, top: int) -> tuple[Floats, Floats]:
    """Scale [S] and codes [n, S] from 0 to `top` of x ≥ 0 [n, S] under weights `w` [n, S].

    Source: llama.cpp, ggml-quants.c, make_qp_quants: nine inverse scales, then `_improve`.
    """
    high = np.maximum(np.maximum.reduce(x, axis=0), np.float32(0))
    inverse = np.float32(top) / high
    best = _squares(x, w, inverse, top)
    for i in (-4, -3, -2, -1, 1, 2, 3, 4):
        tried = (np.float32(0.1) * np.float32(i) + np.float32(top)) / high
        error = _squares(x, w, tried, top)
        better = error < best
        np.copyto(best, error, where=better)
        np.copyto(inverse, tried, where=better)
    codes = np.clip(np.rint(inverse * x), np.float32(0), np.float32(top))
    wx = w * x
    sum_xl = added(wx * codes)
    sum_l2 = added(w * codes * codes)
    _improve(x, w, wx, codes, sum_xl, sum_l2, least=0, top=top)
    scale = np.where(sum_l2 > 0, sum_xl / sum_l2, np.float32(0))
    empty = high < EPSILON
    scale[empty] = 0
    codes[:, empty] = 0
    return scale, codes


def _squares(x: Floats, w: Floats, inverse: Floats, top: int) -> Floats:
    """Σ w · (x - codes / inverse)² with the codes of `inverse`: [S]."""
    codes = np.minimum(np.rint(inverse * x), np.float32(top))
    difference = x - (1 / inverse) * codes
    return added(w * difference * difference)


def _improve(
    x: Floats, w: Floats, wx: Floats, codes: Floats, sum_xl: Floats, sum_l2: Floats,
    *, least: int, top: int,
) -> None:  # fmt: skip
    """Move codes one at a time while that helps; codes and sums change in place."""
    for _ in range(5):
        changed = False
        for i in range(len(x)):
            rest_xl = sum_xl - wx[i] * codes[i]
            rest_l2 = sum_l2 - w[i] * codes[i] * codes[i]
            code = np.clip(_nearest(x[i] * rest_l2 / rest_xl), least, top)
            new_xl = rest_xl + wx[i] * code
            new_l2 = rest_l2 + w[i] * code * code
            better = (rest_xl > 0) & (code != codes[i]) & (new_l2 > 0)
            better &= new_xl * new_xl * sum_l2 > sum_xl * sum_xl * new_l2
            if least == 0:
                better &= rest_l2 > 0
            if better.any():
                changed = True
                for kept, new in ((codes[i], code), (sum_xl, new_xl), (sum_l2, new_l2)):
                    np.copyto(kept, new, where=better)
        if not changed:
            return


def _nearest(x: Floats) -> Floats:
    """Round as the C code does, with what it makes of numbers beyond 2²²: their lowest bits.

    An outlier leaves a remainder near zero to divide by, so such numbers do occur.
    """
    bits = (x + _MAGIC).view(np.int32)
    return ((bits & 0x007FFFFF) - 0x00400000).astype(np.float32)

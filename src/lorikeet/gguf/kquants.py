"""The K-quant encoders: a scale (and a minimum) for each sub-block, then a factor for them all.

Each encoder takes rows [R, W], W a multiple of 256, and writes blocks [R, W / 256, bytes]. Without
importance it is llama.cpp's quantize_row_*_ref, with importance [W] its quantize_row_*_impl
(ggml-quants.c): the weight of an element is then its column's importance times √(σ² + x²).

Legend: n elements of a sub-block, J sub-blocks, B blocks; S = J · B.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lorikeet.gguf import kblocks
from lorikeet.gguf.scratch import Bytes, Floats, Scratch
from lorikeet.gguf.search import (
    EPSILON,
    Affine,
    Steps,
    Symmetric,
    added,
    affine,
    affine_codes,
    extreme,
    positive,
    refined,
    symmetric,
    symmetric_codes,
)
from lorikeet.gguf.simple import across

_Q2_STEPS = Steps(-0.5, 0.1, 16, absolute=True)
_Q4_STEPS = Steps(-1.0, 0.1, 21)
_Q5_STEPS = Steps(-0.5, 0.1, 16)
_WEIGHTED_STEPS = Steps(-0.9, 0.05, 37)


class _Pair(NamedTuple):
    """Scales and minima of all sub-blocks as whole numbers, and their factors.

    Attributes:
        scales: uint8 [J, B].
        mins: uint8 [J, B].
        d: float16 [B], the factor of the scales.
        m: float16 [B], the factor of the minima.
    """

    scales: Bytes
    mins: Bytes
    d: NDArray[np.float16]
    m: NDArray[np.float16]


def encode_q2(rows: Floats, importance: Floats | None, out: Bytes, scratch: Scratch) -> None:
    """Q2_K: sub-blocks of 16 with scales and minima of four bits."""
    x = across(rows, 16, "x", scratch, 256)
    if importance is None:
        w = np.abs(x, out=scratch.floats("weights", *x.shape))
        found = affine(_flat(x), _flat(w), top=3, steps=_Q2_STEPS, scratch=scratch)
        pair = _rounded(found, x.shape[2], top=15)
    else:
        w = _weights(x, importance, scratch, share=256)
        found = affine(_flat(x), _flat(w), top=3, steps=_WEIGHTED_STEPS, scratch=scratch)
        pair = _fitted(found, w, top=15)
    codes = _affine_again(x, found, pair, top=3, scratch=scratch)
    kblocks.pack_q2(out.reshape(-1, 84), codes, *pair)


def encode_q4(rows: Floats, importance: Floats | None, out: Bytes, scratch: Scratch) -> None:
    """Q4_K: sub-blocks of 32 with scales and minima of six bits."""
    codes, pair = _encode_32(rows, importance, scratch, top=15, steps=_Q4_STEPS)
    kblocks.pack_q4(out.reshape(-1, 144), codes, *pair)


def encode_q5(rows: Floats, importance: Floats | None, out: Bytes, scratch: Scratch) -> None:
    """Q5_K: sub-blocks of 32 with scales and minima of six bits."""
    codes, pair = _encode_32(rows, importance, scratch, top=31, steps=_Q5_STEPS)
    kblocks.pack_q5(out.reshape(-1, 176), codes, *pair)


def _encode_32(
    rows: Floats, importance: Floats | None, scratch: Scratch, *, top: int, steps: Steps
) -> tuple[Bytes, _Pair]:
    x = across(rows, 32, "x", scratch, 256)
    if importance is None:
        w = _magnitudes(x, scratch)
        found = affine(_flat(x), _flat(w), top=top, steps=steps, scratch=scratch)
        pair = _rounded(found, x.shape[2], top=63)
    else:
        w = _weights(x, importance, scratch, share=128)
        found = affine(_flat(x), _flat(w), top=top, steps=_WEIGHTED_STEPS, scratch=scratch)
        pair = _fitted(found, w, top=63)
    return _affine_again(x, found, pair, top=top, scratch=scratch), pair


def encode_q3(rows: Floats, importance: Floats | None, out: Bytes, scratch: Scratch) -> None:
    """Q3_K: sub-blocks of 16 with scales of six bits, signed."""
    x = across(rows, 16, "x", scratch, 256)
    if importance is None:
        first, scales, d = _q3_rounded(x, scratch)
    else:
        first, scales, d = _q3_fitted(x, _weights(x, importance, scratch, share=128), scratch)
    half = d.astype(np.float16)
    codes = _symmetric_again(x, first, half, scales, top=4, scratch=scratch)
    kblocks.pack_q3(out.reshape(-1, 110), codes, (scales + np.float32(32)).astype(np.uint8), half)


def _q3_rounded(x: Floats, scratch: Scratch) -> tuple[Floats, Floats, Floats]:
    """Codes [16, 16, B], scales [16, B] as 32nds of the largest, and their factor [B]."""
    scale, codes = refined(_flat(x), top=4, scratch=scratch)
    scale = scale.reshape(x.shape[1:])
    largest = extreme(scale)[0]
    inverse = np.float32(-32) / largest
    scales = np.clip(np.rint(inverse * scale), np.float32(-32), np.float32(31))
    scales[:, largest == 0] = -32
    d = np.where(largest != 0, 1 / inverse, np.float32(0))
    return codes.reshape(x.shape), scales, d


def _q3_fitted(x: Floats, w: Floats, scratch: Scratch) -> tuple[Floats, Floats, Floats]:
    """Codes [16, 16, B], scales [16, B] with the factor [B] that fits best under the weights."""
    found = symmetric(_flat(x), _flat(w), top=4, scratch=scratch)
    codes = _first(x, found, top=4, scratch=scratch)
    scale = found.scale.reshape(x.shape[1:])
    overall = symmetric(scale, added(w), top=32, scratch=Scratch())
    scales = symmetric_codes(scale, overall.inverse, top=32, out=np.empty_like(scale))
    scales[:, overall.empty] = -32
    return codes, scales, overall.scale


def encode_q6(rows: Floats, importance: Floats | None, out: Bytes, scratch: Scratch) -> None:
    """Q6_K: sub-blocks of 16 with scales of eight bits, signed. Weights are importance or x²."""
    x = across(rows, 16, "x", scratch, 256)
    w = None
    if importance is not None:
        w = scratch.floats("weights", *x.shape)
        w.reshape(16, 16, len(rows), -1)[:] = _columns(importance, 16)
    found = symmetric(_flat(x), None if w is None else _flat(w), top=32, scratch=scratch)
    first = _first(x, found, top=32, scratch=scratch)
    scale = found.scale.reshape(x.shape[1:])
    largest, most = extreme(scale)
    inverse = np.float32(-128) / largest
    scales = np.minimum(np.rint(inverse * scale), np.float32(127))
    d = (1 / inverse).astype(np.float16)
    nothing = most < EPSILON
    scales[:, nothing], d[nothing], first[:, :, nothing] = 0, 0, -32
    codes = _symmetric_again(x, first, d, scales, top=32, scratch=scratch)
    kblocks.pack_q6(out.reshape(-1, 210), codes, scales.astype(np.int8), d)


def _first(x: Floats, found: Symmetric, *, top: int, scratch: Scratch) -> Floats:
    """The search's codes [n, J, B]; -top, which is stored as zero, in sub-blocks that are zero."""
    codes = scratch.floats("first", *_flat(x).shape)
    symmetric_codes(_flat(x), found.inverse, top=top, out=codes)
    codes[:, found.empty] = -top
    return codes.reshape(x.shape)


def _flat(x: Floats) -> Floats:
    """[n, J, B] as [n, S]."""
    return x.reshape(len(x), -1)


def _columns(importance: Floats, part: int) -> Floats:
    """Importance [W] as [part, 256 / part, 1, W / 256], to be repeated for every row."""
    blocks = importance.reshape(-1, 256 // part, part)
    return np.ascontiguousarray(blocks.transpose(2, 1, 0))[:, :, None]


def _magnitudes(x: Floats, scratch: Scratch) -> Floats:
    """Weights without importance: the root of the sub-block's mean square, and |x|."""
    w = np.multiply(x, x, out=scratch.floats("weights", *x.shape))
    root = np.sqrt(added(w) / np.float32(len(x)))
    np.abs(x, out=w)
    return np.add(w, root, out=w)


def _weights(x: Floats, importance: Floats, scratch: Scratch, *, share: int) -> Floats:
    """importance · √(σ² + x²) [n, J, B], with σ² the block's sum of squares over `share`."""
    n, parts, count = x.shape
    squares = scratch.floats("codes", parts, n, count)
    np.multiply(x, x, out=squares.transpose(1, 0, 2))
    # In the order of the row, as C adds them: all of a sub-block, then the next one.
    sigma = added(squares.reshape(256, count)) / np.float32(share)
    w = np.add(squares.transpose(1, 0, 2), sigma, out=scratch.floats("weights", *x.shape))
    np.sqrt(w, out=w)
    columns = _columns(importance, n)
    per_row = w.reshape(n, parts, -1, columns.shape[-1])
    np.multiply(per_row, columns, out=per_row)
    return w


def _rounded(found: Affine, count: int, *, top: int) -> _Pair:
    """Scales and minima of `count` blocks as `top`-ths of the largest."""
    scales, d = _shares(found.scale.reshape(-1, count), top)
    mins, m = _shares(-found.low.reshape(-1, count), top)
    return _Pair(scales, mins, d, m)


def _shares(values: Floats, top: int) -> tuple[Bytes, NDArray[np.float16]]:
    largest = np.maximum(np.maximum.reduce(values, axis=0), np.float32(0))
    inverse = np.where(largest > 0, np.float32(top) / largest, np.float32(0))
    codes = np.clip(np.rint(inverse * values), 0, top)
    return codes.astype(np.uint8), (largest / np.float32(top)).astype(np.float16)


def _fitted(found: Affine, w: Floats, *, top: int) -> _Pair:
    """Scales and minima with factors that fit best under the weights of the sub-blocks."""
    count = w.shape[2]
    sums = added(w)
    both = np.concatenate((found.scale.reshape(-1, count), -found.low.reshape(-1, count)), axis=1)
    factors, codes = positive(both, np.concatenate((sums, sums), axis=1), top=top)
    whole, half = codes.astype(np.uint8), factors.astype(np.float16)
    return _Pair(whole[:, :count], whole[:, count:], half[:count], half[count:])


def _affine_again(x: Floats, found: Affine, pair: _Pair, *, top: int, scratch: Scratch) -> Bytes:
    """Codes [n, J, B] for the scales as they are stored.

    Where the stored scale is zero the codes stay those of the search, as in llama.cpp.
    """
    d = pair.d.astype(np.float32) * pair.scales
    low = pair.m.astype(np.float32) * pair.mins
    codes = scratch.floats("codes", *x.shape)
    np.add(x, low, out=codes)
    np.divide(codes, d, out=codes)
    np.rint(codes, out=codes)
    np.fmax(codes, np.zeros_like(d), out=codes)
    np.fmin(codes, np.full_like(d, top), out=codes)
    gone = np.flatnonzero(d == 0)
    if gone.size:
        picked = _flat(x)[:, gone]
        base, inverse = found.base[gone], found.inverse[gone]
        _flat(codes)[:, gone] = affine_codes(picked, base, inverse, top=top, out=picked)
    return _whole(codes, scratch)


def _symmetric_again(
    x: Floats,
    first: Floats,
    d: NDArray[np.float16],
    scales: Floats,
    *,
    top: int,
    scratch: Scratch,
) -> Bytes:
    """Codes [n, J, B] from 0 to 2 · top - 1; those of the search where the stored scale is zero."""
    step = d.astype(np.float32) * scales
    codes = np.divide(x, step, out=scratch.floats("terms", *x.shape))
    np.rint(codes, out=codes)
    np.fmax(codes, np.full_like(step, -top), out=codes)
    np.fmin(codes, np.full_like(step, top - 1), out=codes)
    gone = np.flatnonzero(step == 0)
    if gone.size:
        _flat(codes)[:, gone] = _flat(first)[:, gone]
    codes += np.float32(top)
    return _whole(codes, scratch)


def _whole(codes: Floats, scratch: Scratch) -> Bytes:
    whole = scratch.bytes("whole", *codes.shape)
    np.copyto(whole, codes, casting="unsafe")
    return whole

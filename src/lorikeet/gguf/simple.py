"""Blocks of 32 weights with one scale, or a scale and a minimum: Q8_0, Q4_0, Q4_1, Q5_0, Q5_1.

Layouts (ggml-common.h), d and m float16, little-endian:

    Q8_0  34  d[2]           int8[32]       x = d · q
    Q4_0  18  d[2]           q[16]          x = d · (q - 8)
    Q4_1  20  d[2] m[2]      q[16]          x = d · q + m
    Q5_0  22  d[2]      h[4] q[16]          x = d · (q - 16)
    Q5_1  24  d[2] m[2] h[4] q[16]          x = d · q + m

Byte i of q holds the low nibbles of weights i (low half) and i + 16 (high half); bit i of the
32-bit word h is the fifth bit of weight i.

The encoders take rows [R, W] and write blocks [R, W / 32, bytes]. Legend: B blocks.
"""

from __future__ import annotations

import numpy as np
import torch

from lorikeet.gguf.scratch import Bytes, Floats, Scratch
from lorikeet.gguf.search import (
    Steps,
    added,
    affine,
    affine_codes,
    extreme,
    symmetric,
    symmetric_codes,
)

WEIGHTS = 32
_STEPS = Steps(-0.9, 0.05, 37)


def across(rows: Floats, part: int, name: str, scratch: Scratch, block: int = WEIGHTS) -> Floats:
    """Rows [R, W] as [part, block / part, B]: element, sub-block, block."""
    blocks = rows.reshape(-1, block // part, part)
    laid = scratch.floats(name, part, block // part, len(blocks))
    np.copyto(laid, blocks.transpose(2, 1, 0))
    return laid


def encode_q8_0(rows: Floats, importance: Floats | None, out: Bytes, scratch: Scratch) -> None:
    """Round to 127ths of the largest magnitude; importance changes nothing, as in llama.cpp."""
    blocks = rows.reshape(-1, WEIGHTS)
    x = scratch.floats("scaled", *blocks.shape)
    # torch finds the largest of a row seven times as fast as numpy does.
    largest: Floats = torch.from_numpy(np.abs(blocks, out=x)).amax(1).numpy()
    d = largest / np.float32(127)
    np.multiply(blocks, _reciprocal(d)[:, None], out=x)
    # Half away from zero: with the largest float32 below 0.5, 0.49999997 still becomes zero.
    half = scratch.floats("halves", *blocks.shape)
    x += np.copysign(np.float32(0.49999997), x, out=half)
    data = out.reshape(-1, 34)
    _put(data, 0, d)
    np.copyto(data[:, 2:].view(np.int8), x, casting="unsafe")


def encode_q4_0(rows: Floats, importance: Floats | None, out: Bytes, scratch: Scratch) -> None:
    """Sixteen steps that end at the element of largest magnitude, which becomes -8."""
    _encode_signed(rows, importance, out.reshape(-1, 18), scratch, top=8)


def encode_q5_0(rows: Floats, importance: Floats | None, out: Bytes, scratch: Scratch) -> None:
    """Thirty-two steps that end at the element of largest magnitude, which becomes -16."""
    _encode_signed(rows, importance, out.reshape(-1, 22), scratch, top=16)


def encode_q4_1(rows: Floats, importance: Floats | None, out: Bytes, scratch: Scratch) -> None:
    """Sixteen steps from the minimum to the maximum."""
    _encode_affine(rows, importance, out.reshape(-1, 20), scratch, top=15)


def encode_q5_1(rows: Floats, importance: Floats | None, out: Bytes, scratch: Scratch) -> None:
    """Thirty-two steps from the minimum to the maximum."""
    _encode_affine(rows, importance, out.reshape(-1, 24), scratch, top=31)


def _encode_signed(
    rows: Floats, importance: Floats | None, data: Bytes, scratch: Scratch, *, top: int
) -> None:
    """Source: llama.cpp, quantize_row_q4_0_ref and quantize_row_q4_0_impl, and those of q5_0."""
    x = across(rows, WEIGHTS, "x", scratch)[:, 0]
    codes = scratch.floats("codes", *x.shape)
    if importance is None:
        d = extreme(x)[0] / np.float32(-top)
        np.multiply(x, _reciprocal(d), out=codes)
        codes += np.float32(top + 0.5)
        np.fmin(codes, np.full_like(d, 2 * top - 1), out=codes)  # what follows drops the fraction
    else:
        w = _weights(rows, x, importance, scratch)
        found = symmetric(x, w, top=top, scratch=scratch)
        d = found.scale
        symmetric_codes(x, found.inverse, top=top, out=codes)
        codes += np.float32(top)
        codes[:, found.empty] = 0
    _put(data, 0, d)
    _pack(codes, data[:, 2:], scratch, fifth=top == 16)


def _encode_affine(
    rows: Floats, importance: Floats | None, data: Bytes, scratch: Scratch, *, top: int
) -> None:
    """Source: llama.cpp, quantize_row_q4_1_ref and quantize_row_q4_1_impl, and those of q5_1."""
    x = across(rows, WEIGHTS, "x", scratch)[:, 0]
    codes = scratch.floats("codes", *x.shape)
    if importance is None:
        low, high = np.minimum.reduce(x, axis=0), np.maximum.reduce(x, axis=0)
        d = (high - low) / np.float32(top)
        np.subtract(x, low, out=codes)
        np.multiply(codes, _reciprocal(d), out=codes)
        codes += np.float32(0.5)
        np.fmin(codes, np.full_like(d, top), out=codes)
    else:
        w = _weights(rows, x, importance, scratch)
        found = affine(x, w, top=top, steps=_STEPS, scratch=scratch)
        d, low = found.scale, found.low
        affine_codes(x, found.base, found.inverse, top=top, out=codes)
    _put(data, 0, d)
    _put(data, 2, low)
    _pack(codes, data[:, 4:], scratch, fifth=top == 31)


def _reciprocal(d: Floats) -> Floats:
    """1 / d, and zero for zero."""
    return np.where(d != 0, 1 / d, np.float32(0)).astype(np.float32, copy=False)


def _weights(rows: Floats, x: Floats, importance: Floats, scratch: Scratch) -> Floats:
    """importance · √(mean of the row's squares + x²): [32, B]."""
    squares = scratch.floats("terms", rows.shape[1], len(rows))
    mean = added(np.multiply(rows.T, rows.T, out=squares)) / np.float32(rows.shape[1])
    per_row = rows.shape[1] // WEIGHTS
    w = np.multiply(x, x, out=scratch.floats("weights", *x.shape))
    w += np.repeat(mean, per_row)
    np.sqrt(w, out=w)
    w *= np.tile(importance.reshape(per_row, WEIGHTS).T, len(rows))
    return w


def _put(data: Bytes, at: int, values: Floats) -> None:
    """Write values [B] as float16 into bytes `at` and `at` + 1 of every block."""
    data[:, at : at + 2] = values.astype("<f2")[:, None].view(np.uint8)


def _pack(codes: Floats, data: Bytes, scratch: Scratch, *, fifth: bool) -> None:
    """Write codes [32, B] as nibbles, behind four bytes of fifth bits."""
    whole = scratch.bytes("whole", *codes.shape)
    np.copyto(whole, codes, casting="unsafe")
    if fifth:
        bits = whole.reshape(4, 8, -1) >> 4
        data[:, :4] = np.packbits(bits, axis=1, bitorder="little")[:, 0].T
        data = data[:, 4:]
        whole &= 15
    data[:] = (whole[:16] | (whole[16:] << 4)).T


def decode_q8_0(data: Bytes) -> Floats:
    """Blocks [B, 34] as float32 [B, 32]."""
    return data[:, 2:].view(np.int8).astype(np.float32) * _half(data, 0)


def decode_q4_0(data: Bytes) -> Floats:
    """Blocks [B, 18] as float32 [B, 32]."""
    return (_nibbles(data[:, 2:]) - np.float32(8)) * _half(data, 0)


def decode_q4_1(data: Bytes) -> Floats:
    """Blocks [B, 20] as float32 [B, 32]."""
    return _nibbles(data[:, 4:]) * _half(data, 0) + _half(data, 2)


def decode_q5_0(data: Bytes) -> Floats:
    """Blocks [B, 22] as float32 [B, 32]."""
    codes = _nibbles(data[:, 6:]) + _fifth(data[:, 2:6])
    return (codes - np.float32(16)) * _half(data, 0)


def decode_q5_1(data: Bytes) -> Floats:
    """Blocks [B, 24] as float32 [B, 32]."""
    codes = _nibbles(data[:, 8:]) + _fifth(data[:, 4:8])
    return codes * _half(data, 0) + _half(data, 2)


def _half(data: Bytes, at: int) -> Floats:
    """The float16 in bytes `at` and `at` + 1 of every block: float32 [B, 1]."""
    return np.ascontiguousarray(data[:, at : at + 2]).view("<f2").astype(np.float32)


def _nibbles(q: Bytes) -> Floats:
    """Low halves, then high halves: [B, 16] to float32 [B, 32]."""
    return np.concatenate((q & 15, q >> 4), axis=1).astype(np.float32)


def _fifth(bits: Bytes) -> Floats:
    """Sixteen where the bit is set: [B, 4] to float32 [B, 32]."""
    return np.unpackbits(bits, axis=1, bitorder="little").astype(np.float32) * np.float32(16)

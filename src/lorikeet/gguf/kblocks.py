"""The bits of the K-quants: super-blocks of 256 weights, whose sub-blocks have small scales.

Layouts (ggml-common.h), d and m float16, little-endian; sub-block j has scale s_j and minimum m_j:

    Q2_K   84  s/m nibbles[16] q[64] d[2] m[2]          16 of 16   x = d s_j q - m m_j   q < 4
    Q3_K  110  high[32] q[64] scales[12] d[2]           16 of 16   x = d (s_j - 32) (q - 4), q < 8
    Q4_K  144  d[2] m[2] scales[12] q[128]               8 of 32   x = d s_j q - m m_j   q < 16
    Q5_K  176  d[2] m[2] scales[12] high[32] q[128]      8 of 32   x = d s_j q - m m_j   q < 32
    Q6_K  210  low[128] high[64] int8 scales[16] d[2]   16 of 16   x = d s_j (q - 32)    q < 64

Weights that share a byte lie 32 apart. Weight l of quarter k of half h
(128 weights) is in:

    two-bit fields:  bits 2k of byte 32 h + l                     (q of Q2_K and Q3_K, high of Q6_K)
    nibbles of Q6_K: half k // 2 of byte 64 h + 32 (k % 2) + l
    nibbles of Q4_K, Q5_K: half k % 2 of byte 64 h + 32 (k // 2) + l
    single bits:     bit 4 h + k of byte l                            (high of Q3_K and Q5_K)

`pack_*` take codes [n, sub-blocks, B] as the searches leave them, scales [sub-blocks, B] and
factors [B], and write data [B, bytes]; `decode_*` turn data into float32 [B, 256].
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lorikeet.gguf.scratch import Bytes, Floats

Halves: TypeAlias = NDArray[np.float16]
Codes: TypeAlias = NDArray[Any]
"""uint8; numpy's types do not know that a shift keeps it."""


def pack_q2(data: Bytes, codes: Bytes, scales: Bytes, mins: Bytes, d: Halves, m: Halves) -> None:
    """Q2_K: codes [16, 16, B]."""
    data[:, :16] = (scales | (mins << 4)).T
    data[:, 16:80] = _pairs_of_bits(codes)
    data[:, 80:82] = _raw(d)
    data[:, 82:84] = _raw(m)


def pack_q3(data: Bytes, codes: Bytes, scales: Bytes, d: Halves) -> None:
    """Q3_K: codes [16, 16, B] from 0 to 7, scales from 0 to 63."""
    data[:, :32] = _bits(codes >> 2)
    data[:, 32:96] = _pairs_of_bits(codes & 3)
    low = scales & 15
    data[:, 96:104] = (low[:8] | (low[8:] << 4)).T
    high = (scales >> 4).reshape(4, 4, -1)
    data[:, 104:108] = (high[0] | (high[1] << 2) | (high[2] << 4) | (high[3] << 6)).T
    data[:, 108:110] = _raw(d)


def pack_q4(data: Bytes, codes: Bytes, scales: Bytes, mins: Bytes, d: Halves, m: Halves) -> None:
    """Q4_K: codes [32, 8, B], scales and minima from 0 to 63."""
    data[:, :2] = _raw(d)
    data[:, 2:4] = _raw(m)
    data[:, 4:16] = _six_bits(scales, mins)
    pairs = codes[:, 0::2] | (codes[:, 1::2] << 4)
    data[:, 16:144].reshape(-1, 4, 32)[:] = pairs.transpose(2, 1, 0)


def pack_q5(data: Bytes, codes: Bytes, scales: Bytes, mins: Bytes, d: Halves, m: Halves) -> None:
    """Q5_K: codes [32, 8, B], scales and minima from 0 to 63."""
    data[:, 16:48] = _bits(codes >> 4)
    low = codes & 15
    data[:, :2] = _raw(d)
    data[:, 2:4] = _raw(m)
    data[:, 4:16] = _six_bits(scales, mins)
    pairs = low[:, 0::2] | (low[:, 1::2] << 4)
    data[:, 48:176].reshape(-1, 4, 32)[:] = pairs.transpose(2, 1, 0)


def pack_q6(data: Bytes, codes: Bytes, scales: NDArray[np.int8], d: Halves) -> None:
    """Q6_K: codes [16, 16, B] from 0 to 63."""
    low = (codes & 15).reshape(16, 2, 2, 2, 2, -1)  # element, half, k // 2, k % 2, 16 of 32, block
    nibbles = low[:, :, 0] | (low[:, :, 1] << 4)
    data[:, :128].reshape(-1, 2, 2, 2, 16)[:] = nibbles.transpose(4, 1, 2, 3, 0)
    data[:, 128:192] = _pairs_of_bits(codes >> 4)
    data[:, 192:208] = scales.view(np.uint8).T
    data[:, 208:210] = _raw(d)


def _raw(values: Halves) -> Bytes:
    """float16 [B] as bytes [B, 2]."""
    return values.astype("<f2")[:, None].view(np.uint8)


def _pairs_of_bits(codes: Codes) -> Codes:
    """Codes [16, 16, B] below 4 as bytes [B, 64]."""
    parts = codes.reshape(16, 2, 4, 2, -1)  # element, half, quarter, 16 of 32, block
    joined = parts[:, :, 0] | (parts[:, :, 1] << 2) | (parts[:, :, 2] << 4) | (parts[:, :, 3] << 6)
    return joined.transpose(3, 1, 2, 0).reshape(-1, 64)


def _bits(codes: Codes) -> Codes:
    """Codes [n, 256 / n, B] below 2 as bytes [B, 32]."""
    parts = codes.reshape(len(codes), 8, 32 // len(codes), -1)
    joined = parts[:, 0].copy()
    for bit in range(1, 8):
        joined |= parts[:, bit] << bit
    return joined.transpose(2, 1, 0).reshape(-1, 32)


def _six_bits(scales: Bytes, mins: Bytes) -> Bytes:
    """Eight scales and eight minima [8, B] below 64 as bytes [B, 12].

    Bytes 0-3 and 4-7 hold the first four scales and minima; 8-11 the low nibbles of the last four;
    their upper two bits are on top of the first eight bytes.
    """
    packed = np.empty((scales.shape[1], 12), np.uint8)
    packed[:, 0:4] = (scales[:4] | ((scales[4:] >> 4) << 6)).T
    packed[:, 4:8] = (mins[:4] | ((mins[4:] >> 4) << 6)).T
    packed[:, 8:12] = ((scales[4:] & 15) | ((mins[4:] & 15) << 4)).T
    return packed


def decode_q2(data: Bytes) -> Floats:
    """Q2_K: data [B, 84]."""
    scale = _half(data, 80) * (data[:, :16] & 15).astype(np.float32)
    low = _half(data, 82) * (data[:, :16] >> 4).astype(np.float32)
    return _scaled(_two_bits(data[:, 16:80]), scale, low)


def decode_q3(data: Bytes) -> Floats:
    """Q3_K: data [B, 110]."""
    nibbles = np.concatenate((data[:, 96:104] & 15, data[:, 96:104] >> 4), axis=1)
    high = data[:, None, 104:108] >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3
    scales = (nibbles | (high.reshape(-1, 16) << 4)).astype(np.float32) - np.float32(32)
    codes = _two_bits(data[:, 32:96]) | (_one_bit(data[:, :32]) << 2)
    return _scaled(codes.astype(np.float32) - np.float32(4), _half(data, 108) * scales)


def decode_q4(data: Bytes) -> Floats:
    """Q4_K: data [B, 144]."""
    scales, mins = _from_six_bits(data[:, 4:16])
    codes = _alternating_nibbles(data[:, 16:144])
    return _scaled(codes, _half(data, 0) * scales, _half(data, 2) * mins)


def decode_q5(data: Bytes) -> Floats:
    """Q5_K: data [B, 176]."""
    scales, mins = _from_six_bits(data[:, 4:16])
    codes = _alternating_nibbles(data[:, 48:176]) | (_one_bit(data[:, 16:48]) << 4)
    return _scaled(codes, _half(data, 0) * scales, _half(data, 2) * mins)


def decode_q6(data: Bytes) -> Floats:
    """Q6_K: data [B, 210]."""
    low = data[:, :128].reshape(-1, 2, 1, 64) >> np.array([[0], [4]], np.uint8) & 15
    codes = low.reshape(-1, 256) | (_two_bits(data[:, 128:192]) << 4)
    scales = np.ascontiguousarray(data[:, 192:208]).view(np.int8).astype(np.float32)
    return _scaled(codes.astype(np.float32) - np.float32(32), _half(data, 208) * scales)


def _half(data: Bytes, at: int) -> Floats:
    """The float16 in bytes `at` and `at` + 1: float32 [B, 1]."""
    return np.ascontiguousarray(data[:, at : at + 2]).view("<f2").astype(np.float32)


def _scaled(codes: Codes, scales: Floats, low: Floats | None = None) -> Floats:
    """scale · code - low: codes [B, 256], scales and low [B, sub-blocks], to float32 [B, 256]."""
    x = codes.reshape(*scales.shape, -1).astype(np.float32)
    x *= scales[:, :, None]
    if low is not None:
        x -= low[:, :, None]
    return x.reshape(-1, 256)


def _two_bits(q: Bytes) -> Codes:
    """Bytes [B, 64] as codes [B, 256] below 4."""
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    return (q.reshape(-1, 2, 1, 32) >> shifts & 3).reshape(-1, 256)


def _one_bit(q: Bytes) -> Codes:
    """Bytes [B, 32] as codes [B, 256] below 2."""
    return (q[:, None] >> np.arange(8, dtype=np.uint8)[:, None] & 1).reshape(-1, 256)


def _alternating_nibbles(q: Bytes) -> Codes:
    """Bytes [B, 128] as codes [B, 256] below 16."""
    return (q.reshape(-1, 4, 1, 32) >> np.array([[0], [4]], np.uint8) & 15).reshape(-1, 256)


def _from_six_bits(packed: Bytes) -> tuple[Floats, Floats]:
    """Bytes [B, 12] as scales and minima, float32 [B, 8]."""
    first, second, low = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate((first & 63, (low & 15) | (first >> 6 << 4)), axis=1)
    mins = np.concatenate((second & 63, (low >> 4) | (second >> 6 << 4)), axis=1)
    return scales.astype(np.float32), mins.astype(np.float32)

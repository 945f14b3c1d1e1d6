"""The block formats of GGUF: what each takes, and weights to bytes and back.

`encode` gives what llama.cpp's quantiser gives; `decode` what it, and the `gguf` package, read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeAlias

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from lorikeet.errors import ModelError
from lorikeet.gguf import kblocks, kquants, simple
from lorikeet.gguf.scratch import Bytes, Floats, Scratch, in_chunks

_CHUNK = 262144
"""Weights that a thread works on at a time: the search holds five arrays of them, 5 MB. Less would
stay nearer to the processor, but threads would mostly hand each other the interpreter."""

_LARGEST = 1e9
"""More than any type of blocks holds; beyond it the searches' sums overflow."""

_Encoder: TypeAlias = Callable[[Floats, "Floats | None", Bytes, Scratch], None]


@dataclass(frozen=True, slots=True)
class BlockType:
    """A format of blocks.

    Attributes:
        name: as in `gguf.GGMLQuantizationType`.
        id: its number in a file.
        weights: of a block.
        bytes: of a block.
    """

    name: str
    id: int
    weights: int
    bytes: int


_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

_ENCODERS: dict[str, _Encoder] = {
    "Q8_0": simple.encode_q8_0,
    "Q4_0": simple.encode_q4_0,
    "Q4_1": simple.encode_q4_1,
    "Q5_0": simple.encode_q5_0,
    "Q5_1": simple.encode_q5_1,
    "Q2_K": kquants.encode_q2,
    "Q3_K": kquants.encode_q3,
    "Q4_K": kquants.encode_q4,
    "Q5_K": kquants.encode_q5,
    "Q6_K": kquants.encode_q6,
}

_DECODERS: dict[str, Callable[[Bytes], Floats]] = {
    "Q8_0": simple.decode_q8_0,
    "Q4_0": simple.decode_q4_0,
    "Q4_1": simple.decode_q4_1,
    "Q5_0": simple.decode_q5_0,
    "Q5_1": simple.decode_q5_1,
    "Q2_K": kblocks.decode_q2,
    "Q3_K": kblocks.decode_q3,
    "Q4_K": kblocks.decode_q4,
    "Q5_K": kblocks.decode_q5,
    "Q6_K": kblocks.decode_q6,
}


def _block_type(name: str) -> BlockType:
    kind = GGMLQuantizationType[name]
    weights, size = GGML_QUANT_SIZES[kind]
    return BlockType(name, int(kind), weights, size)


TYPES: Mapping[str, BlockType] = MappingProxyType(
    {name: _block_type(name) for name in (*_FLOATS, *_ENCODERS)}
)
"""Every type that can be written and read, by name."""

_FACTORS = {"Q8_0": (0,), "Q4_0": (0,), "Q5_0": (0,), "Q4_1": (0, 2), "Q5_1": (0, 2)} | {
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)
}  # fmt: skip
"""Where the float16 factors of a block lie."""


def row_bytes(name: str, width: int) -> int:
    """Bytes of a row of `width` weights.

    Raises:
        ModelError: an unknown type, or a width that is no multiple of its blocks.
    """
    kind = _known(name)
    if width % kind.weights or width <= 0:
        raise ModelError(
            f"rows of {width} weights do not divide into the blocks of {kind.weights} that"
            f" {name} has: choose a type whose blocks are smaller"
        )
    return width // kind.weights * kind.bytes


def encode(name: str, rows: Tensor, importance: Tensor | None = None) -> Tensor:
    """Rows as blocks.

    Args:
        name: one of `TYPES`.
        rows: float32 [N, width].
        importance: float32 [width], how much an error in each column matters, none negative;
            None for the weights that llama.cpp takes without an importance matrix. Types without a
            search (F32, F16, BF16, Q8_0) ignore it.

    Returns:
        uint8 [N, `row_bytes`].

    Raises:
        ModelError: an unknown type, a width that does not divide into blocks, weights or importance
            that are not finite, or weights too large for the type.
    """
    size = row_bytes(name, rows.shape[1])
    weights = rows.detach().to(device="cpu", dtype=torch.float32).contiguous()
    if name in _FLOATS:
        return _encode_floats(name, weights)
    out = torch.empty(len(weights), size, dtype=torch.uint8)
    columns = None if importance is None else _checked(importance, rows.shape[1])
    _encode_blocks(name, weights.numpy(), columns, out.numpy())
    return out


def decode(name: str, data: Tensor) -> Tensor:
    """Blocks as rows: uint8 [N, `row_bytes`] to float32 [N, width].

    Raises:
        ModelError: an unknown type, or rows that are no whole number of blocks.
    """
    kind = _known(name)
    if data.shape[1] % kind.bytes:
        raise ModelError(
            f"rows of {data.shape[1]} bytes are no whole number of {name} blocks"
            f" ({kind.bytes} bytes each): the data is damaged or of another type"
        )
    if name in _FLOATS:
        return data.clone(memory_format=torch.contiguous_format).view(_FLOATS[name]).float()
    data = data.contiguous()
    out = torch.empty(len(data), data.shape[1] // kind.bytes * kind.weights)
    source = data.numpy().reshape(-1, kind.bytes)
    target = out.numpy().reshape(-1, kind.weights)

    def work(chunk: slice, _: Scratch) -> None:
        target[chunk] = _DECODERS[name](source[chunk])

    in_chunks(len(source), _CHUNK // kind.weights, work, threads=1)
    return out


def _known(name: str) -> BlockType:
    kind = TYPES.get(name)
    if kind is None:
        raise ModelError(f"{name} is not a type that can be read or written: {', '.join(TYPES)}")
    return kind


def _encode_floats(name: str, rows: Tensor) -> Tensor:
    cast = rows.to(_FLOATS[name])
    if cast.numel() and not all(torch.isfinite(end) for end in torch.aminmax(cast)):
        raise _refused(name, rows.numpy())  # a NaN is the smallest and the largest
    return (cast.clone() if cast is rows else cast).view(torch.uint8)


def _checked(importance: Tensor, width: int) -> Floats:
    columns = importance.detach().to(device="cpu", dtype=torch.float32).contiguous()
    if columns.shape != (width,):
        raise ModelError(
            f"importance of shape {list(columns.shape)} for rows of {width} weights:"
            " one number per column is expected"
        )
    if not bool((torch.isfinite(columns) & (columns >= 0)).all()):
        raise ModelError("importance that is negative or not finite: measure it again")
    return columns.numpy()


def _encode_blocks(name: str, rows: Floats, importance: Floats | None, out: Bytes) -> None:
    """Whole rows at a time, as many as make a chunk."""
    kind, encoder = TYPES[name], _ENCODERS[name]

    def work(chunk: slice, scratch: Scratch) -> None:
        if not _magnitude(rows[chunk]) <= _LARGEST:
            raise _refused(name, rows)
        encoder(rows[chunk], importance, out[chunk], scratch)
        blocks = out[chunk].reshape(-1, kind.bytes)
        if any((blocks[:, at + 1] & 0x7C == 0x7C).any() for at in _FACTORS[name]):
            raise _refused(name, rows)

    searching = kind.weights > simple.WEIGHTS or importance is not None
    threads = torch.get_num_threads() if searching else 1  # without a search memory is the limit
    in_chunks(len(rows), max(1, _CHUNK // rows.shape[1]), work, threads=threads)


def _magnitude(rows: Floats) -> float:
    """The largest, or NaN if there is one."""
    return float(np.maximum(rows.max(), -rows.min()))


def _refused(name: str, rows: Floats) -> ModelError:
    """What is wrong with weights that do not fit a type."""
    wrong = np.argwhere(~np.isfinite(rows))
    if len(wrong):
        row, column = wrong[0]
        return ModelError(
            f"row {row}, column {column}: {name} cannot hold {rows[row, column]}:"
            " the weights are damaged, or training diverged"
        )
    return ModelError(
        f"weights as large as {_magnitude(rows):.3g} do not fit {name}: choose a type of more range"
        " (bf16, f32), or look for what made them so large"
    )

"""GGUF files, written block by block; `read.py` describes the format.

Version 3, little-endian; what is written is the same, byte for byte, each time.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from gguf import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGUF_VERSION, GGMLQuantizationType, Keys
from torch import Tensor

from lorikeet.errors import ModelError
from lorikeet.files import atomic_file
from lorikeet.gguf.metadata import Field, packed, text_bytes
from lorikeet.gguf.read import MAGIC

_LONGEST_NAME = 63  # bytes; ggml keeps names in 64 with a zero at the end


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor to be written.

    Attributes:
        type: ggml's word for how its weights are stored, such as `Q4_K`.
        shape: its sizes in torch's order, the innermost last.
        blocks: gives its encoded bytes from the first to the last, each time it is called.
    """

    type: str
    shape: tuple[int, ...]
    blocks: Callable[[], Iterable[Tensor | bytes]]

    @property
    def size(self) -> int:
        """Bytes of its data."""
        weights, size = GGML_QUANT_SIZES[GGMLQuantizationType[self.type]]
        return math.prod(self.shape) // weights * size


def write_gguf(
    path: Path,
    metadata: Mapping[str, Field],
    tensors: Mapping[str, Stored],
    *,
    written: Callable[[str], None] | None = None,
) -> None:
    """Write a file; nothing stands under its name before it is complete.

    Args:
        path: the file; what is there is replaced.
        metadata: what is said about the model, by key, in this order.
        tensors: the tensors by name, in this order.
        written: is told the name of every tensor when it is complete.

    Raises:
        ModelError: a value or a name that the format cannot hold, with every finding.
        StorageError: the disk refused a write; the draft is gone.
    """
    alignment = _alignment(metadata)
    header = _header(metadata, tensors, alignment=alignment)
    with atomic_file(path) as draft, draft.open("wb") as file:
        file.write(header)
        for name, stored in tensors.items():
            before = file.tell()
            for block in stored.blocks():
                file.write(_bytes_of(block) if isinstance(block, Tensor) else block)
            found = file.tell() - before
            if found != stored.size:
                raise ValueError(f"{name} has {found} bytes, not {stored.size}")
            file.write(bytes(-found % alignment))
            if written:
                written(name)


def _alignment(metadata: Mapping[str, Field]) -> int:
    given = metadata.get(Keys.General.ALIGNMENT)
    return GGUF_DEFAULT_ALIGNMENT if given is None else int(given.value)


def _header(
    metadata: Mapping[str, Field], tensors: Mapping[str, Stored], *, alignment: int
) -> bytes:
    """What comes before the data, padded to where they begin."""
    if problems := list(_problems(tensors)):
        raise ModelError("the tensors cannot be written as GGUF:", problems)
    header = bytearray(MAGIC + struct.pack("<IQQ", GGUF_VERSION, len(tensors), len(metadata)))
    header += packed(metadata)
    place = 0
    for name, stored in tensors.items():
        sizes = stored.shape[::-1]  # the innermost first
        header += text_bytes(name) + struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)
        header += struct.pack("<IQ", GGMLQuantizationType[stored.type], place)
        place += stored.size + -stored.size % alignment
    return bytes(header + bytes(-len(header) % alignment))


def _problems(tensors: Mapping[str, Stored]) -> Iterator[str]:
    for name, stored in tensors.items():
        if len(name.encode()) > _LONGEST_NAME:
            yield f"{name}: the name is longer than {_LONGEST_NAME} bytes"
        if len(stored.shape) > 4:
            yield f"{name}: {list(stored.shape)} has more than 4 dimensions"
        weights, _ = GGML_QUANT_SIZES[GGMLQuantizationType[stored.type]]
        if (stored.shape[-1] if stored.shape else 1) % weights:
            yield (
                f"{name}: rows of {list(stored.shape)} are no multiple of the {weights} weights"
                f" in a block of {stored.type}"
            )


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data

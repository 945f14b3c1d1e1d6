"""The safetensors format, read and written tensor by tensor.

A file is 8 bytes with the length N of the header (little-endian), N bytes of JSON, and the data.
The header maps a tensor's name to `{"dtype", "shape", "data_offsets": [begin, end]}`, offsets
counted from the end of the header; `__metadata__` maps strings to strings. The data has neither
holes nor overlaps (https://github.com/huggingface/safetensors, "Format").

Nothing is mapped into memory, because mapped pages count as the process's own: what is held at a
time is one block of one tensor. Files come from anywhere, so nothing is allocated or read on the
word of a header that does not add up.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from lorikeet.errors import ModelError

_LONGEST_HEADER = 25_000_000  # 200,000 tensors; as JSON it may take 26 times as much memory
_MOST_DIMENSIONS = 64  # torch's bound
_LARGEST_SIZE = 2**63 - 1
_SHOWN = 8  # findings in one message
_METADATA = "__metadata__"

BLOCK_BYTES = 16 << 20
"""How much of a tensor is read at a time."""

_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}

TORCH: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""The dtypes of the format that torch computes with; others are copied as bytes."""


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a tensor lies in a file.

    Attributes:
        dtype: the format's word for it, such as `BF16`.
        shape: its sizes.
        begin: first byte of its data, counted from the start of the file.
        end: one past the last byte.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class SafeFile:
    """A file whose header is known to be sound.

    Attributes:
        path: the file.
        entries: its tensors by name, in the order of their data.
        metadata: what else the header says.
    """

    path: Path
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str] = field(default_factory=dict)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of a tensor with at least one dimension.

        Raises:
            ModelError: the file cannot be read, or torch does not have its dtype.
        """
        entry = self.entries[name]
        if entry.dtype not in TORCH:
            raise ModelError(f"{name} in {self.path} is {entry.dtype}, which cannot be computed in")
        width = (entry.end - entry.begin) // max(entry.shape[0], 1)
        buffer = torch.empty((stop - start) * width, dtype=torch.uint8)
        with _reading(self.path), self.path.open("rb") as file:
            file.seek(entry.begin + start * width)
            if file.readinto(buffer.numpy().data) != buffer.numel():
                _shorter(self.path)
        return buffer.view(TORCH[entry.dtype]).view(stop - start, *entry.shape[1:])

    def raw(self, name: str) -> Iterator[bytes]:
        """The bytes of a tensor, in blocks.

        Raises:
            ModelError: the file cannot be read.
        """
        entry = self.entries[name]
        with _reading(self.path):
            file = self.path.open("rb")
        with file:
            file.seek(entry.begin)
            left = entry.end - entry.begin
            while left:
                with _reading(self.path):
                    block = file.read(min(left, BLOCK_BYTES))
                if not block:
                    _shorter(self.path)
                left -= len(block)
                yield block


def open_safe(path: Path) -> SafeFile:
    """Read and check the header of a file; its data are not touched.

    Raises:
        ModelError: the file is damaged, with what is wrong with it.
    """
    with _reading(path), path.open("rb") as file:
        size = path.stat().st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(_LONGEST_HEADER, size - 8):
            raise ModelError(
                f"{path} is damaged or not a safetensors file: it has {size:,} bytes and claims a"
                f" header of {length:,}; copy or download it again"
            )
        text = file.read(length)
    header = _parse(path, text)
    metadata = header.pop(_METADATA, {})
    problems: list[str] = []
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        problems.append(f"{_METADATA} does not map strings to strings")
    entries: dict[str, Entry] = {}
    for name, described in header.items():
        found = _entry(described, origin=8 + length)
        if isinstance(found, Entry):
            entries[name] = found
        else:
            problems.append(f"{name[:200]}: {found}")
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)))
    if not problems:
        problems += _layout(entries, begin=8 + length, end=size)
    if problems:
        more = len(problems) - _SHOWN
        shown = problems[:_SHOWN] + ([f"and {more} more"] if more > 0 else [])
        raise ModelError(f"{path} is damaged; copy or download it again:", shown)
    return SafeFile(path, entries, metadata)


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        reason = str(error)[:200]
        raise ModelError(
            f"{path} is damaged or not a safetensors file: its header is not JSON ({reason})"
        ) from None
    if not isinstance(header, dict):
        raise ModelError(f"{path} is damaged: its header is a {type(header).__name__}")
    return header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _entry(described: object, *, origin: int) -> Entry | str:
    """The tensor that a part of the header describes, or what is wrong with it."""
    if not isinstance(described, dict):
        return "expected an object with dtype, shape and data_offsets"
    dtype, shape = described.get("dtype"), _sizes(described.get("shape"))
    offsets = _sizes(described.get("data_offsets"))
    if not isinstance(dtype, str) or dtype not in _BITS:
        return f"unknown dtype {str(dtype)[:40]!r}"
    if shape is None or len(shape) > _MOST_DIMENSIONS:
        return "shape is no list of sizes"
    if offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:
        return "data_offsets is no pair [begin, end]"
    needed, given = math.prod(shape) * _BITS[dtype], (offsets[1] - offsets[0]) * 8
    if needed != given:
        return f"{dtype} {list(shape)} has {needed:,} bits, but {given:,} are set aside"
    return Entry(dtype, shape, origin + offsets[0], origin + offsets[1])


def _sizes(values: object) -> tuple[int, ...] | None:
    if not isinstance(values, list):
        return None
    good = all(type(value) is int and 0 <= value <= _LARGEST_SIZE for value in values)
    return tuple(values) if good else None


def _layout(entries: Mapping[str, Entry], *, begin: int, end: int) -> Iterator[str]:
    """What is wrong with the places of tensors that are sorted by them."""
    at = begin
    for name, entry in entries.items():
        if entry.begin != at:
            what = "overlaps" if entry.begin < at else "leaves a hole after"
            yield f"{name[:200]} {what} what comes before it"
        at = max(at, entry.end)
    if at > end:
        yield f"it is cut off: it has {end:,} bytes, its tensors need {at:,}"
    elif at < end:
        yield f"{end - at:,} bytes at its end belong to no tensor"


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from error


def _shorter(path: Path) -> NoReturn:
    raise ModelError(f"{path} became shorter while it was read; is something writing to it?")


@dataclass(frozen=True, slots=True)
class Content:
    """A tensor to be written.

    Attributes:
        dtype: the format's word for it.
        shape: its sizes.
        blocks: gives its data from the first byte to the last, each time it is called.
    """

    dtype: str
    shape: tuple[int, ...]
    blocks: Callable[[], Iterable[bytes | Tensor]]

    @property
    def size(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * _BITS[self.dtype] // 8


def format_name(dtype: torch.dtype) -> str | None:
    """The format's word for a torch dtype; None if it has none."""
    return next((name for name, own in TORCH.items() if own == dtype), None)


def write_safe(
    path: Path,
    tensors: Mapping[str, Content],
    *,
    metadata: Mapping[str, str],
    written: Callable[[str], None] | None = None,
) -> None:
    """Write a file, one block at a time.

    Tensors with large elements come first, as in files of the reference implementation, so that
    every tensor is aligned.

    Args:
        path: the file; what is there is overwritten.
        tensors: the tensors by name.
        metadata: goes into the header.
        written: is told the name of every tensor when it is complete.

    Raises:
        OSError: the disk refused a write.
    """
    order = sorted(tensors, key=lambda name: (-_BITS[tensors[name].dtype], name))
    with path.open("wb") as file:
        file.write(header_of({name: tensors[name] for name in order}, metadata=metadata))
        for name in order:
            before = file.tell()
            for block in tensors[name].blocks():
                file.write(as_bytes(block) if isinstance(block, Tensor) else block)
            if file.tell() - before != tensors[name].size:
                found = file.tell() - before
                raise ValueError(f"{name} has {found} bytes, not {tensors[name].size}")
            if written:
                written(name)


def header_of(tensors: Mapping[str, Content], *, metadata: Mapping[str, str]) -> bytes:
    """The first bytes of a file with these tensors in this order: the length and the header."""
    header: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    at = 0
    for name, content in tensors.items():
        offsets = [at, at + content.size]
        header[name] = {
            "dtype": content.dtype,
            "shape": list(content.shape),
            "data_offsets": offsets,
        }
        at = offsets[1]
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor on the CPU, row by row."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data

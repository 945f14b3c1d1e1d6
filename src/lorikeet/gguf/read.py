"""GGUF files, read without trusting them.

A file is the magic, the version (uint32), the counts of tensors and of metadata (uint64 each), the
metadata (`metadata.py`), the descriptions of the tensors - name, number of dimensions (uint32), the
sizes (uint64, the innermost first), type (uint32), place of the data (uint64) - and the data, whose
start and whose tensors' places are multiples of `general.alignment`
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, "File Structure").

Files come from anywhere, so nothing is allocated or read on the word of a header that does not add
up. Nothing is mapped into memory, because mapped pages count as the process's own.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np
import torch
from gguf import (
    GGML_QUANT_SIZES,
    GGUF_DEFAULT_ALIGNMENT,
    GGMLQuantizationType,
    GGUFValueType,
    Keys,
)
from torch import Tensor

from lorikeet.errors import ModelError
from lorikeet.gguf.blocks import decode
from lorikeet.gguf.metadata import KINDS, NUMBERS, Field

MAGIC = b"GGUF"

_VERSIONS = (2, 3)  # the same bytes; version 3 only allows big-endian files
_LONGEST_HEADER = 64_000_000  # a vocabulary of 256,000 with its merges takes 15 million
_MOST_DIMENSIONS = 4  # ggml's bound
_LARGEST_SIZE = 2**63 - 1
_SHORTEST_VALUE, _SHORTEST_TENSOR, _SHORTEST_STRING = 13, 24, 8  # bytes that one takes at least
_SHOWN = 8  # findings in one message
_BLOCK_BYTES = 16 << 20  # how much of a tensor is read at a time
_KIND_OF = {number: kind for kind, number in KINDS.items()}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies in a file.

    Attributes:
        name: its name.
        type: ggml's word for how its weights are stored, such as `Q4_K`.
        shape: its sizes in torch's order, the innermost last.
        begin: first byte of its data, counted from the start of the file.
        size: bytes of its data.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    begin: int
    size: int


@dataclass(frozen=True, slots=True)
class GGUFFile:
    """A file whose header is known to be sound.

    Attributes:
        path: the file.
        metadata: what the header says about the model, by key.
        tensors: its tensors by name, in the order of the header.
    """

    path: Path
    metadata: dict[str, Field]
    tensors: dict[str, TensorInfo]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` (elements, where it has one dimension) of a tensor, as float32.

        Raises:
            ModelError: the file cannot be read, or the type is not among `blocks.TYPES`.
        """
        info = self.tensors[name]
        if not 0 <= start <= stop <= info.shape[0]:
            raise ValueError(f"{name} has {info.shape[0]} rows, not rows {start} to {stop}")
        if 0 in (stop - start, *info.shape):
            return torch.empty(stop - start, *info.shape[1:])
        if len(info.shape) == 1:  # one run of blocks, which an element may lie in the middle of
            data = self._bytes(info.begin, info.size)
            return decode(info.type, data.view(1, -1))[0, start:stop]
        each = info.size // info.shape[0]
        data = self._bytes(info.begin + start * each, (stop - start) * each)
        lines = (stop - start) * math.prod(info.shape[1:-1])
        shape = (stop - start, *info.shape[1:])
        return decode(info.type, data.view(lines, -1)).reshape(shape)

    def raw(self, name: str) -> Iterator[bytes]:
        """The bytes of a tensor, in blocks.

        Raises:
            ModelError: the file cannot be read.
        """
        info = self.tensors[name]
        left = info.size
        with _reading(self.path):
            file = self.path.open("rb")
        with file:
            file.seek(info.begin)
            while left:
                with _reading(self.path):
                    block = file.read(min(left, _BLOCK_BYTES))
                if not block:
                    _shorter(self.path)
                left -= len(block)
                yield block

    def _bytes(self, begin: int, size: int) -> Tensor:
        buffer = torch.empty(size, dtype=torch.uint8)
        with _reading(self.path), self.path.open("rb") as file:
            file.seek(begin)
            if file.readinto(buffer.numpy().data) != size:
                _shorter(self.path)
        return buffer


def open_gguf(path: Path) -> GGUFFile:
    """Read and check the header of a file; its data are not touched.

    Raises:
        ModelError: the file is damaged or of a kind that is not read, with every finding.
    """
    with _reading(path), path.open("rb") as file:
        size = path.stat().st_size
        findings = _Findings()
        header = _Header(file, min(size, _LONGEST_HEADER), findings)
        try:
            metadata, described = header.parse()
        except _Broken as broken:
            findings.add(str(broken))
            _refuse(path, findings)
    alignment = _alignment(metadata, findings)
    begin = header.at + -header.at % alignment
    tensors = [_placed(one, begin=begin, findings=findings) for one in described]
    sound = [info for info in tensors if info]
    if not findings.count:
        _check_places(sound, alignment=alignment, begin=begin, end=size, findings=findings)
    if findings.count:
        _refuse(path, findings)
    return GGUFFile(path, metadata, {info.name: info for info in sound})


class _Broken(Exception):
    """The header cannot be read on: what comes next would be guessed."""


@dataclass(slots=True)
class _Findings:
    """What is wrong with a file; of a great many the first are kept."""

    shown: list[str] = field(default_factory=list)
    count: int = 0

    def add(self, finding: str) -> None:
        self.count += 1
        if len(self.shown) < _SHOWN:
            self.shown.append(finding)


@dataclass(frozen=True, slots=True)
class _Described:
    """A tensor as the header describes it; its place counts from the start of the data."""

    name: str
    shape: tuple[int, ...]
    type: int
    place: int


@dataclass(slots=True)
class _Header:
    """Reads a header from the front, never past what is left of it."""

    file: IO[bytes]
    left: int
    findings: _Findings
    at: int = 0

    def parse(self) -> tuple[dict[str, Field], list[_Described]]:
        self.begin()
        count_tensors, count_values = self.numbers("QQ")
        self.room(count_tensors, _SHORTEST_TENSOR, "tensors")
        self.room(count_values, _SHORTEST_VALUE, "values of metadata")
        metadata: dict[str, Field] = {}
        for _ in range(count_values):
            key = self.text("a key of the metadata")
            if key in metadata:
                self.findings.add(f"{key[:200]} occurs twice in the metadata")
            metadata[key] = self.field(key[:200])
        self.room(count_tensors, _SHORTEST_TENSOR, "tensors")
        described = [self.tensor() for _ in range(count_tensors)]
        names: set[str] = set()
        for one in described:
            if one.name in names:
                self.findings.add(f"the tensor {one.name[:200]} occurs twice")
            names.add(one.name)
        return metadata, described

    def begin(self) -> None:
        if self.left < 4 or self.take(4) != MAGIC:
            raise _Broken("it does not begin with GGUF, so it is another kind of file")
        (version,) = self.numbers("I")
        if version & 0xFFFF == 0:
            raise _Broken("it is big-endian, which is not read; get a little-endian one")
        if version not in _VERSIONS:
            raise _Broken(f"it is of version {version}; versions 2 and 3 are read")

    def take(self, size: int) -> bytes:
        if size > self.left:
            raise _Broken(
                f"what its header has at byte {self.at:,} takes {size:,} of {self.left:,} left"
            )
        found = self.file.read(size)
        if len(found) < size:
            raise _Broken("it became shorter while it was read")
        self.at += size
        self.left -= size
        return found

    def numbers(self, kinds: str) -> tuple[int, ...]:
        return struct.unpack(f"<{kinds}", self.take(struct.calcsize(f"<{kinds}")))

    def room(self, count: int, each: int, what: str) -> None:
        """What is counted must have room in the file before any of it is made."""
        if count > self.left // each:
            raise _Broken(f"it claims {count:,} {what}, but {self.left:,} bytes of header are left")

    def text(self, what: str) -> str:
        data = self.take(int.from_bytes(self.take(8), "little"))
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            self.findings.add(f"{what} is not UTF-8: {data[:40]!r}")
            return data[:200].decode("utf-8", "replace")

    def field(self, key: str) -> Field:
        (number,) = self.numbers("I")
        if number != GGUFValueType.ARRAY:
            kind = self.kind(number, key)
            if kind == "str":
                return Field(kind, self.text(key))
            return Field(kind, self.values(kind, 1, key)[0].item())
        number, count = self.numbers("IQ")
        if number == GGUFValueType.ARRAY:
            raise _Broken(f"{key} is an array of arrays, which is not read")
        kind = self.kind(number, key)
        if kind != "str":
            return Field(kind, self.values(kind, count, key))
        self.room(count, _SHORTEST_STRING, f"strings in {key}")
        return Field(kind, [self.text(key) for _ in range(count)])

    def kind(self, number: int, key: str) -> str:
        if number not in _KIND_OF:
            raise _Broken(f"{key} has values of an unknown kind, {number}")
        return _KIND_OF[GGUFValueType(number)]

    def values(self, kind: str, count: int, key: str) -> np.ndarray[Any, Any]:
        dtype = NUMBERS[kind]
        self.room(count, dtype.itemsize, f"values in {key}")
        found = np.frombuffer(self.take(count * dtype.itemsize), dtype)
        if kind != "bool":
            return found
        if (found > 1).any():
            self.findings.add(f"{key} is neither true nor false: {found[found > 1][0]}")
        return found != 0

    def tensor(self) -> _Described:
        name = self.text("the name of a tensor")
        (dimensions,) = self.numbers("I")
        if dimensions > _MOST_DIMENSIONS:
            raise _Broken(
                f"{name[:200]} has {dimensions:,} dimensions, more than {_MOST_DIMENSIONS}"
            )
        shape = self.numbers(f"{dimensions}Q")[::-1]
        kind, place = self.numbers("IQ")
        return _Described(name, shape, kind, place)


def _alignment(metadata: dict[str, Field], findings: _Findings) -> int:
    given = metadata.get(Keys.General.ALIGNMENT)
    if given is None:
        return GGUF_DEFAULT_ALIGNMENT
    value = given.value
    if given.kind == "u32" and isinstance(value, int) and value > 0 and value & (value - 1) == 0:
        return value
    findings.add(f"{Keys.General.ALIGNMENT} is no power of two: {str(value)[:40]} ({given.kind})")
    return GGUF_DEFAULT_ALIGNMENT


def _placed(one: _Described, *, begin: int, findings: _Findings) -> TensorInfo | None:
    """The tensor that is described, or None with what is wrong with it."""
    shape, count = one.shape, math.prod(one.shape)
    try:
        kind = GGMLQuantizationType(one.type)
        weights, size = GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError):
        findings.add(f"{one.name[:200]} is of an unknown type, {one.type}")
        return None
    if max(math.prod(size or 1 for size in shape), one.place) > _LARGEST_SIZE:
        findings.add(f"{one.name[:200]} has impossible sizes: {list(shape)} at {one.place}")
        return None
    if (shape[-1] if shape else 1) % weights:
        findings.add(
            f"{one.name[:200]} {list(shape)} has rows of no multiple of {weights}, as {kind.name}"
        )
        return None
    return TensorInfo(one.name, kind.name, shape, begin + one.place, count // weights * size)


def _check_places(
    tensors: list[TensorInfo], *, alignment: int, begin: int, end: int, findings: _Findings
) -> None:
    """Aligned, within the file, and each beside the others."""
    at = begin
    for info in sorted(tensors, key=lambda info: (info.begin, info.size)):
        name, stop = info.name[:200], info.begin + info.size
        if info.begin % alignment:
            findings.add(f"{name} lies at {info.begin:,}, which is no multiple of {alignment:,}")
        if info.begin < at:
            findings.add(f"{name} overlaps what comes before it")
        if stop > end:
            findings.add(f"{name} ends at byte {stop:,} of {end:,}: the file is cut off")
        at = max(at, stop)


def _refuse(path: Path, findings: _Findings) -> NoReturn:
    more = findings.count - len(findings.shown)
    shown = findings.shown + ([f"and {more:,} more"] if more else [])
    raise ModelError(f"{path} is damaged or not a GGUF file; copy or download it again:", shown)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from error


def _shorter(path: Path) -> NoReturn:
    raise ModelError(f"{path} became shorter while it was read; is something writing to it?")

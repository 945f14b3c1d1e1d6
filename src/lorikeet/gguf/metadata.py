"""The values of a GGUF file's metadata: what kinds there are, and a value as bytes.

A value is stored as the number of its kind (uint32) and its bytes, little-endian; a string as its
length (uint64) and UTF-8; an array as the number of its elements' kind, their count (uint64) and
their bytes (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, "File Structure").
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf import GGUFValueType

from lorikeet.errors import ModelError

KINDS: dict[str, GGUFValueType] = {
    "u8": GGUFValueType.UINT8,
    "i8": GGUFValueType.INT8,
    "u16": GGUFValueType.UINT16,
    "i16": GGUFValueType.INT16,
    "u32": GGUFValueType.UINT32,
    "i32": GGUFValueType.INT32,
    "f32": GGUFValueType.FLOAT32,
    "bool": GGUFValueType.BOOL,
    "str": GGUFValueType.STRING,
    "u64": GGUFValueType.UINT64,
    "i64": GGUFValueType.INT64,
    "f64": GGUFValueType.FLOAT64,
}
"""The format's number for each kind of value."""

NUMBERS: dict[str, np.dtype[Any]] = {
    kind: np.dtype("u1" if kind == "bool" else f"<{kind[0]}{int(kind[1:]) // 8}")
    for kind in KINDS
    if kind != "str"
}
"""How each kind but strings lies in a file."""

_ACCEPTED = {"b": "b", "u": "iu", "i": "iu", "f": "iuf"}  # numpy's kinds by our first letter


@dataclass(frozen=True, slots=True, eq=False)
class Field:
    """A value of the metadata.

    Attributes:
        kind: a key of `KINDS`.
        value: an int, float, bool or str; a list, tuple or array of them is an array of that kind.
            As read from a file arrays of strings are lists, others numpy arrays.
    """

    kind: str
    value: Any

    @property
    def is_array(self) -> bool:
        """Whether it holds any number of values rather than one."""
        return isinstance(self.value, (list, tuple, np.ndarray))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Field) or self.is_array != other.is_array:
            return False
        if not self.is_array:
            return (self.kind, self.value) == (other.kind, other.value)
        return self.kind == other.kind and list(self.value) == list(other.value)

    __hash__ = None  # type: ignore[assignment]


def packed(metadata: Mapping[str, Field]) -> bytes:
    """Keys and values as they lie in a file.

    Raises:
        ModelError: values that their kinds cannot hold, with every one.
    """
    found, problems = bytearray(), list[str]()
    for key, field in metadata.items():
        try:
            found += text_bytes(key) + _field_bytes(field)
        except (ValueError, TypeError, OverflowError, struct.error) as error:
            problems.append(f"{key}: {str(field.value)[:60]!r} as {field.kind}: {error}")
    if problems:
        raise ModelError("the metadata cannot be written as GGUF:", problems)
    return bytes(found)


def text_bytes(text: str) -> bytes:
    """A string as it lies in a file."""
    encoded = text.encode("utf-8")
    return struct.pack("<Q", len(encoded)) + encoded


def _field_bytes(field: Field) -> bytes:
    number = struct.pack("<I", KINDS[field.kind])
    if not field.is_array:
        return number + _array_bytes(field.kind, [field.value])
    head = struct.pack("<IIQ", GGUFValueType.ARRAY, KINDS[field.kind], len(field.value))
    return head + _array_bytes(field.kind, field.value)


def _array_bytes(kind: str, values: Any) -> bytes:
    """Values of one kind, one after the other."""
    if kind == "str":
        if not all(isinstance(value, str) for value in values):
            raise TypeError("not a string")
        return b"".join(map(text_bytes, values))
    given = np.asarray(values)
    if given.ndim != 1 or (given.size and given.dtype.kind not in _ACCEPTED[kind[0]]):
        raise TypeError(f"expected a flat list of {kind}")
    stored = given.astype(NUMBERS[kind])
    if kind[0] in "ui" and not np.array_equal(stored, given):
        raise OverflowError("out of range")
    return stored.tobytes()

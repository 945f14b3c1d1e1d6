"""GGUF files with every kind of value, made by the official package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, quants

from lorikeet.gguf.metadata import KINDS, Field

METADATA: dict[str, Field] = {
    "general.architecture": Field("str", "llama"),
    "a.u8": Field("u8", 255),
    "a.i8": Field("i8", -128),
    "a.u16": Field("u16", 65_535),
    "a.i16": Field("i16", -32_768),
    "a.u32": Field("u32", 2**32 - 1),
    "a.i32": Field("i32", -(2**31)),
    "a.f32": Field("f32", 0.5),
    "a.bool": Field("bool", True),
    "a.u64": Field("u64", 2**64 - 1),
    "a.i64": Field("i64", -(2**63)),
    "a.f64": Field("f64", 1e300),
    "a.str": Field("str", "größe\n\0 語"),
    "b.f32": Field("f32", [0.25, float("inf"), -1.5]),
    "b.i32": Field("i32", [1, -2, 3]),
    "b.bool": Field("bool", [True, False]),
    "b.str": Field("str", ["", "▁the", "語"]),
}


def tensors() -> dict[str, np.ndarray[Any, Any]]:
    generator = np.random.default_rng(0)
    return {
        "matrix": generator.standard_normal((6, 64), dtype=np.float32),
        "half": generator.standard_normal((3, 5)).astype(np.float16),
        "vector": generator.standard_normal(7, dtype=np.float32),
        "stack": generator.standard_normal((2, 3, 32), dtype=np.float32),
        "one": np.ones((1,), dtype=np.float32),
    }


def write_official(
    path: Path,
    metadata: dict[str, Field],
    arrays: dict[str, np.ndarray[Any, Any]],
    *,
    quantised: dict[str, tuple[str, np.ndarray[Any, Any]]] | None = None,
) -> None:
    """`quantised`: name -> (type, the float32 weights)."""
    writer = GGUFWriter(path, arch="")
    writer.kv_data[0].clear()
    if "general.alignment" in metadata:
        writer.data_alignment = metadata["general.alignment"].value
    for key, field in metadata.items():
        kind = KINDS[field.kind]
        if field.is_array:
            writer.add_key_value(key, list(field.value), GGUFValueType.ARRAY, sub_type=kind)
        else:
            writer.add_key_value(key, field.value, kind)
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    for name, (kind_name, array) in (quantised or {}).items():
        kind_of_block = GGMLQuantizationType[kind_name]
        data = quants.quantize(array, kind_of_block)
        writer.add_tensor(name, data, raw_dtype=kind_of_block)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_official(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray[Any, Any]]]:
    """Metadata and data as the official reader has them."""
    reader = GGUFReader(path)
    fields = {
        key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")
    }
    return fields, {tensor.name: np.array(tensor.data) for tensor in reader.tensors}

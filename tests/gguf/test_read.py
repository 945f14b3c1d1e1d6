"""The GGUF reader: beside the official package's, and files that do not add up."""

from __future__ import annotations

import resource
import struct
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFEndian, GGUFWriter, quants
from gguf_files import METADATA, tensors, write_official

from lorikeet.errors import ModelError
from lorikeet.gguf.metadata import KINDS, Field
from lorikeet.gguf.read import GGUFFile, open_gguf

QUANTISED = {
    "blocks": ("Q8_0", np.linspace(-1, 1, 4 * 96, dtype=np.float32).reshape(4, 96)),
    "row": ("Q4_0", np.linspace(-1, 1, 64, dtype=np.float32)),
}


@pytest.fixture
def official(tmp_path: Path) -> GGUFFile:
    write_official(tmp_path / "official", METADATA, tensors(), quantised=QUANTISED)
    return open_gguf(tmp_path / "official")


def test_metadata_of_every_kind(official: GGUFFile) -> None:
    assert official.metadata == METADATA
    assert list(official.metadata) == list(METADATA)
    assert set(KINDS) == {field.kind for field in METADATA.values()}


def test_tensors(official: GGUFFile) -> None:
    own = tensors()
    assert list(official.tensors) == [*own, *QUANTISED]
    for name, array in own.items():
        info = official.tensors[name]
        assert (info.shape, info.type) == (array.shape, "F16" if name == "half" else "F32")
        assert b"".join(official.raw(name)) == array.tobytes()
        n = array.shape[0]
        expected = torch.from_numpy(array.astype(np.float32))
        assert torch.equal(official.rows(name, 0, n), expected)
        assert torch.equal(official.rows(name, n // 2, n), expected[n // 2 :])
        assert official.rows(name, 1, 1).shape == (0, *array.shape[1:])


def test_quantised_rows(official: GGUFFile) -> None:
    for name, (kind, array) in QUANTISED.items():
        number = GGMLQuantizationType[kind]
        expected = torch.from_numpy(quants.dequantize(quants.quantize(array, number), number))
        assert official.tensors[name].type == kind
        assert torch.equal(official.rows(name, 1, 3), expected[1:3])


def test_rows_that_are_not_there_are_our_bug(official: GGUFFile) -> None:
    with pytest.raises(ValueError, match="has 6 rows, not rows 5 to 7"):
        official.rows("matrix", 5, 7)


def test_types_that_are_not_decoded_are_copied(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "x", "llama")
    blocks = np.arange(2 * 66, dtype=np.uint8).reshape(2, 66)
    writer.add_tensor("a", blocks, raw_dtype=GGMLQuantizationType.IQ2_XXS)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = open_gguf(tmp_path / "x")
    assert (file.tensors["a"].type, file.tensors["a"].shape) == ("IQ2_XXS", (2, 256))
    assert b"".join(file.raw("a")) == blocks.tobytes()
    with pytest.raises(ModelError, match="IQ2_XXS"):
        file.rows("a", 0, 1)


@pytest.mark.parametrize("alignment", [8, 32, 4096])
def test_any_alignment(tmp_path: Path, alignment: int) -> None:
    writer = GGUFWriter(tmp_path / "x", "llama")
    writer.add_custom_alignment(alignment)
    for name, array in tensors().items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = open_gguf(tmp_path / "x")
    for name, array in tensors().items():
        assert b"".join(file.raw(name)) == array.tobytes()


def test_a_large_vocabulary_is_read_at_once(tmp_path: Path) -> None:
    words = [f"▁word{i}" for i in range(256_000)]
    metadata = {"tokens": Field("str", words), "types": Field("i32", [1] * len(words))}
    write_official(tmp_path / "x", metadata, {})
    before = time.process_time()
    file = open_gguf(tmp_path / "x")
    assert time.process_time() - before < 1
    assert file.metadata == metadata


def header(
    values: list[bytes],
    described: list[bytes],
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    counts: tuple[int, int] | None = None,
) -> bytes:
    count_tensors, count_values = counts or (len(described), len(values))
    start = magic + struct.pack("<IQQ", version, count_tensors, count_values)
    return start + b"".join(values) + b"".join(described)


def text(value: str | bytes) -> bytes:
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data)) + data


def value(key: str | bytes, kind: int, data: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + data


def tensor(
    name: str = "a", *, sizes: tuple[int, ...] = (8,), kind: int = 0, place: int = 0
) -> bytes:
    shape = struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)
    return text(name) + shape + struct.pack("<IQ", kind, place)


def file_of(head: bytes, data: int = 0) -> bytes:
    return head + bytes(-len(head) % 32) + bytes(data)


def damaged(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(ModelError) as caught:
        open_gguf(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


U32, STRING, ARRAY, BOOL = 4, 8, 9, 7
ALIGNMENT = "general.alignment"


def test_the_parts_below_make_a_sound_file(tmp_path: Path) -> None:
    head = header([value("k", STRING, text("v"))], [tensor(), tensor("b", place=32)])
    (tmp_path / "x").write_bytes(file_of(head, 64))
    file = open_gguf(tmp_path / "x")
    assert file.metadata == {"k": Field("str", "v")}
    assert [info.size for info in file.tensors.values()] == [32, 32]


@pytest.mark.parametrize(
    ("head", "data", "named"),
    [
        (b"", 0, "does not begin with GGUF"),
        (b"GGU", 0, "does not begin with GGUF"),
        (header([], [], magic=b"GGML"), 0, "does not begin with GGUF"),
        (header([], [], version=1), 0, "it is of version 1; versions 2 and 3 are read"),
        (header([], [], version=4), 0, "it is of version 4"),
        (header([], [], version=0x03000000), 0, "it is big-endian"),
        (header([], [], counts=(2**63, 0)), 0, "it claims 9,223,372,036,854,775,808 tensors"),
        (header([], [], counts=(0, 2**40)), 0, "it claims 1,099,511,627,776 values of metadata"),
        (header([value("k", 13, b"")], []), 0, "k has values of an unknown kind, 13"),
        (header([value("k", STRING, struct.pack("<Q", 2**63))], []), 0, "takes 9,223,372,"),
        (header([value("k", STRING, text(b"\xff"))], []), 0, "k is not UTF-8"),
        (header([value(b"\xffk", U32, bytes(4))], []), 0, "a key of the metadata is not UTF-8"),
        (header([value("k", BOOL, b"\2")], []), 0, "k is neither true nor false: 2"),
        (header([value("k", U32, bytes(4))] * 2, []), 0, "k occurs twice in the metadata"),
        (
            header([value("k", ARRAY, struct.pack("<IQ", STRING, 2**61))], []),
            0,
            "claims 2,305,843,009,213,693,952 strings in k",
        ),
        (
            header([value("k", ARRAY, struct.pack("<IQ", U32, 2**62))], []),
            0,
            "claims 4,611,686,018,427,387,904 values in k",
        ),
        (
            header([value("k", ARRAY, struct.pack("<IQ", ARRAY, 1))], []),
            0,
            "k is an array of arrays",
        ),
        (header([value(ALIGNMENT, U32, bytes(4))], []), 0, "alignment is no power of two: 0 (u32)"),
        (header([value(ALIGNMENT, U32, b"\x30\0\0\0")], []), 0, "is no power of two: 48"),
        (header([value(ALIGNMENT, STRING, text("32"))], []), 0, "is no power of two: 32 (str)"),
        (header([], [tensor(sizes=(1,) * 5)]), 32, "a has 5 dimensions, more than 4"),
        (header([], [tensor(sizes=())[:-16] + b"\xff" * 20]), 32, "a has 4,294,967,295 dimensions"),
        (header([], [tensor(kind=4)]), 32, "a is of an unknown type, 4"),
        (header([], [tensor(kind=10_000)]), 32, "a is of an unknown type, 10000"),
        (header([], [tensor(sizes=(2**63,))]), 32, "a has impossible sizes"),
        (header([], [tensor(sizes=(2**32, 2**32))]), 32, "a has impossible sizes"),
        (header([], [tensor(sizes=(2**60,))]), 32, "a ends at byte 4,611,686,018,427,387,968 of"),
        (header([], [tensor(sizes=(48,), kind=8)]), 64, "rows of no multiple of 32, as Q8_0"),
        (header([], [tensor(place=4)]), 64, "a lies at 68, which is no multiple of 32"),
        (header([], [tensor(place=2**64 - 32)]), 64, "a has impossible sizes"),
        (header([], [tensor(sizes=(16,)), tensor("b", place=32)]), 64, "b overlaps what comes"),
        (header([], [tensor(), tensor("b")]), 64, "b overlaps what comes before it"),
        (header([], [tensor(), tensor(place=32)]), 64, "the tensor a occurs twice"),
        (header([], [tensor()]), 31, "a ends at byte 96 of 95: the file is cut off"),
    ],
    ids=lambda argument: argument if isinstance(argument, str) else "",
)
def test_files_that_do_not_add_up(tmp_path: Path, head: bytes, data: int, named: str) -> None:
    assert named in damaged(tmp_path / "x", file_of(head, data) if len(head) > 4 else head)


def test_every_finding_is_listed_up_to_a_point(tmp_path: Path) -> None:
    described = [tensor(f"t{i}", kind=999) for i in range(20)]
    message = damaged(tmp_path / "x", file_of(header([value("k", BOOL, b"\3")], described)))
    assert "k is neither true nor false" in message
    assert message.count("unknown type") == 7
    assert "and 13 more" in message


def test_claims_allocate_nothing(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for kind in range(13):
        for count in (2**64 - 1, 2**48, 2**33, 1000):
            claims = value("k", ARRAY, struct.pack("<IQ", kind, count))
            damaged(tmp_path / "x", header([claims], []))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 10_000  # KiB


def test_a_big_endian_file_of_the_official_writer_is_refused(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "x", "llama", endianess=GGUFEndian.BIG)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match="it is big-endian"):
        open_gguf(tmp_path / "x")


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="No such file"):
        open_gguf(tmp_path / "x")


def test_a_file_that_shrinks_meanwhile(official: GGUFFile) -> None:
    content = official.path.read_bytes()
    official.path.write_bytes(content[: official.tensors["row"].begin + 3])
    with pytest.raises(ModelError, match="became shorter"):
        list(official.raw("row"))
    with pytest.raises(ModelError, match="became shorter"):
        official.rows("row", 0, 1)

"""The safetensors format: ours beside the reference implementation, and damaged files."""

from __future__ import annotations

import json
import resource
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from lorikeet.adapters.safe import (
    TORCH,
    Content,
    as_bytes,
    format_name,
    open_safe,
    write_safe,
)
from lorikeet.errors import ModelError


def content(tensor: torch.Tensor) -> Content:
    name = format_name(tensor.dtype)
    assert name is not None
    return Content(name, tuple(tensor.shape), lambda: tensor.split(2) if tensor.dim() else [tensor])


def tensors() -> dict[str, torch.Tensor]:
    """One of every dtype that torch has, and odd shapes."""
    found = {
        name: torch.arange(12).reshape(3, 2, 2).to(torch.float32).to(dtype)
        for name, dtype in TORCH.items()
    }
    return found | {
        "scalar": torch.tensor(3.5),
        "none": torch.empty(0, 4),
        "transposed": torch.randn(5, 3).t(),
        "näme": torch.ones(1, dtype=torch.bool),
    }


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bytes(as_bytes(a)) == bytes(as_bytes(b))


def test_the_reference_reads_ours(tmp_path: Path) -> None:
    path, own = tmp_path / "a.safetensors", tensors()
    done: list[str] = []
    contents = {name: content(tensor) for name, tensor in own.items()}
    write_safe(path, contents, metadata={"format": "pt"}, written=done.append)
    found = load_file(path)
    assert set(found) == set(own) == set(done)
    assert all(same(found[name], own[name]) for name in own)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    for entry in open_safe(path).entries.values():  # aligned, as readers that map files want it
        assert entry.end == entry.begin or entry.begin % (TORCH[entry.dtype].itemsize) == 0


def test_we_read_the_references(tmp_path: Path) -> None:
    path, own = tmp_path / "a.safetensors", {k: t.contiguous() for k, t in tensors().items()}
    save_file(own, path, metadata={"x": "y"})
    file = open_safe(path)
    assert file.metadata == {"x": "y"}
    assert set(file.entries) == set(own)
    for name, tensor in own.items():
        entry = file.entries[name]
        assert (entry.shape, TORCH[entry.dtype]) == (tuple(tensor.shape), tensor.dtype)
        assert b"".join(file.raw(name)) == bytes(as_bytes(tensor))
        if tensor.dim():
            n = tensor.shape[0]
            assert same(file.rows(name, 0, n), tensor)
            assert same(file.rows(name, n // 2, n), tensor[n // 2 :])


def test_the_same_bytes_as_the_reference(tmp_path: Path) -> None:
    own = {"b": torch.randn(2, 3), "a": torch.randn(4), "c": torch.randn(3).bfloat16()}
    save_file(own, tmp_path / "theirs", metadata={"format": "pt"})
    write_safe(
        tmp_path / "ours", {k: content(t) for k, t in own.items()}, metadata={"format": "pt"}
    )
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_tensor_of_another_size_than_announced_is_our_bug(tmp_path: Path) -> None:
    short = Content("F32", (3,), lambda: [torch.zeros(2)])
    with pytest.raises(ValueError, match="a has 8 bytes, not 12"):
        write_safe(tmp_path / "x", {"a": short}, metadata={})


def damaged(path: Path) -> str:
    with pytest.raises(ModelError) as caught:
        open_safe(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def write(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(begin: Any, end: Any, *, shape: Any = (2,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "size", "named"),
    [
        ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "b overlaps what comes before it"),
        ({"a": entry(0, 8), "b": entry(12, 20)}, 20, "b leaves a hole after"),
        ({"a": entry(4, 12)}, 12, "a leaves a hole after"),
        ({"a": entry(0, 8)}, 7, "it is cut off"),
        ({"a": entry(0, 8)}, 9, "1 bytes at its end belong to no tensor"),
        ({"a": entry(0, 4)}, 4, "a: F32 [2] has 64 bits, but 32 are set aside"),
        ({"a": entry(8, 0)}, 8, "a: data_offsets is no pair"),
        ({"a": entry(-8, 0)}, 8, "a: data_offsets is no pair"),
        ({"a": entry(0, 8.0)}, 8, "a: data_offsets is no pair"),
        ({"a": entry(0, 8, shape=[True, 2])}, 8, "a: shape is no list"),
        ({"a": entry(0, 8, shape=[1] * 65)}, 8, "a: shape is no list"),
        ({"a": entry(0, 8, shape=[-1, -2])}, 8, "a: shape is no list"),
        ({"a": entry(0, 8, shape=[2**62, 2**62])}, 8, "a: F32 [4611686018427387904, 46"),
        ({"a": entry(0, 8, dtype="F31")}, 8, "a: unknown dtype 'F31'"),
        ({"a": entry(0, 8, dtype=["F32"])}, 8, "a: unknown dtype"),
        ({"a": 3}, 8, "a: expected an object"),
        ({"__metadata__": {"a": 1}}, 0, "__metadata__ does not map strings to strings"),
        ([], 0, "its header is a list"),
        (b"{", 0, "its header is not JSON"),
        (b'{"\xff": 1}', 0, "its header is not JSON"),
        (b"[" * 100_000, 0, "its header is not JSON"),
        (b'{"a": 1, "a": 2}', 0, "a name occurs twice"),
    ],
)
def test_headers_that_do_not_add_up(tmp_path: Path, header: Any, size: int, named: str) -> None:
    assert named in damaged(write(tmp_path / "x", header, bytes(size)))


@pytest.mark.parametrize("content", [b"", b"\x01", bytes(7)])
def test_files_without_a_header(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    assert "not a safetensors file" in damaged(tmp_path / "x")


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 2**40, 3])
def test_a_header_longer_than_the_file_allocates_nothing(tmp_path: Path, length: int) -> None:
    (tmp_path / "x").write_bytes(struct.pack("<Q", length) + b"{}")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "claims a header of" in damaged(tmp_path / "x")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 10_000  # KiB


def test_every_finding_is_listed_up_to_a_point(tmp_path: Path) -> None:
    header = {f"t{i}": entry(0, 8, dtype="?") for i in range(20)}
    message = damaged(write(tmp_path / "x", header, bytes(8)))
    assert message.count("unknown dtype") == 8
    assert "and 12 more" in message


def test_a_missing_file(tmp_path: Path) -> None:
    assert "No such file" in damaged(tmp_path / "x")


def test_a_file_that_shrinks_meanwhile(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(10, 10)}, tmp_path / "x")
    file = open_safe(tmp_path / "x")
    (tmp_path / "x").write_bytes((tmp_path / "x").read_bytes()[:-1])
    with pytest.raises(ModelError, match="became shorter"):
        list(file.raw("a"))
    with pytest.raises(ModelError, match="became shorter"):
        file.rows("a", 9, 10)


def _sound() -> bytes:
    own = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4).bfloat16()}
    from safetensors.torch import save

    return save(own)


SOUND = _sound()


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, len(SOUND) - 1), st.integers(0, 255)), max_size=4),
    st.integers(0, len(SOUND)),
)
@example([], len(SOUND))
def test_a_damaged_file_is_our_error_or_the_references_tensors(
    tmp_path_factory: pytest.TempPathFactory, flips: list[tuple[int, int]], kept: int
) -> None:
    """Whatever is flipped or cut: refused, or read as the reference implementation reads it."""
    data = bytearray(SOUND)
    for place, value in flips:
        data[place] = value
    path = tmp_path_factory.getbasetemp() / "fuzzed"
    path.write_bytes(bytes(data[:kept]))
    try:
        file = open_safe(path)
    except ModelError as error:
        assert str(path) in str(error)
        return
    try:
        theirs = load_file(path)
    except SafetensorError as error:
        pytest.fail(f"the reference refuses it: {error}")
    assert {name: bytes(as_bytes(t)) for name, t in theirs.items()} == {
        name: b"".join(file.raw(name)) for name in file.entries
    }


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["F32", "U8", ""]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["a", "dtype", "shape", "data_offsets", "__metadata__"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), _VALUES), st.integers(0, 40))
def test_any_json_is_answered(
    tmp_path_factory: pytest.TempPathFactory, header: dict[str, Any], size: int
) -> None:
    path = write(tmp_path_factory.getbasetemp() / "json", header, bytes(size))
    try:
        file = open_safe(path)
    except ModelError:
        return
    assert sum(e.end - e.begin for e in file.entries.values()) == size

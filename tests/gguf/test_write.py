"""The GGUF writer: beside the official package's, on a full disk, and killed in the middle."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from gguf_files import METADATA, read_official, tensors, write_official
from torch import Tensor

from lorikeet.errors import ModelError, StorageError
from lorikeet.gguf.metadata import Field
from lorikeet.gguf.read import open_gguf
from lorikeet.gguf.write import Stored, write_gguf

WEIGHTS = np.linspace(-1, 1, 4 * 96, dtype=np.float32).reshape(4, 96)
BLOCKS = quants.quantize(WEIGHTS, GGMLQuantizationType.Q8_0)


def stored(array: np.ndarray[Any, Any]) -> Stored:
    """Row by row, first as a tensor, then as bytes."""

    def blocks() -> Iterator[Tensor | bytes]:
        yield torch.from_numpy(array[:1].copy())
        yield array[1:].tobytes()

    return Stored("F16" if array.dtype == np.float16 else "F32", array.shape, blocks)


def contents() -> dict[str, Stored]:
    own = {name: stored(array) for name, array in tensors().items()}
    own["blocks"] = Stored("Q8_0", WEIGHTS.shape, lambda: [torch.from_numpy(BLOCKS)])
    return own


def test_the_same_bytes_as_the_official_writer(tmp_path: Path) -> None:
    done: list[str] = []
    write_gguf(tmp_path / "ours", METADATA, contents(), written=done.append)
    write_official(
        tmp_path / "theirs", METADATA, tensors(), quantised={"blocks": ("Q8_0", WEIGHTS)}
    )
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert done == [*tensors(), "blocks"]


def test_the_official_reader_reads_ours(tmp_path: Path) -> None:
    write_gguf(tmp_path / "x", METADATA, contents())
    fields, arrays = read_official(tmp_path / "x")
    expected = {key: field.value for key, field in METADATA.items()}
    assert fields == expected
    assert np.array_equal(arrays.pop("blocks"), BLOCKS)
    for name, array in tensors().items():
        assert np.array_equal(arrays[name], array)


def test_what_is_read_can_be_written(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a", METADATA, contents())
    file = open_gguf(tmp_path / "a")
    again = {
        name: Stored(info.type, info.shape, lambda name=name: file.raw(name))
        for name, info in file.tensors.items()
    }
    write_gguf(tmp_path / "b", file.metadata, again)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_empty_values_and_another_alignment(tmp_path: Path) -> None:
    metadata = {
        "general.alignment": Field("u32", 256),
        "text": Field("str", ""),
        "texts": Field("str", []),
        "numbers": Field("f64", np.empty(0)),
    }
    write_gguf(tmp_path / "x", metadata, contents())
    file = open_gguf(tmp_path / "x")
    assert file.metadata == metadata
    assert all(info.begin % 256 == 0 for info in file.tensors.values())
    assert b"".join(file.raw("vector")) == tensors()["vector"].tobytes()


def test_values_that_do_not_fit_are_all_named(tmp_path: Path) -> None:
    metadata = {
        "good": Field("u32", 1),
        "large": Field("u32", 2**32),
        "negative": Field("u8", -1),
        "fraction": Field("i32", 0.5),
        "word": Field("f32", "1"),
        "number": Field("str", 1),
        "truth": Field("bool", 1),
        "mixed": Field("str", ["a", 1]),
        "nested": Field("i32", [[1]]),
        "huge": Field("u64", [2**64]),
    }
    with pytest.raises(ModelError) as caught:
        write_gguf(tmp_path / "x", metadata, {})
    named = {problem.split(":")[0] for problem in caught.value.problems}
    assert named == set(metadata) - {"good"}
    assert list(tmp_path.iterdir()) == []


def test_tensors_that_do_not_fit_are_all_named(tmp_path: Path) -> None:
    def none() -> list[bytes]:
        return []

    bad = {
        "n" * 64: Stored("F32", (1,), none),
        "rows": Stored("Q8_0", (32, 48), none),
        "deep": Stored("F32", (1, 1, 1, 1, 1), none),
    }
    with pytest.raises(ModelError) as caught:
        write_gguf(tmp_path / "x", {}, bad)
    assert {problem.split(":")[0] for problem in caught.value.problems} == set(bad)


def test_a_tensor_of_another_size_than_announced_is_our_bug(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("before")
    short = Stored("F32", (3,), lambda: [torch.zeros(2)])
    with pytest.raises(ValueError, match="a has 8 bytes, not 12"):
        write_gguf(tmp_path / "x", {}, {"a": short})
    assert (tmp_path / "x").read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_leaves_what_was_there(tmp_path: Path, error: type[BaseException]) -> None:
    (tmp_path / "x").write_text("before")

    def interrupted() -> Iterator[Tensor]:
        yield torch.zeros(2)
        raise error

    with pytest.raises(error):
        write_gguf(tmp_path / "x", {}, {"a": Stored("F32", (4,), interrupted)})
    assert (tmp_path / "x").read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_folder_of_that_name_is_refused_before_the_work(tmp_path: Path) -> None:
    def never() -> list[Tensor]:
        raise AssertionError("nothing should be encoded")

    with pytest.raises(StorageError, match="Is a directory"):
        write_gguf(tmp_path, {}, {"a": Stored("F32", (4,), never)})


IN_A_CHILD = """
import sys, resource, time, torch
from pathlib import Path
from lorikeet.gguf.write import Stored, write_gguf

def blocks():
    for _ in range(16):
        yield torch.zeros(1 << 16)
    print("halfway", flush=True)
    {halfway}
    for _ in range(16):
        yield torch.zeros(1 << 16)

{before}
write_gguf(Path(sys.argv[1]), {{}}, {{"a": Stored("F32", (1 << 21,), blocks)}})
"""


def child(path: Path, *, before: str = "", halfway: str = "") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", IN_A_CHILD.format(before=before, halfway=halfway), str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def test_a_full_disk(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("before")
    limit = (
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (6 << 20, 6 << 20))"
    )
    _, complaint = child(tmp_path / "x", before=limit).communicate(timeout=60)
    assert "StorageError: cannot write" in complaint
    assert "free some space" in complaint
    assert (tmp_path / "x").read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_kill_in_the_middle_and_the_next_attempt(tmp_path: Path) -> None:
    with child(tmp_path / "x", halfway="time.sleep(60)") as process:
        assert process.stdout
        assert process.stdout.readline() == "halfway\n"
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
    assert not (tmp_path / "x").exists()
    write_gguf(tmp_path / "x", {}, {"a": Stored("F32", (4,), lambda: [torch.zeros(4)])})
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert torch.equal(open_gguf(tmp_path / "x").rows("a", 0, 4), torch.zeros(4))

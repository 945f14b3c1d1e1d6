"""Atomic writes: the old content or the new one, whatever goes wrong."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models

from lorikeet.errors import StorageError
from lorikeet.files import atomic_folder, disk_errors, remove_drafts, write_json, write_text

resource = pytest.importorskip("resource", reason="needs Unix limits")


@contextmanager
def full_disk() -> Iterator[None]:
    """No file of this process may grow; Python ignores the signal that comes with it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def put(folder: Path, text: str) -> None:
    with atomic_folder(folder) as draft:
        (draft / "file").write_text(text)


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b"
    put(target, "one")
    with atomic_folder(target) as draft:
        assert (target / "file").read_text() == "one"
        assert draft.parent == target.parent  # a rename within one file system
        (draft / "other").write_text("two")
    assert names(target) == ["other"]
    assert names(target.parent) == ["b"]
    assert target.stat().st_mode & 0o777 == 0o755


def test_an_error_inside_leaves_the_old_folder(tmp_path: Path) -> None:
    put(tmp_path / "a", "one")
    with pytest.raises(KeyError), atomic_folder(tmp_path / "a") as draft:
        (draft / "file").write_text("two")
        raise KeyError
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a" / "file").read_text() == "one"


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.txt"
    write_text(path, "one")
    write_text(path, "zwei äöü\n")
    assert path.read_text(encoding="utf-8") == "zwei äöü\n"
    assert names(path.parent) == ["file.txt"]
    write_json(path, {"a": ["ü", 1.5]})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": ["ü", 1.5]}
    assert "ü" in path.read_text(encoding="utf-8")


def test_a_full_disk_leaves_the_old_content(tmp_path: Path) -> None:
    put(tmp_path / "a", "one")
    write_text(tmp_path / "file", "one")
    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    with full_disk():
        with pytest.raises(StorageError, match=r"cannot write .*a: File too large; free some sp"):
            put(tmp_path / "a", "two")
        with pytest.raises(StorageError, match="nothing that was there before is lost"):
            write_text(tmp_path / "file", "two")
        with (
            pytest.raises(StorageError, match="File too large; free"),
            atomic_folder(tmp_path / "a") as draft,
        ):
            save_file({"x": torch.zeros(9)}, draft / "x.safetensors")
        with (
            pytest.raises(StorageError, match="File too large; free"),
            atomic_folder(tmp_path / "a") as draft,
        ):
            tokenizer.save(str(draft / "tokenizer.json"))
    assert names(tmp_path) == ["a", "file"]
    assert (tmp_path / "a" / "file").read_text() == "one"
    assert (tmp_path / "file").read_text() == "one"


def test_a_replacement_that_fails_half_way_is_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "a", "one")
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if path.suffix == ".part":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(StorageError, match="nothing that was there before is lost"):
        put(tmp_path / "a", "two")
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a" / "file").read_text() == "one"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_advice_for_a_full_disk(tmp_path: Path, number: int) -> None:
    with pytest.raises(StorageError, match="free some space"), disk_errors(tmp_path / "x"):
        raise OSError(number, os.strerror(number))
    with pytest.raises(StorageError, match="Permission denied; check"), disk_errors(tmp_path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="check the folder"):
        put(tmp_path / "file" / "a", "one")
    with pytest.raises(StorageError):
        write_text(tmp_path / "file" / "a", "one")


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="a bug"), disk_errors(tmp_path):
        raise RuntimeError("a bug")
    original = StorageError("said already")
    with pytest.raises(StorageError) as caught, disk_errors(tmp_path):
        raise original
    assert caught.value is original


def test_a_kill_before_the_first_rename(tmp_path: Path) -> None:
    put(tmp_path / "a", "one")
    draft = tmp_path / ".a.k3_x9q1z.part"
    draft.mkdir()
    (draft / "file").write_text("half")
    (tmp_path / ".config.yaml.part").write_text("half")
    remove_drafts(tmp_path)
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a" / "file").read_text() == "one"


def test_a_kill_between_the_renames_brings_the_old_folder_back(tmp_path: Path) -> None:
    for name, text in ((".step-01.k3_x9q1z.old", "one"), (".step-01.k3_x9q1z.part", "two")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(text)
    remove_drafts(tmp_path)
    assert names(tmp_path) == ["step-01"]
    assert (tmp_path / "step-01" / "file").read_text() == "one"


def test_a_kill_after_the_renames_keeps_the_new_folder(tmp_path: Path) -> None:
    put(tmp_path / "a", "two")
    old = tmp_path / ".a.k3_x9q1z.old"
    old.mkdir()
    (old / "file").write_text("one")
    remove_drafts(tmp_path)
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a" / "file").read_text() == "two"


def test_hidden_files_of_others_stay(tmp_path: Path) -> None:
    (tmp_path / ".gitignore").write_text("*")
    remove_drafts(tmp_path)
    assert names(tmp_path) == [".gitignore"]

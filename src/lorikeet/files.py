"""Atomic writes: a reader finds the old content or the new one, never half of either."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lorikeet.errors import StorageError

if sys.platform != "win32":
    import fcntl

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_RUST_REASON = re.compile(r"([^:]+) \(os error (\d+)\)")


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn the system's refusal to write below `path` into a `StorageError`."""
    try:
        yield
    except Exception as error:
        refusal = _refusal(error)
        if refusal is None:
            raise
        number, reason = refusal
        advice = "free some space" if number in _DISK_FULL else "check the folder"
        raise StorageError(
            f"cannot write {path}: {reason}; {advice} and run the same command again"
            " (nothing that was there before is lost)"
        ) from error


def _refusal(error: Exception) -> tuple[int | None, str] | None:
    """Number and words of the system's error, or None for an error of another kind.

    safetensors and tokenizers, which are Rust, raise exceptions of their own with both in the text.
    """
    if isinstance(error, StorageError):
        return None
    if isinstance(error, OSError):
        return error.errno, error.strerror or str(error)
    found = _RUST_REASON.search(str(error))
    return (int(found[2]), found[1].strip()) if found else None


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path` that replaces it when the block ends well.

    The files are flushed to disk before the rename. On an error the temporary folder is removed
    and `path` stays as it was.

    Raises:
        StorageError: the disk refused a write.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
    try:
        with disk_errors(path):
            yield draft
            for file in draft.rglob("*"):
                if file.is_file():
                    _sync(file)
            _sync(draft)
            draft.chmod(0o755)
            _replace_folder(draft, path)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _replace_folder(draft: Path, path: Path) -> None:
    """Rename `draft` to `path`; an old folder is moved aside first and removed last."""
    if not path.exists():
        draft.rename(path)
    else:
        old = draft.with_suffix(".old")
        path.rename(old)
        try:
            draft.rename(path)
        except OSError:
            old.rename(path)
            raise
        shutil.rmtree(old, ignore_errors=True)
    _sync(path.parent)


def _sync(path: Path) -> None:
    if os.name == "nt":  # Windows flushes neither folders nor files that are open for reading
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield the path of a draft that replaces the file `path` when the block ends well.

    The draft is flushed to disk before the rename. On an error it is removed and `path` stays as it
    was; after a kill the next attempt writes over it. Folders are made where needed.

    Raises:
        StorageError: the disk refused a write, or `path` is a folder.
    """
    draft = path.with_name(f".{path.name}.part")
    with disk_errors(path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield draft
            _sync(draft)
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
        _sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, making its folder where needed.

    Raises:
        StorageError: the disk refused the write.
    """
    with atomic_file(path) as draft:
        draft.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def only_here(folder: Path) -> Iterator[None]:
    """Within the block no other process that asks can work in `folder`, which is made if needed.

    The system gives the lock back when the process ends, however it does. Without such locks
    (Windows) nothing is checked.

    Raises:
        StorageError: another process holds it, or the disk refused.
    """
    if sys.platform == "win32":
        yield
        return
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w", encoding="ascii")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StorageError(
                f"another process is at work in {folder}; wait for it, or choose another folder"
            ) from None
        yield


def remove_drafts(folder: Path) -> None:
    """Remove what an interrupted `atomic_folder` or `write_text` left in `folder`.

    A kill between the two renames of a replacement leaves the old content under `.old`: it is put
    back first when nothing stands in its place.
    """
    for old in folder.glob(".*.old"):
        target = folder / old.name[1:].rsplit(".", 2)[0]
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(target)
    for draft in folder.glob(".*.part"):
        if draft.is_dir():
            shutil.rmtree(draft, ignore_errors=True)
        else:
            draft.unlink(missing_ok=True)

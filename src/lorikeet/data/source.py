"""A path or a hub id -> rows with their origins and a hash of what was read.

A local path never touches the network. The hub is asked only for a name that looks like
`org/name`, when nothing of that name lies on the disk.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import date, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

from lorikeet import hub
from lorikeet.data.formats import READERS, Numbered
from lorikeet.errors import DataError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Rows:
    """What was read, before anyone asks what the columns mean.

    Attributes:
        name: file name or hub id.
        rows: one dict per row, column to value.
        origins: where each row came from, such as `dolly.jsonl:12` (line, or 1-based row).
        sha256: hash of the rows as canonical JSON: the same for the same rows in any container.
        format: jsonl, json, csv, parquet, txt or hub.
    """

    name: str
    rows: list[dict[str, Any]]
    origins: list[str]
    sha256: str
    format: str


def read_rows(
    path: str, *, split: str = "train", limit: int | None = None, revision: str | None = None
) -> Rows:
    """Read a jsonl, json, csv, parquet or txt file, or a hub data set.

    Args:
        path: a file, or a hub id `org/name`.
        split: split of a hub data set; files have none.
        limit: the first N rows only, in file order.
        revision: branch, tag or commit of a hub data set.

    Raises:
        DataError: nothing there, nothing in it, or not readable; every bad line at once.
    """
    if not path:
        raise DataError("no data given: expected a file (--data rows.jsonl) or a hub data set")
    file = Path(path).expanduser()
    if file.exists():
        return _read_file(file, limit=limit)
    if _HUB_ID.fullmatch(path) and file.suffix.lower() not in READERS:
        return _read_hub(path, split=split, limit=limit, revision=revision)
    raise DataError(_missing(file))


def _read_file(file: Path, *, limit: int | None) -> Rows:
    suffix = file.suffix.lower()
    if file.is_dir():
        inside = sorted(entry.name for entry in file.iterdir() if entry.suffix.lower() in READERS)
        found = f"; it holds {', '.join(inside[:5])}" if inside else ""
        raise DataError(f"{file} is a folder, expected a data file{found}")
    if suffix not in READERS:
        known = ", ".join(READERS)
        raise DataError(
            f"{file}: the format {suffix or 'without an ending'} is not known ({known})"
        )
    try:
        if file.stat().st_size == 0:
            raise DataError(f"{file} is empty")
        numbered = READERS[suffix](file, limit)
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}") from error
    return _rows(file.name, numbered, format=suffix[1:].replace("ndjson", "jsonl"))


def _read_hub(name: str, *, split: str, limit: int | None, revision: str | None) -> Rows:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"there is no file {name}; reading it as a hub data set needs the library datasets:"
            " pip install 'lorikeet[hub]'"
        ) from error
    unreachable = hub.unreachable()
    try:  # datasets never runs a data set's own code since 4.0, the version that we ask for
        with _cache_only(datasets.config) if unreachable else nullcontext():
            data = datasets.load_dataset(name, split=split, revision=revision)
    except Exception as error:  # it raises a dozen kinds, all of them about this name or the line
        reason = f"{unreachable}, and it is not in the cache" if unreachable else error
        raise DataError(
            f"there is no file {name}, and the hub data set {name} (split {split})"
            f" cannot be loaded: {reason}"
        ) from error
    if limit is not None:
        data = data.select(range(min(limit, len(data))))
    return _rows(name, list(enumerate(data, 1)), format="hub")


@contextmanager
def _cache_only(settings: Any) -> Iterator[None]:
    """Within the block datasets asks its cache without waiting for the hub first."""
    before = settings.HF_HUB_OFFLINE
    settings.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        settings.HF_HUB_OFFLINE = before


def _rows(name: str, numbered: Sequence[Numbered], *, format: str) -> Rows:
    if not numbered:
        raise DataError(f"{name} holds no rows")
    rows = [row for _, row in numbered]
    whole_file = format == "txt"
    origins = [name if whole_file else f"{name}:{number}" for number, _ in numbered]
    return Rows(name=name, rows=rows, origins=origins, sha256=_sha256(rows), format=format)


def _sha256(rows: Sequence[dict[str, Any]]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        text = json.dumps(row, sort_keys=True, separators=(",", ":"), default=_canonical)
        digest.update(text.encode() + b"\n")
    return digest.hexdigest()


def _canonical(value: object) -> str:
    """What JSON lacks; for anything that is no plain value only the type, which is stable."""
    plain = isinstance(value, (date, time, timedelta, Decimal, bytes))
    return str(value) if plain else type(value).__name__


def _missing(file: Path) -> str:
    if not file.parent.is_dir():
        return f"there is no file {file}: the folder {file.parent} does not exist"
    names = [entry.name for entry in file.parent.iterdir()]
    close = difflib.get_close_matches(file.name, names, n=3)
    hint = f"; did you mean {' or '.join(close)}?" if close else f" (looked in {file.parent})"
    return f"there is no file {file}{hint}"

"""File formats -> numbered rows: one reader per format, all problems of a file in one error.

A reader returns pairs (number, row): the line in a jsonl or csv file, the 1-based index elsewhere.
What the columns mean is not known here.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lorikeet.errors import DataError

Numbered = tuple[int, Any]
Reader = Callable[[Path, "int | None"], "list[Numbered]"]

_SHOWN = 10
_LIST_KEYS = ("data", "rows", "train")


def first_problems(problems: Sequence[str]) -> list[str]:
    """Keep the first 10 problems and say how many more there are."""
    more = len(problems) - _SHOWN
    return [*problems[:_SHOWN], *([f"... and {more} more"] if more > 0 else [])]


def kind_of(value: object) -> str:
    """Name a value's JSON type as a sentence would: `a list`, `a number`, `null`."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    names: dict[type, str] = {
        str: "text",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), type(value).__name__)


def read_jsonl(path: Path, limit: int | None) -> list[Numbered]:
    """Read one JSON object a line; blank lines are skipped; stops after `limit` rows.

    Raises:
        DataError: with every line that is not a JSON object, or not UTF-8.
    """
    rows: list[Numbered] = []
    problems: list[str] = []
    for number, line in _lines(path):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            problems.append(f"line {number}: {_json_reason(error)}")
            continue
        if isinstance(row, dict):
            rows.append((number, row))
        else:
            problems.append(f"line {number}: expected an object {{...}}, found {kind_of(row)}")
        if len(rows) == limit:
            break
    if problems:
        noun = "line is" if len(problems) == 1 else "lines are"
        raise DataError(f"{path}: {len(problems)} {noun} not a row", first_problems(problems))
    return rows


def read_json(path: Path, limit: int | None) -> list[Numbered]:
    """Read a list of objects, or an object that holds one list (`data`, `rows`, `train`).

    Raises:
        DataError: not JSON, no such list, or entries that are not objects.
    """
    text = _read_text(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        hint = "; one object a line is called .jsonl" if text.lstrip().startswith("{") else ""
        raise DataError(f"{path}: {_json_reason(error)}{hint}") from error
    rows = list(enumerate(_list_in(content, path), 1))[:limit]
    problems = [
        f"row {number}: expected an object, found {kind_of(row)}"
        for number, row in rows
        if not isinstance(row, dict)
    ]
    if problems:
        raise DataError(f"{path}: some rows are not objects", first_problems(problems))
    return rows


def read_csv(path: Path, limit: int | None) -> list[Numbered]:
    """Read comma-separated values with a header; quoted fields may hold newlines.

    Raises:
        DataError: a broken quote, a header with doubled names, or rows of another length.
    """
    records = _csv_records(path)
    _, header = next(records, (0, []))
    doubled = sorted({name for name in header if header.count(name) > 1})
    if doubled:
        raise DataError(f"{path}: the header names a column twice: {', '.join(doubled)}")
    rows: list[Numbered] = []
    problems: list[str] = []
    for number, fields in records:
        if len(fields) == len(header):
            rows.append((number, dict(zip(header, fields, strict=True))))
        else:
            problems.append(
                f"line {number}: {len(fields)} fields, the header has {len(header)}"
                " (a field with a comma needs quotes)"
            )
        if len(rows) == limit:
            break
    if problems:
        raise DataError(f"{path}: some rows do not fit the header", first_problems(problems))
    return rows


def read_parquet(path: Path, limit: int | None) -> list[Numbered]:
    """Read a parquet file with pyarrow.

    Raises:
        DataError: pyarrow is missing, or cannot read the file.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"{path} needs pyarrow: pip install 'lorikeet[parquet]'") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            rows = file.read().slice(0, limit).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable parquet file: {error}") from error
    return list(enumerate(rows, 1))


def read_txt(path: Path, limit: int | None) -> list[Numbered]:
    """Read a whole text file as one row with the column `text`, line ends as they are."""
    del limit  # one file is one row
    return [(1, {"text": _read_text(path)})]


READERS: dict[str, Reader] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".parquet": read_parquet,
    ".txt": read_txt,
}


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Non-blank lines with their numbers; split at line feeds alone: JSON may hold U+2028."""
    offset = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            line = _decode(raw, path, offset=offset)
            offset += len(raw)
            if number == 1:
                line = line.removeprefix("\ufeff")
            if line.strip():
                yield number, line.rstrip("\r\n")


def _read_text(path: Path) -> str:
    return _decode(path.read_bytes(), path).removeprefix("\ufeff")


def _decode(raw: bytes, path: Path, *, offset: int = 0) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        utf16 = offset == 0 and raw[:2] in (b"\xff\xfe", b"\xfe\xff")
        raise DataError(
            f"{path} is not UTF-8: byte 0x{raw[error.start]:02x} at offset {offset + error.start}"
            f"{' (it looks like UTF-16)' if utf16 else ''}; save the file as UTF-8"
        ) from error


def _json_reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        place = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}"
        return f"not JSON: {error.msg} ({place})"
    if isinstance(error, RecursionError):
        return "not readable as JSON: nested too deeply"
    return f"not JSON: {error}"


def _list_in(content: object, path: Path) -> list[Any]:
    if isinstance(content, list):
        return content
    lists = {}
    if isinstance(content, dict):
        lists = {key: value for key, value in content.items() if isinstance(value, list)}
    known = [key for key in _LIST_KEYS if key in lists] or (list(lists) if len(lists) == 1 else [])
    if not known:
        found = f"lists under {', '.join(lists)}" if lists else kind_of(content)
        raise DataError(
            f"{path}: expected a list of rows, or an object with one list under"
            f" {', '.join(_LIST_KEYS)}; found {found}"
        )
    return lists[known[0]]


def _csv_records(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Records with the line that each starts on; the header first."""
    reader = csv.reader(io.StringIO(_read_text(path), newline=""), strict=True)
    limit = csv.field_size_limit(2**31 - 1)  # the default refuses documents over 128 KiB
    try:
        line = 1
        for fields in reader:
            if fields:
                yield line, fields
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path}: the record that starts on line {line} is not CSV: {error}"
        ) from error
    finally:
        csv.field_size_limit(limit)

"""Reading: every format gives the same rows and hash; every bad file says what is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lorikeet.data import source
from lorikeet.data.source import read_rows
from lorikeet.errors import DataError

ROWS = [
    {"instruction": "Line one\nline two", "response": 'He said "hi", twice'},
    {"instruction": "café \u2028 🎉 日本", "response": "naïve\r\nend"},
]


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def jsonl(rows: list[object]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def as_csv() -> str:
    def quoted(text: str) -> str:
        return '"' + text.replace('"', '""') + '"'

    lines = [",".join(map(quoted, row.values())) for row in ROWS]
    return "instruction,response\r\n" + "\r\n".join(lines) + "\r\n"


def test_the_container_does_not_change_rows_or_hash(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    arrow = pytest.importorskip("pyarrow")
    parquet.write_table(arrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    paths = [
        write(tmp_path / "a.jsonl", jsonl(ROWS)),
        write(tmp_path / "bom.jsonl", "\ufeff" + jsonl(ROWS).replace("\n", "\r\n") + "\n\n"),
        write(tmp_path / "a.json", json.dumps(ROWS)),
        write(tmp_path / "b.json", json.dumps({"version": 1, "data": ROWS})),
        write(tmp_path / "c.json", json.dumps({"entries": ROWS})),
        write(tmp_path / "a.csv", as_csv()),
        write(tmp_path / "bom.csv", "\ufeff" + as_csv()),
        str(tmp_path / "a.parquet"),
    ]
    read = [read_rows(path) for path in paths]
    assert all(one.rows == ROWS for one in read)
    assert len({one.sha256 for one in read}) == 1
    assert [one.format for one in read] == ["jsonl"] * 2 + ["json"] * 3 + ["csv"] * 2 + ["parquet"]


def test_origins_are_lines_or_row_numbers(tmp_path: Path) -> None:
    lines = write(tmp_path / "a.jsonl", "\n" + jsonl(ROWS[:1]) + "\n" + jsonl(ROWS[1:]))
    assert read_rows(lines).origins == ["a.jsonl:2", "a.jsonl:4"]
    table = read_rows(write(tmp_path / "a.csv", as_csv()))
    assert table.origins == ["a.csv:2", "a.csv:4"]  # the first record covers two lines
    assert read_rows(write(tmp_path / "a.json", json.dumps(ROWS))).origins[1] == "a.json:2"


def test_txt_is_one_row_as_it_is(tmp_path: Path) -> None:
    rows = read_rows(write(tmp_path / "a.txt", "one\r\ntwo\n\nthree"), limit=1)
    assert rows.rows == [{"text": "one\r\ntwo\n\nthree"}]
    assert rows.origins == ["a.txt"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_limit_takes_the_first_rows_and_changes_the_hash(tmp_path: Path, name: str) -> None:
    content = {"a.jsonl": jsonl(ROWS), "a.json": json.dumps(ROWS), "a.csv": as_csv()}[name]
    path = write(tmp_path / name, content)
    limited = read_rows(path, limit=1)
    assert limited.rows == ROWS[:1]
    assert limited.sha256 != read_rows(path).sha256
    assert read_rows(path, limit=2).sha256 == read_rows(path).sha256


def test_limit_stops_before_bad_lines_that_are_not_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", jsonl(ROWS[:1]) + "broken\n")
    assert len(read_rows(path, limit=1).rows) == 1


def test_all_bad_lines_in_one_error(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"a": 1}\n{"a": \n[1]\n' + "nonsense\n" * 12)
    with pytest.raises(DataError, match="14 lines are not a row") as caught:
        read_rows(path)
    problems = caught.value.problems
    assert len(problems) == 11
    assert problems[0].startswith("line 2: not JSON: Expecting value (column")
    assert problems[1] == "line 3: expected an object {...}, found a list"
    assert problems[-1] == "... and 4 more"


BAD_FILES = {
    "empty.jsonl": ("", "is empty"),
    "blank.jsonl": ("\n \n", "holds no rows"),
    "header.csv": ("a,b\n", "holds no rows"),
    "list.json": ("[]", "holds no rows"),
    "latin.jsonl": ('{"a": "ok"}\n{"a": "caf\xe9"}\n'.encode("latin-1"), "byte 0xe9 at offset 22"),
    "wide.csv": ("a,b\n".encode("utf-16"), "looks like UTF-16"),
    "deep.jsonl": ("[" * 100_000, "nested too deeply"),
    "rows.json": ("[{}, 3, null]", "row 2: expected an object, found a number"),
    "lines.json": ('{"a": 1}\n{"a": 2}\n', "one object a line is called .jsonl"),
    "lists.json": ('{"x": [], "y": []}', "found lists under x, y"),
    "number.json": ("3", "found a number"),
    "quote.csv": ('a,b\n"x,y\n', "record that starts on line 2 is not CSV"),
    "short.csv": ("a,b\n1,2\n3\n", "line 3: 1 fields, the header has 2"),
    "twice.csv": ("a,a\n1,2\n", "names a column twice: a"),
    "what.xyz": ("hello", r"format .xyz is not known"),
    "no.parquet": ("PAR1 not really", "not a readable parquet file"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(tmp_path: Path, name: str) -> None:
    content, message = BAD_FILES[name]
    with pytest.raises(DataError, match=message):
        read_rows(write(tmp_path / name, content))


def test_a_long_csv_field_and_no_global_left_behind(tmp_path: Path) -> None:
    import csv

    limit = csv.field_size_limit()
    path = write(tmp_path / "a.csv", f"text\n{'x' * 200_000}\n")
    assert len(read_rows(path).rows[0]["text"]) == 200_000
    assert csv.field_size_limit() == limit


def test_missing_files_and_folders(tmp_path: Path) -> None:
    write(tmp_path / "dolly.jsonl", jsonl(ROWS))
    with pytest.raises(DataError, match=r"did you mean dolly\.jsonl\?"):
        read_rows(str(tmp_path / "doly.jsonl"))
    with pytest.raises(DataError, match="does not exist"):
        read_rows(str(tmp_path / "no" / "dolly.jsonl"))
    with pytest.raises(DataError, match=r"is a folder, .* holds dolly\.jsonl"):
        read_rows(str(tmp_path))
    with pytest.raises(DataError, match="no data given"):
        read_rows("")


def test_a_path_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"there is no file data/train\.jsonl"):
        read_rows("data/train.jsonl")


def test_hub_rows_by_way_of_a_local_data_set(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    write(tmp_path / "train.jsonl", jsonl(ROWS))
    code = (
        "import sys; from lorikeet.data import source\n"
        "rows = source._read_hub(sys.argv[1], split='train', limit=1, revision=None)\n"
        "print(rows.format, rows.sha256, rows.origins)\n"
        "try: source.read_rows('nobody/nothing')\n"
        "except source.DataError as error: print(error)\n"
        "import datasets, huggingface_hub.constants as hub\n"
        "hub.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = False\n"
        "hub.ENDPOINT = 'http://127.0.0.1:9'\n"
        "try: source.read_rows('nobody/nothing')\n"
        "except source.DataError as error: print(error)\n"
        "print(datasets.config.HF_HUB_OFFLINE)\n"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment | {"PYTHONPATH": os.pathsep.join(sys.path)},
        check=True,
    )
    assert result.stdout.startswith(f"hub {source._sha256(ROWS[:1])} ['{tmp_path}:1']")
    assert result.stdout.count("there is no file nobody/nothing, and the hub data set") == 2
    assert "127.0.0.1:9 cannot be reached" in result.stdout
    assert result.stdout.endswith("and it is not in the cache\nFalse\n")


def test_dolly(shared: Callable[[str], Path]) -> None:
    rows = read_rows(str(shared("data/dolly-15k.jsonl")), limit=100)
    assert len(rows.rows) == 100
    assert rows.origins[11] == "dolly-15k.jsonl:12"

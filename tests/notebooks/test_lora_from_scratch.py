"""The notebook: what lies in the repository is what a fresh run gives.

After an edit this writes the outputs anew:

    HF_HUB_OFFLINE=1 .venv/bin/jupyter execute --inplace --NotebookClient.record_timing=False \\
        --NotebookClient.coalesce_streams=True notebooks/lora_from_scratch.ipynb
"""

from __future__ import annotations

import getpass
import json
import re
import sys
import tempfile
import threading
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import huggingface_hub
import nbformat
import pytest
from nbclient import NotebookClient

from lorikeet import starter
from lorikeet.cli.main import VERBS, Parser

NOTEBOOK = Path(__file__).resolve().parents[2] / "notebooks" / "lora_from_scratch.ipynb"
TEXT = NOTEBOOK.read_text(encoding="utf-8")
MOST_BYTES = 600_000


def read() -> Any:
    return nbformat.reads(TEXT, as_version=4)


def tagged(notebook: Any, *tags: str) -> list[Any]:
    return [cell for cell in notebook.cells if set(tags) & set(cell.metadata.get("tags", ()))]


def texts(cell: Any) -> list[str]:
    """What a cell shows as text: its streams, and the plain side of everything else."""
    outputs = cell.get("outputs", ())
    return [out.text if out.output_type == "stream" else out.data["text/plain"] for out in outputs]


def everything_shown(notebook: Any) -> Iterator[tuple[str, str]]:
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            pieces = {"stream": output.get("text", ""), **output.get("data", {})}
            yield from ((cell.id, text) for kind, text in pieces.items() if kind != "image/png")


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that a kernel of this environment may work in, with nothing from outside."""
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("LORIKEET_NOTEBOOK_MODEL", raising=False)
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


def run(notebook: Any, folder: Path) -> Any:
    client = NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=None,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    )
    return client.execute()


def test_is_small_and_written_in_one_way() -> None:
    assert len(TEXT.encode()) < MOST_BYTES
    assert json.dumps(json.loads(TEXT), indent=1, sort_keys=True, ensure_ascii=False) + "\n" == TEXT
    nbformat.validate(read())
    assert set(read().metadata) == {"kernelspec", "language_info"}


def test_cells_have_names_of_their_own() -> None:
    names = [cell.id for cell in read().cells]
    assert len(set(names)) == len(names)
    # Words, where a program would have drawn hexadecimal numbers.
    assert [name for name in names if not re.fullmatch(r"[a-z]{3,}(-[a-z0-9]+)*", name)] == []


def test_outputs_are_those_of_one_run_from_the_top() -> None:
    code = [cell for cell in read().cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert [cell.id for cell in code if set(cell.metadata) - {"tags"}] == []  # no times
    assert sum("image/png" in out.get("data", {}) for c in code for out in c.outputs) >= 3


def test_outputs_hold_neither_errors_nor_warnings() -> None:
    for cell in read().cells:
        for output in cell.get("outputs", ()):
            assert output.output_type != "error", cell.id
            assert output.get("name") != "stderr", cell.id


def test_outputs_say_nothing_of_the_machine() -> None:
    own = {str(Path.home()), sys.prefix, tempfile.gettempdir(), f"{getpass.getuser()}@"}
    path = re.compile(r"(?<![\w<:/.])/[\w.-]+/[\w.-]+|[A-Za-z]:\\\w|file://")
    for name, text in everything_shown(read()):
        assert not path.search(text), (name, text)
        assert not [word for word in own if word in text], (name, text)


def test_commands_parse(capsys: pytest.CaptureFixture[str]) -> None:
    markdown = "\n".join(cell.source for cell in read().cells if cell.cell_type == "markdown")
    commands = re.findall(r"^lorikeet +(adapter \w+|\w+) ?(.*)$", markdown, flags=re.MULTILINE)
    assert len(commands) >= 6
    for verb, rest in commands:
        assert verb in VERBS
        parser = Parser(prog=verb)
        import_module(f"lorikeet.cli.{verb.replace(' ', '_')}").add_arguments(parser)
        parser.parse_strictly(re.findall(r'"[^"]*"|\S+', rest))


def test_a_run_shows_the_same_where_it_must(kernel: Path) -> None:
    """Everything from top to bottom, the answers to the exercises too: asserts are its tests."""
    fresh = with_answers(read())
    run(fresh, kernel)
    shown = {cell.id: texts(cell) for cell in fresh.cells}
    exact = tagged(read(), "exact")
    assert len(exact) >= 12
    for cell in exact:
        assert shown[cell.id] == texts(cell), cell.id
    assert "left out" in shown["optional-find"][0]
    assert shown["optional-run"] == []
    assert list(kernel.iterdir()) == []  # it leaves nothing where it runs


def with_answers(notebook: Any) -> Any:
    """The notebook with the code of every folded answer as a cell behind it."""
    cells: list[Any] = []
    for cell in notebook.cells:
        cells.append(cell)
        if "<details>" in cell.source:
            found = re.findall(r"```python\n(.*?)```", cell.source, flags=re.DOTALL)
            cells += [nbformat.v4.new_code_cell(code) for code in found]
    assert len(cells) > len(notebook.cells)
    notebook.cells = cells
    return notebook


def test_the_optional_section_takes_a_folder(kernel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORIKEET_NOTEBOOK_MODEL", str(starter.folder()))
    notebook = read()
    notebook.cells = tagged(notebook, "setup", "optional")
    run(notebook, kernel)
    assert texts(notebook.cells[-2]) == []
    assert "after - before: -" in "".join(texts(notebook.cells[-1]))


def test_a_hub_that_never_answers_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = threading.Event()

    def hang(*_: object, **__: object) -> None:
        asked.set()
        threading.Event().wait(60)

    monkeypatch.setattr(huggingface_hub, "model_info", hang)
    monkeypatch.setenv("LORIKEET_NOTEBOOK_MODEL", "given")
    (cell,) = [cell for cell in read().cells if cell.id == "optional-find"]
    scope: dict[str, Any] = {
        name: import_module(name) for name in ("contextlib", "os", "threading")
    }
    exec(compile(cell.source, "optional-find", "exec"), scope)
    assert scope["larger"] == "given"
    assert scope["hub_answers"](0.2) is False
    assert asked.is_set()

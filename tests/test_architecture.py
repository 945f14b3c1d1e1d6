"""The house rules that a program can hold: directions of imports, heavy imports, sizes, names."""

from __future__ import annotations

import ast
import importlib
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import lorikeet

ROOT = Path(lorikeet.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

FLOORS = {
    "errors": 0,
    "values": 0,
    "config": 1,
    "console": 1,
    "files": 1,
    "hub": 1,
    "parallel": 1,
    "lora": 2,
    "data": 2,
    "kernels": 2,
    "gguf": 2,
    "model": 3,
    "adapters": 3,
    "train": 4,
    "generate": 4,
    "evaluate": 5,
    "serve": 5,
    "study": 6,
    "export": 6,
    "starter": 6,
    "api": 6,
    "cli": 7,
    "__main__": 8,
    "": 0,  # the package itself, which imports nothing
}
"""A part imports lower floors and its own files."""

HOMES = {
    "transformers": ["model/"],
    "datasets": ["data/source.py"],
    "matplotlib": ["study/plots/"],
    "fastapi": ["serve/"],
    "bitsandbytes": ["model/quant.py"],
}
"""Heavy packages and the one place of each."""


def module_of(file: Path) -> str:
    """`lorikeet.data.batch`; a package is named as itself."""
    parts = ["lorikeet", *file.relative_to(ROOT).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(file) for file in FILES}


def part_of(module: str) -> str:
    return [*module.split("."), ""][1]


def imports(file: Path, *, typing_too: bool = True) -> Iterator[str]:
    """Every module that a file imports, anywhere in it, by full name."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    skipped: set[ast.AST] = set()
    if not typing_too:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                skipped |= set(ast.walk(node))
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            for alias in node.names:  # `from lorikeet.train import loop` imports a module
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else str(node.module)


def own(names: Iterator[str]) -> set[str]:
    return {name for name in names if name.split(".")[0] == "lorikeet"}


def ids(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def test_every_part_has_a_floor() -> None:
    assert {part_of(module) for module in MODULES} <= set(FLOORS)


@pytest.mark.parametrize("file", FILES, ids=ids)
def test_imports_point_down(file: Path) -> None:
    part = part_of(module_of(file))
    for name in own(imports(file)):
        target = part_of(name)
        assert target == part or FLOORS[target] < FLOORS[part], f"{part} imports {name}"
        if target == "starter" and part != "starter":
            assert ids(file) == "cli/demo.py", f"only the demo knows the starter: {ids(file)}"


def test_no_import_cycles() -> None:
    graph = {module_of(file): own(imports(file, typing_too=False)) for file in FILES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize("package", HOMES)
def test_heavy_packages_have_one_home(package: str) -> None:
    users = [
        ids(file) for file in FILES if package in {name.split(".")[0] for name in imports(file)}
    ]
    strangers = [user for user in users if not any(user.startswith(h) for h in HOMES[package])]
    assert strangers == []


def test_the_loop_knows_no_evaluation() -> None:
    for file in (ROOT / "train").glob("*.py"):
        assert not any(part_of(name) == "evaluate" for name in own(imports(file)))


def test_one_training_loop() -> None:
    """Whoever updates weights does it through the one optimizer, which only `fit` is handed."""
    users = {
        ids(file)
        for file in FILES
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.optim"
    }
    assert users == {"train/optimizer.py"}
    built = {
        ids(file)
        for file in FILES
        for name in own(imports(file))
        if name == "lorikeet.train.optimizer"
    }
    assert all(user.startswith("train/") for user in built)


def test_no_utils() -> None:
    banned = {"utils.py", "util.py", "helpers.py", "misc.py", "common.py"}
    assert [ids(file) for file in FILES if file.name in banned] == []


@pytest.mark.parametrize("file", FILES, ids=ids)
def test_files_are_short_and_say_what_they_are(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 450
    assert ast.get_docstring(ast.parse(text))


def packages() -> list[str]:
    return sorted(module for module in MODULES if module != "lorikeet.__main__")


@pytest.mark.parametrize("name", packages())
def test_public_names_exist(name: str) -> None:
    module = importlib.import_module(name)
    names = getattr(module, "__all__", [])
    assert [public for public in names if not hasattr(module, public)] == []
    assert len(set(names)) == len(names)


HEAVY = {"torch", "transformers", "pydantic", "datasets", "numpy", "tokenizers", "safetensors"}


def loaded_by(arguments: list[str]) -> set[str]:
    """Heavy packages that a command has imported when it ends."""
    code = (
        "import sys\n"
        "from lorikeet.cli.main import main\n"
        "try:\n"
        f"    main({arguments!r})\n"
        "except SystemExit:\n"
        "    pass\n"
        f"print('\\n' + ' '.join(set(sys.modules) & {HEAVY!r}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment()
    )
    return set(done.stdout.splitlines()[-1].split())


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT.parent)}


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], [], ["trian"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    assert loaded_by(arguments) == set()


def test_the_help_of_a_verb_imports_no_torch() -> None:
    assert not loaded_by(["train", "--help"]) & {"torch", "transformers", "tokenizers"}


def test_help_costs_little() -> None:
    """Processor time, which other work on the machine does not stretch much."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "lorikeet", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment())
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "usage: lorikeet VERB" in done.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2

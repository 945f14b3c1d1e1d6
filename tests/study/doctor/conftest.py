"""Real runs, healthy and with a fault planted, each done once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorikeet import starter
from lorikeet.config import load_config
from lorikeet.study import train_run
from lorikeet.study.doctor import diagnose, read_facts

Train = Callable[..., Path]
Alter = Callable[..., Path]


@pytest.fixture(scope="session")
def distinct(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Files of the starter's sets with each row once: the doctor names copies that are held out."""
    files = {}
    for name in ("pirate", "json"):
        path = tmp_path_factory.mktemp("distinct") / f"{name}.jsonl"
        lines = starter.data(name).read_text(encoding="utf-8").splitlines(keepends=True)
        path.write_text("".join(dict.fromkeys(lines)), encoding="utf-8")
        files[name] = str(path)
    return files


@pytest.fixture(scope="session")
def train(tmp_path_factory: pytest.TempPathFactory, distinct: dict[str, str]) -> Train:
    """Do a run, of the starter model on rows of its set `json` if nothing else is said.

    Options are given as `lora__r=2`; the same options give the same folder.
    """
    done: dict[str, Path] = {}

    def run(**options: Any) -> Path:
        given = {name.replace("__", "."): value for name, value in options.items()}
        wanted = {
            "model.path": str(starter.folder()),
            "model.threads": 1,
            "data.path": distinct["json"],
            "data.limit": 300,
            "train.learning_rate": 3e-3,
            **given,
        }
        key = json.dumps(wanted, sort_keys=True, default=str)
        if key not in done:
            out = tmp_path_factory.mktemp("run") / "run"
            train_run(load_config(overrides={**wanted, "out": str(out)}))
            done[key] = out
        return done[key]

    return run


@pytest.fixture(scope="session")
def dolly(shared: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Short rows of Dolly."""
    lines = shared("data/dolly-15k.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    path = tmp_path_factory.mktemp("data") / "dolly.jsonl"
    path.write_text("".join([line for line in lines if len(line) < 240][:300]), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def stories(shared: Callable[[str], Path], dolly: Path) -> dict[str, Any]:
    """Options of a small real model on rows of Dolly."""
    model = str(shared("models/stories260k"))
    return {"model__path": model, "data__path": str(dolly), "data__limit": 200}


@pytest.fixture
def altered(tmp_path: Path) -> Alter:
    """Copy a run folder and change figures of its receipt, given by dotted names."""

    def alter(run: Path, figures: dict[str, Any]) -> Path:
        copy = tmp_path / "altered"
        shutil.copytree(run, copy)
        receipt = json.loads((copy / "receipt.json").read_text(encoding="utf-8"))
        for name, value in figures.items():
            *path, key = name.split(".")
            section = receipt
            for part in path:
                section = section[part]
            section[key] = value
        (copy / "receipt.json").write_text(json.dumps(receipt), encoding="utf-8")
        return copy

    return alter


@pytest.fixture
def found() -> Callable[[Path], dict[str, Any]]:
    """Examine a run; findings by their ids."""

    def examine(run: Path) -> dict[str, Any]:
        findings = diagnose(read_facts(run))
        by_id = {finding.id: finding for finding in findings}
        assert len(by_id) == len(findings)
        for finding in findings:
            assert finding.message
            assert finding.advice
            json.dumps(finding.summary(), allow_nan=False)
        return by_id

    return examine

"""The benchmarks are a package of the repository, not of the installation."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(PROJECT))


@pytest.fixture(scope="session")
def stories(shared: Callable[[str], Path]) -> Path:
    """A small model with weights."""
    return shared("models/stories260k")


@pytest.fixture(scope="session")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows for three steps, of uneven length."""
    rows = [
        {"instruction": f"What is {n}?", "context": "", "response": "A number. " * (1 + n % 5)}
        for n in range(24)
    ]
    path = tmp_path_factory.mktemp("data") / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path

"""The command line as a process, and small data files of this project's own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def lorikeet() -> Run:
    """Run `python -m lorikeet ARGS` without a network and return the finished process."""

    def run(*args: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "lorikeet", *map(str, args)],
            capture_output=True,
            text=True,
            cwd=cwd,
            timeout=300,
            check=False,
        )

    return run


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Forty rows of prompt and completion."""
    path = tmp_path / "rows.jsonl"
    lines = [
        json.dumps({"prompt": f"Say {word}.", "completion": f"Arr, {word}!"})
        for word in ("plum", "pear", "fig", "gull", "boat", "lamp", "oar", "sail") * 5
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path

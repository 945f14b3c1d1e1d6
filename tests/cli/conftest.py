"""A small data file of this project's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


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

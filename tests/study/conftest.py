"""What tests of studies share: small runs of the starter model."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorikeet import starter
from lorikeet.config import RunConfig, load_config

# Made-up studies are imported by their names.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def small(tmp_path: Path) -> Callable[..., RunConfig]:
    """Options of a run of a few steps on the starter model."""
    rows = starter.data("pirate").read_text(encoding="utf-8").splitlines()[:120]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(rows) + "\n", encoding="utf-8")

    def config(**options: Any) -> RunConfig:
        return load_config(
            overrides={
                "model.path": str(starter.folder()),
                "data.path": str(data),
                "data.limit": 80,
                "train.max_steps": 3,
                "lora.r": 2,
                **{name.replace("__", "."): value for name, value in options.items()},
            }
        )

    return config


@pytest.fixture
def sweep_yaml(tmp_path: Path, small: Callable[..., RunConfig]) -> Callable[..., Path]:
    """A sweep's file over such a run."""

    def write(varied: dict[str, Any], **options: Any) -> Path:
        config = small(**options).model_dump(exclude={"out"})
        path = tmp_path / "sweep.yaml"
        path.write_text(json.dumps({**config, "sweep": varied}), encoding="utf-8")
        return path

    return write

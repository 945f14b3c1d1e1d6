"""What tests of studies share: small runs of the starter model."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from lorikeet import starter
from lorikeet.config import RunConfig, load_config
from lorikeet.study import report
from lorikeet.study.plots.study import draw
from lorikeet.study.plots.style import Picture

# Made-up studies are imported by their names.
sys.path.insert(0, str(Path(__file__).parent))


def small_in(folder: Path) -> Callable[..., RunConfig]:
    """Options of a run of a few steps on the starter model, with its data in a folder."""
    rows = starter.data("pirate").read_text(encoding="utf-8").splitlines()[:120]
    data = folder / "rows.jsonl"
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
def small(tmp_path: Path) -> Callable[..., RunConfig]:
    """Options of a run of a few steps on the starter model."""
    return small_in(tmp_path)


@pytest.fixture(scope="session")
def sweep_yaml_in() -> Callable[[Path], Callable[..., Path]]:
    """Write a sweep's file over such a run into a folder."""

    def within(folder: Path) -> Callable[..., Path]:
        small = small_in(folder)

        def write(varied: dict[str, Any], **options: Any) -> Path:
            config = small(**options).model_dump(exclude={"out"})
            path = folder / "sweep.yaml"
            path.write_text(json.dumps({**config, "sweep": varied}), encoding="utf-8")
            return path

        return write

    return within


@pytest.fixture
def sweep_yaml(
    tmp_path: Path, sweep_yaml_in: Callable[[Path], Callable[..., Path]]
) -> Callable[..., Path]:
    """A sweep's file over such a run."""
    return sweep_yaml_in(tmp_path)


@pytest.fixture(scope="session")
def reported(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], tuple[Path, dict[str, Picture]]]:
    """The report of a made-up study, to read only, with its pictures by name; each drawn once."""
    from made_up import STUDIES

    @cache
    def write(name: str) -> tuple[Path, dict[str, Picture]]:
        pictures: list[Picture] = []

        def draw_and_keep(*study: Any) -> list[Picture]:
            pictures[:] = draw(*study)
            return pictures

        folder = tmp_path_factory.mktemp(name)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(report, "draw", draw_and_keep)
            report.write_report(STUDIES[name](), folder)
        return folder, {picture.name: picture for picture in pictures}

    return write

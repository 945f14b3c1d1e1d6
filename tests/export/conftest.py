"""What several test files share is imported by its name."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a small model by its family: random weights in bf16, a real tokenizer."""
    from exporting import FAMILIES, edit, random_folder

    from lorikeet import starter

    made: dict[str, Path] = {}

    def of(family: str) -> Path:
        if family not in made:
            folder = tmp_path_factory.mktemp("base") / "model"
            made[family] = random_folder(folder, FAMILIES[family], starter.folder())
            edit(folder, lambda state: {name: t.bfloat16() for name, t in state.items()})
        return made[family]

    return of

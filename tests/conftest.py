"""What every test may use: real models and data beside the project."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

PROJECT = Path(__file__).resolve().parents[1]
SHARED = PROJECT.parent / "shared"


@pytest.fixture(scope="session")
def shared() -> Callable[[str], Path]:
    """Return the path of a file or folder beside the project, or skip the test without it."""

    def find(name: str) -> Path:
        path = SHARED / name
        if not path.exists():
            pytest.skip(f"needs {name} from the folder ../shared beside the project")
        return path

    return find


@pytest.fixture(autouse=True)
def _one_seed() -> None:
    torch.manual_seed(0)

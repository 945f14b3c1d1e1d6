"""What every test may use: real models and data beside the project."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

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


LETTERS = "abcdefghijklmnopqrstuvwxyz<>/.,:"


@pytest.fixture(scope="session")
def letters() -> Callable[[int], Any]:
    """Make a fast tokenizer of single letters that has so many ids; `a` is 2, `<` is 28."""
    from tokenizers import Regex, Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    def make(size: int) -> Any:
        names = ["<unk>", "<end>", *LETTERS]
        names += [f"filler{i}" for i in range(size - len(names))]
        model = WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>")
        made = Tokenizer(model)
        made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
        return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", eos_token="<end>")

    return make


@pytest.fixture(autouse=True)
def _one_seed() -> None:
    torch.manual_seed(0)

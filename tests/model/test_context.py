"""Texts longer than a model's context: refused where there are no positions, told elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from lorikeet.errors import ModelError
from lorikeet.generate import generate
from lorikeet.model import check_length, check_texts, position_limit

Build = Callable[[str], Any]


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_a_table_of_positions_has_an_end(architecture: Build, name: str) -> None:
    model = architecture(name)
    assert position_limit(model) == 64
    assert check_length(model, 64) == []
    with pytest.raises(ModelError, match="has 65 tokens, and this model has positions for 64"):
        check_length(model, 65)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "phi", "gpt-neox"])
def test_rotated_positions_are_a_warning(architecture: Build, name: str) -> None:
    model = architecture(name)
    assert position_limit(model) is None
    assert check_length(model, 64) == []
    (warning,) = check_length(model, 65)
    assert "has 65 tokens, and this model was made for 64" in warning


def test_tokens_that_the_model_has_no_rows_for(architecture: Build) -> None:
    model = architecture("llama")
    assert check_texts(model, [[1, 2], [60]]) == []
    with pytest.raises(ModelError, match="token 61, and the model's embedding has 61 rows"):
        check_texts(model, [[1], [2, 61, 3]])
    with pytest.raises(ModelError, match="token 99"):
        generate(model, [[99]], max_new_tokens=1, stop_ids=())


@pytest.mark.parametrize("name", ["bloom", "mamba", "llama-dynamic"])
def test_models_for_texts_of_any_length(architecture: Build, name: str) -> None:
    assert check_length(architecture(name), 1000) == []


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_answers_end_where_the_positions_do(architecture: Build, name: str) -> None:
    model = architecture(name)
    prompts = [[5] * 60, [7] * 3]
    long, short = generate(model, prompts, max_new_tokens=20, stop_ids=())
    assert len(long) == 5  # the token after the last position is still predicted
    assert [short] == generate(model, prompts[1:], max_new_tokens=20, stop_ids=())
    with pytest.raises(ModelError, match="shorten the prompt"):
        generate(model, [[5] * 65], max_new_tokens=1, stop_ids=())

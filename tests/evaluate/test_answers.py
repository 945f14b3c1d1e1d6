"""Answers side by side: which tokens end one, and that batches change nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lorikeet.data import Renderer
from lorikeet.evaluate import Sample, answer, stop_ids
from lorikeet.generate import generate
from lorikeet.model import Base, load_model


@pytest.fixture(scope="module")
def base(request: pytest.FixtureRequest) -> Base:
    shared: Callable[[str], Path] = request.getfixturevalue("shared")
    return load_model(shared("models/stories260k"), dtype="fp32", device="cpu")


@pytest.fixture(scope="module")
def renderer(base: Base) -> Renderer:
    return Renderer(base.tokenizer, template="instruction-response", max_length=64)


def test_an_answer_ends_at_any_known_end(base: Base, renderer: Renderer) -> None:
    configured = base.model.generation_config  # type: ignore[union-attr]
    before = configured.eos_token_id  # type: ignore[union-attr]
    try:
        for value, others in ((None, set()), (7, {7}), ([7, 9], {7, 9})):
            configured.eos_token_id = value  # type: ignore[union-attr]
            assert stop_ids(base.model, renderer) == {*renderer.stop_ids(), *others}
    finally:
        configured.eos_token_id = before  # type: ignore[union-attr]
    assert 2 in renderer.stop_ids()


def test_answers_are_decoded_greedy_text(base: Base, renderer: Renderer) -> None:
    texts = ["Once upon a time", "Lily", "The big dog", "One day", "Tom saw"]
    prompts = [renderer.prompt(text) for text in texts]
    found = answer(base.model, renderer, prompts, max_new_tokens=12)
    assert found == answer(base.model, renderer, prompts, max_new_tokens=12, batch_size=2)
    ids = generate(base.model, [prompts[0]], max_new_tokens=12, stop_ids={2})[0]
    assert found[0] == base.tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert answer(base.model, renderer, []) == []


def test_a_sample_is_plain_data() -> None:
    sample = Sample("p", "r", {"base": "a", "lora": "b"})
    assert sample.summary() == {
        "prompt": "p",
        "reference": "r",
        "answers": {"base": "a", "lora": "b"},
    }

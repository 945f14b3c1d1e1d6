"""Greedy text equals transformers' own, token for token; sampling follows its generator."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lorikeet.config import LoraConfig
from lorikeet.generate import generate
from lorikeet.lora import disabled, inject, lora_parameters
from lorikeet.model import Base, load_model

PROMPTS = [
    "Once upon a time",
    "Lily",
    "One day, a big dog went to the park and saw a small",
    "The cat was",
    "Tom and his mom like to",
]


@pytest.fixture(scope="module")
def base(request: pytest.FixtureRequest) -> Base:
    shared: Callable[[str], Path] = request.getfixturevalue("shared")
    return load_model(shared("models/stories260k"), dtype="fp32", device="cpu")


@pytest.fixture(scope="module")
def prompts(base: Base) -> list[list[int]]:
    return [[1, *base.tokenizer(text, add_special_tokens=False).input_ids] for text in PROMPTS]


def reference(model: Any, prompts: list[list[int]], new: int) -> list[list[int]]:
    """transformers' own greedy search over the batch, padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    out = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return [row[longest:].tolist() for row in out]


def test_greedy_is_transformers_own(base: Base, prompts: list[list[int]]) -> None:
    assert len({len(prompt) for prompt in prompts}) > 3
    found = generate(base.model, prompts, max_new_tokens=40, stop_ids=())
    assert found == reference(base.model, prompts, 40)
    assert [len(tokens) for tokens in found] == [40] * 5


def test_a_batch_is_what_each_prompt_is_alone(base: Base, prompts: list[list[int]]) -> None:
    together = generate(base.model, prompts, max_new_tokens=30, stop_ids=())
    alone = [generate(base.model, [p], max_new_tokens=30, stop_ids=())[0] for p in prompts]
    assert together == alone


def test_with_an_adapter(request: pytest.FixtureRequest, prompts: list[list[int]]) -> None:
    shared: Callable[[str], Path] = request.getfixturevalue("shared")
    model = load_model(shared("models/stories260k"), dtype="fp32", device="cpu").model
    plain = generate(model, prompts, max_new_tokens=20, stop_ids=())
    inject(model, LoraConfig(r=4), seed=0)
    for parameter in lora_parameters(model).values():
        nn.init.normal_(parameter, std=0.1)
    adapted = generate(model, prompts, max_new_tokens=20, stop_ids=())
    assert adapted != plain
    assert adapted == reference(model, prompts, 20)
    with disabled(model):
        assert generate(model, prompts, max_new_tokens=20, stop_ids=()) == plain


def test_the_story_that_the_model_is_known_for(base: Base) -> None:
    (tokens,) = generate(base.model, [[1]], max_new_tokens=48, stop_ids={2})
    text = base.tokenizer.decode(tokens, skip_special_tokens=True)
    assert text.strip().startswith(
        "Once upon a time, there was a little girl named Lily."
        " She loved to play outside in the park."
    )


def test_stop_tokens(base: Base, prompts: list[list[int]]) -> None:
    free = generate(base.model, prompts, max_new_tokens=30, stop_ids=())
    stops = {free[0][4], free[2][9]}
    found = generate(base.model, prompts, max_new_tokens=30, stop_ids=stops)
    for tokens, whole in zip(found, free, strict=True):
        end = next((i for i, token in enumerate(whole) if token in stops), 30)
        assert tokens == whole[:end]
    assert {len(tokens) for tokens in found} != {30}


def test_it_ends_when_every_prompt_has_stopped(base: Base, prompts: list[list[int]]) -> None:
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    first = generate(base.model, [prompts[0]], max_new_tokens=3, stop_ids=())[0]
    handle = base.model.register_forward_pre_hook(count)
    generate(base.model, [prompts[0]], max_new_tokens=50, stop_ids={first[2]})
    handle.remove()
    assert calls <= 3


def test_nothing_is_asked_for(base: Base, prompts: list[list[int]]) -> None:
    assert generate(base.model, prompts, max_new_tokens=0, stop_ids=()) == [[]] * 5


@pytest.mark.parametrize("wrong", [[], [[]], [[1], []]])
def test_prompts_must_hold_tokens(base: Base, wrong: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        generate(base.model, wrong, max_new_tokens=1, stop_ids=())


def test_the_mode_comes_back(base: Base, prompts: list[list[int]]) -> None:
    base.model.train()
    generate(base.model, prompts, max_new_tokens=1, stop_ids=())
    assert base.model.training
    base.model.eval()
    generate(base.model, prompts, max_new_tokens=1, stop_ids=())
    assert not base.model.training


def test_sampling_follows_its_generator(base: Base, prompts: list[list[int]]) -> None:
    def sample(seed: int, temperature: float) -> list[list[int]]:
        return generate(
            base.model,
            prompts,
            max_new_tokens=20,
            stop_ids=(),
            temperature=temperature,
            generator=torch.Generator().manual_seed(seed),
        )

    assert sample(1, 1.0) == sample(1, 1.0) != sample(2, 1.0)
    assert sample(1, 1e-4) == generate(base.model, prompts, max_new_tokens=20, stop_ids=())


def test_sampling_has_the_models_probabilities(base: Base) -> None:
    prompt = [1, *base.tokenizer("Once upon a", add_special_tokens=False).input_ids]
    with torch.no_grad():
        logits = base.model(input_ids=torch.tensor([prompt])).logits[0, -1]
    expected = (logits / 2.0).softmax(-1)
    draws = 3000
    found = generate(
        base.model,
        [prompt] * draws,
        max_new_tokens=1,
        stop_ids=(),
        temperature=2.0,
        generator=torch.Generator().manual_seed(0),
    )
    counts = torch.bincount(torch.tensor(found)[:, 0], minlength=512) / draws
    assert (counts - expected).abs().max() < 4 * (0.25 / draws) ** 0.5

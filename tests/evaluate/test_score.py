"""The one number: against a naive loop in float64, a bootstrap, and itself in other layouts."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorikeet.data import Example
from lorikeet.errors import DataError
from lorikeet.evaluate import Score, evaluate, paired_difference, student_t95
from lorikeet.model import load_model

STORIES = [
    "Once upon a time, there was a little dog named Max. Max liked to run in the park.",
    "Lily had a red ball. She gave it to Tom.",
    "The sun was hot. The cat slept all day and did not want to play with the bird.",
    "Ben saw a big fish!",
    "One day, a boy went to the beach with his mom. They made a castle and ate ice cream.",
]


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue("shared")("models/stories260k")
    return path


@pytest.fixture(scope="module")
def examples(folder: Path) -> list[Example]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    draw = random.Random(3)
    made = []
    for number, text in enumerate(STORIES * 4):
        ids = [1, *tokenizer(text[: draw.randrange(10, 90)], add_special_tokens=False).input_ids]
        mask = [False] + [draw.random() < 0.7 for _ in ids[1:]]
        mask[-1] = True
        made.append(Example(tuple(ids), tuple(mask), len(text), f"row {number}"))
    return made


def naive(folder: Path, examples: list[Example]) -> list[float]:
    """One document at a time, every logit, float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    nats = []
    for example in examples:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([example.ids])).logits[0]
        total = 0.0
        for position, counted in enumerate(example.supervised):
            if counted:
                row = logits[position - 1].double()
                total += float(torch.logsumexp(row, 0) - row[example.ids[position]])
        nats.append(total)
    return nats


def test_against_a_naive_loop(folder: Path, examples: list[Example]) -> None:
    base = load_model(folder, dtype="fp32", device="cpu")
    score = evaluate(base.model, examples, packing=base.packing)
    expected = naive(folder, examples)
    tokens = sum(example.supervised_tokens for example in examples)
    assert score.nats == pytest.approx(expected, rel=1e-5)
    assert score.tokens == tokens
    assert score.nll == pytest.approx(sum(expected) / tokens, rel=1e-6)
    assert score.perplexity == pytest.approx(math.exp(sum(expected) / tokens), rel=1e-6)
    text_bytes = sum(example.text_bytes for example in examples)
    assert score.bits_per_byte == pytest.approx(sum(expected) / math.log(2) / text_bytes, rel=1e-6)


def test_every_batch_size_gives_the_same_figure(folder: Path, examples: list[Example]) -> None:
    base = load_model(folder, dtype="fp32", device="cpu")
    packed = evaluate(base.model, examples).nll
    for size in (1, 3, 16):
        scores = [
            evaluate(base.model, examples[i : i + size]) for i in range(0, len(examples), size)
        ]
        nll = sum(float(s.nats.sum()) for s in scores) / sum(s.tokens for s in scores)
        assert nll == pytest.approx(packed, rel=1e-6)
    for max_tokens in (8, 100):
        assert evaluate(base.model, examples, max_tokens=max_tokens).nll == pytest.approx(
            packed, rel=1e-6
        )
    assert evaluate(base.model, examples, packing=False).nll == pytest.approx(packed, rel=1e-6)


def test_bf16_is_close(folder: Path, examples: list[Example]) -> None:
    exact, rounded = (
        evaluate(load_model(folder, dtype=dtype, device="cpu").model, examples).nll
        for dtype in ("fp32", "bf16")
    )
    assert rounded == pytest.approx(exact, abs=0.02)


def test_dropout_is_off_and_the_mode_comes_back(folder: Path, examples: list[Example]) -> None:
    model = load_model(folder, dtype="fp32", device="cpu").model
    model.model.layers[0].mlp.down_proj = nn.Sequential(  # type: ignore[union-attr, index]
        model.model.layers[0].mlp.down_proj,  # type: ignore[union-attr, index]
        nn.Dropout(0.5),
    )
    expected = evaluate(model, examples).nll
    model.train()
    assert evaluate(model, examples).nll == expected
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def some_score(seed: int, documents: int = 200) -> Score:
    """Documents of different lengths whose difficulty varies, longer ones being easier."""
    draw = np.random.default_rng(seed)
    tokens = draw.integers(3, 60, documents)
    nats = tokens * draw.gamma(4.0, 0.5, documents) + 12 - tokens * 0.1
    return Score(nats, tokens, 1000)


def test_standard_error_against_a_bootstrap() -> None:
    score = some_score(0)
    draw = np.random.default_rng(1)
    chosen = draw.integers(0, len(score.nats), (4000, len(score.nats)))
    ratios = score.nats[chosen].sum(1) / score.tokens_per_document[chosen].sum(1)
    assert score.nll_stderr == pytest.approx(ratios.std(), rel=0.1)


def test_standard_error_by_hand() -> None:
    """Ratio 2, residuals 1, -1, 0, 0 over 1 - 0.1, 1 - 0.3: the jackknife's."""
    score = Score(np.array([3.0, 5.0, 4.0, 8.0]), np.array([1, 3, 2, 4]), 0)
    assert score.nll_stderr == pytest.approx(math.sqrt(3 / 4 * (1 / 0.9**2 + 1 / 0.7**2)) / 10)


def test_paired_difference() -> None:
    base = some_score(0)
    draw = np.random.default_rng(2)
    gains = 0.05 * base.tokens_per_document * draw.normal(1.0, 0.5, len(base.nats))
    better = Score(base.nats - gains, base.tokens_per_document, base.text_bytes)
    difference = paired_difference(better, base)
    assert difference.nll == pytest.approx(better.nll - base.nll)
    assert difference.stderr is not None
    assert base.nll_stderr is not None
    assert difference.stderr < base.nll_stderr / 10  # pairing takes the documents' own spread out
    chosen = draw.integers(0, len(gains), (4000, len(gains)))
    ratios = -gains[chosen].sum(1) / base.tokens_per_document[chosen].sum(1)
    assert difference.stderr == pytest.approx(ratios.std(), rel=0.1)
    low, high = difference.interval or (0, 0)
    assert low < -0.05 < high < 0
    assert difference.df is not None
    assert (high - low) / 2 == pytest.approx(student_t95(difference.df) * difference.stderr)
    assert str(difference).startswith(f"{difference.nll:+.4f} nats/token, 95 % interval [-0.0")
    json.dumps(difference.summary())


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    """400 samples of 60 documents from one population: 95 % of the intervals hold its ratio."""
    population = some_score(5, documents=4000)
    draw = np.random.default_rng(6)
    hits = 0
    for _ in range(400):
        chosen = draw.choice(4000, 60, replace=False)
        sample = Score(population.nats[chosen], population.tokens_per_document[chosen], 0)
        low, high = sample.interval or (0, 0)
        hits += low < population.nll < high
    assert 0.92 <= hits / 400 <= 0.98


def test_scores_of_other_documents_are_not_paired() -> None:
    with pytest.raises(ValueError, match="not of the same documents"):
        paired_difference(some_score(0), some_score(1))


def test_one_document_has_no_uncertainty() -> None:
    score = Score(np.array([4.0]), np.array([2]), 0)
    assert score.nll_stderr is None
    assert score.bits_per_byte is None
    difference = paired_difference(score, score)
    assert difference.interval is None
    assert str(difference) == "+0.0000 nats/token"


def test_a_perplexity_beyond_floats() -> None:
    assert Score(np.array([2000.0]), np.array([2]), 0).perplexity == math.inf


class Uniform(nn.Module):
    """Every token is as likely as any other."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 2)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, input_ids: torch.Tensor, logits_to_keep: torch.Tensor, **_: Any) -> Any:
        class Output:
            logits = torch.zeros(1, len(logits_to_keep), 8)

        return Output


def test_figures_of_a_uniform_model() -> None:
    """Eight tokens: ln 8 nats, perplexity 8, three bits a token."""
    documents = [
        Example((1, 2, 3, 4), (False, True, True, True), 6, "a"),
        Example((5, 6), (False, False), 9, "nothing supervised"),
        Example((1, 2), (False, True), 2, "b"),
    ]
    score = evaluate(Uniform(), documents)
    assert score.summary() == {
        "documents": 2,
        "tokens": 4,
        "nll": pytest.approx(math.log(8)),
        "nll_stderr": pytest.approx(0, abs=1e-12),
        "perplexity": pytest.approx(8),
        "bits_per_byte": pytest.approx(4 * 3 / 8),
    }


@pytest.mark.parametrize("documents", [[], [Example((5, 6), (False, False), 9, "a")]])
def test_nothing_to_evaluate(documents: list[Example]) -> None:
    with pytest.raises(DataError, match="nothing to evaluate"):
        evaluate(Uniform(), documents)


def test_scores_are_the_same_on_every_call(
    folder: Path, examples: list[Example], shared: Callable[[str], Path]
) -> None:
    model = load_model(folder, dtype="fp32", device="cpu").model
    first, second = (evaluate(model, examples) for _ in range(2))
    assert np.array_equal(first.nats, second.nats)

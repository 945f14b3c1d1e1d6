"""What came out of a run: learnt by heart, worse, the same, or not to be told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Found = Callable[[Path], dict[str, Any]]
BY_HEART = {"data__limit": 30, "data__validation": 0.4, "train__epochs": 25}
SHORT = {"train__epochs": 2, "train__eval_every": 20}


def test_few_rows_over_many_epochs(train: Callable[..., Path], found: Found) -> None:
    findings = found(train(**BY_HEART))
    assert set(findings) == {"over-fitting", "few-tokens"}
    evidence = findings["over-fitting"].evidence
    assert evidence["gap_interval95"][0] > 0
    assert findings["over-fitting"].severity == "hint"  # rows held out still gained
    assert findings["few-tokens"].evidence["ratio"] < 0.01


def test_validation_that_rises_again(
    stories: dict[str, Any], train: Callable[..., Path], found: Found
) -> None:
    options = {**stories, "data__limit": 40, "data__validation": 0.4, "lora__alpha": 32}
    options |= {"train__learning_rate": 1e-2, "train__epochs": 12, "train__eval_every": 6}
    findings = found(train(**options))
    assert set(findings) == {"over-fitting", "worse-than-base", "few-tokens"}
    evidence = findings["over-fitting"].evidence
    assert findings["over-fitting"].severity == "problem"
    assert evidence["last_nll"] > evidence["best_nll"]
    assert findings["worse-than-base"].evidence["interval95"][0] > 0


def test_an_older_folder_shows_over_fitting_by_its_training_loss(
    train: Callable[..., Path], altered: Callable[..., Path], found: Found
) -> None:
    run = altered(train(**BY_HEART), {"result.seen": None, "result.moved": None})
    evidence = found(run)["over-fitting"].evidence
    assert "last epoch" in evidence["compared"]


def test_the_weights_of_the_best_evaluation_are_not_blamed(
    train: Callable[..., Path], found: Found, altered: Callable[..., Path]
) -> None:
    """With patience the best weights are kept, so validation that rose is of no account."""
    run = altered(train(**SHORT), {})
    lines = [{"step": n, "eval_nll": nll} for n, nll in ((20, 1.0), (40, 2.4), (68, 2.5))]
    steps = [
        line
        for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        if "loss" in line
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in [*steps, *lines]))
    assert "validation loss rose" in found(run)["over-fitting"].message
    config = (run / "config.yaml").read_text().replace("patience: null", "patience: 2")
    (run / "config.yaml").write_text(config)
    assert "over-fitting" not in found(run)


def test_few_tokens_where_nothing_was_held_out(train: Callable[..., Path], found: Found) -> None:
    findings = found(train(data__limit=20, data__validation=0.0, train__epochs=10))
    assert set(findings) == {"no-validation", "few-tokens"}


def difference(nll: float, stderr: float | None) -> dict[str, Any]:
    """A receipt's figures of a run that changed the loss by so much."""
    return {"result.difference": {"nll": nll, "nll_stderr": stderr, "interval95": None}}


@pytest.mark.parametrize(
    ("nll", "stderr", "expected"),
    [
        (-0.50, 0.1, set()),
        (-0.03, 0.02, {"same-as-base"}),
        (-0.03, 0.08, {"validation-too-small"}),
        (-0.50, None, {"validation-too-small"}),
        (0.30, 0.05, {"worse-than-base"}),
        (0.00, 0.003, {"not-learning"}),
    ],
)
def test_what_the_difference_and_its_interval_say(
    nll: float,
    stderr: float | None,
    expected: set[str],
    train: Callable[..., Path],
    altered: Callable[..., Path],
    found: Found,
) -> None:
    kinds = {"same-as-base", "validation-too-small", "worse-than-base", "not-learning"}
    run = altered(train(**SHORT), difference(nll, stderr))
    assert set(found(run)) & kinds == expected


def test_a_validation_set_of_two_rows_shows_no_small_gain(
    stories: dict[str, Any], train: Callable[..., Path], found: Found
) -> None:
    options = {**stories, "data__validation": 0.01, "train__max_steps": 10}
    small = found(train(**options, train__learning_rate=1e-3, train__seed=1))[
        "validation-too-small"
    ]
    assert small.severity == "hint"
    assert small.evidence["needed"] > small.evidence["documents"] == 2


def test_answers_that_stay_the_same(
    train: Callable[..., Path], found: Found, altered: Callable[..., Path]
) -> None:
    run = altered(train(**SHORT), difference(-0.05, 0.01))
    samples = [{"prompt": "a", "reference": "b", "answers": {"base": "c", "lora": "c"}}] * 3
    (run / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))
    assert "same-answers" in found(run)
    samples[1] = {**samples[1], "answers": {"base": "c", "lora": "d"}}
    (run / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))
    assert "same-answers" not in found(run)

"""Comparisons of methods."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorikeet.config import RunConfig
from lorikeet.errors import ConfigError, TrainingError
from lorikeet.study.compare import EXTENSIONS, METHODS, Comparison, _next, run_compare

Small = Callable[..., RunConfig]


def test_each_method_gets_a_learning_rate_of_its_own_and_every_seed(
    tmp_path: Path, small: Small
) -> None:
    comparison = Comparison(
        small(data__validation=0.3, train__max_steps=4),
        methods=["lora", "full"],
        seeds=2,
        grids={"lora": [1e-3, 3e-3], "full": [1e-3]},
    )
    study = run_compare(comparison, tmp_path / "a")
    assert [trial.method for trial in study.trials] == ["base", "lora", "lora", "full", "full"]
    assert [trial.seed for trial in study.trials[1:]] == [0, 1, 0, 1]
    picked = {c.method: c.learning_rate for c in study.candidates if c.picked}
    assert {t.method: t.learning_rate for t in study.trials[1:]} == picked
    tried = [c for c in study.candidates if c.method == "lora"]
    best = min(tried, key=lambda c: c.nll or 0)
    assert best.picked
    assert sum(c.picked for c in tried) == 1
    assert [c.learning_rate for c in study.candidates if c.method == "full"] == [1e-3]
    assert study.receipt["loads"] == {"base": 1, "data": 1}
    documents = {len(t.test.nats) for t in study.trials if t.test}
    assert documents == {study.receipt["test documents"]}

    assert any("picked with seed 0" in note for note in study.notes)

    same = run_compare(comparison, tmp_path / "a")
    assert same.receipt["loads"] == {"base": 0, "data": 0}
    assert [t.to_json() for t in same.trials] == [t.to_json() for t in study.trials]


def test_a_grid_grows_beyond_the_end_at_which_the_best_lies(tmp_path: Path, small: Small) -> None:
    comparison = Comparison(
        small(data__validation=0.3, train__max_steps=4, model__dtype="fp32"),
        methods=["lora"],
        seeds=1,
        grids={"lora": [1e-5, 3e-5]},  # both far too low for four steps
    )
    study = run_compare(comparison, tmp_path / "a")
    rates = [c.learning_rate for c in study.candidates]
    assert rates == [1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3]
    assert len(rates) == 2 + EXTENSIONS
    assert any("still at the end" in note for note in study.notes)
    assert any("beyond the declared grid" in note for note in study.notes)


@pytest.mark.parametrize(
    ("end", "neighbour", "following"),
    [
        (3e-4, 1e-4, 1e-3),
        (1e-3, 3e-4, 3e-3),
        (1e-4, 3e-4, 3e-5),
        (3e-5, 1e-4, 1e-5),
        (2e-4, 1e-4, 5e-4),
        (1e-3, 1e-4, 1e-2),
        (1.1e-4, 1e-4, 1.2e-4),
        (1e-4, 1.1e-4, 9.1e-5),
    ],
)
def test_the_next_learning_rate_goes_on_as_the_grid_did(
    end: float, neighbour: float, following: float
) -> None:
    found = _next(end, neighbour)
    assert (found - end) * (end - neighbour) > 0
    assert found == pytest.approx(following, rel=0.26)


def test_variants_are_the_options_that_they_stand_for(small: Small) -> None:
    comparison = Comparison(small(), methods=list(METHODS))
    runs = {method: comparison.planned(method, 1e-3, 5).config for method in METHODS}
    assert runs["dora"].lora.dora
    assert runs["rslora"].lora.rslora
    assert runs["pissa"].lora.init == "pissa"
    assert runs["lora+"].train.loraplus_lr_ratio == 16
    assert runs["int8"].train.int8
    assert runs["full"].train.method == "full"
    assert {run.train.seed for run in runs.values()} == {5}
    assert {run.train.learning_rate for run in runs.values()} == {1e-3}


def test_every_problem_of_a_comparison_is_reported_at_once(small: Small) -> None:
    with pytest.raises(ConfigError) as error:
        Comparison(
            small(train__method="full", train__learning_rate=1e-4),
            methods=["lora", "qlora"],
            seeds=0,
            grids={"lora": [-1.0], "nothing": [1e-3]},
        )
    said = str(error.value)
    for part in ("qlora", "nothing", "--methods", "--grid", "--seeds", "above 0"):
        assert part in said


@pytest.mark.parametrize(
    ("options", "given", "said"),
    [
        ({"lora__rslora": True}, {}, "lora and rslora are the same; leave out lora.rslora"),
        ({"lora__init": "pissa"}, {}, "dora: .*lora.dora and lora.init pissa cannot be combined"),
        ({"train__int8": True}, {}, "full: train.int8 rounds frozen weights"),
        ({}, {"grids": {"int8": [1e-3]}}, "a grid is given for int8, which is not compared"),
        ({}, {"grids": {"lora": [math.inf]}}, "above 0, found .inf"),
    ],
)
def test_what_no_comparison_can_be_is_told_before_anything_is_loaded(
    small: Small, options: dict[str, Any], given: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        Comparison(small(**options), methods=["lora", "full", "rslora", "dora"], **given)


def test_a_comparison_of_nothing(small: Small) -> None:
    with pytest.raises(ConfigError, match="no method is to be trained; there are lora, full"):
        Comparison(small(), methods=[])


def test_methods_that_fail_are_told_and_all_failing_is_an_error(
    tmp_path: Path, small: Small
) -> None:
    config = small(data__validation=0.3, train__max_steps=1, lora__r=1000)
    some = Comparison(config, methods=["pissa", "full"], seeds=1, grids={"full": [1e-3]})
    study = run_compare(some, tmp_path / "a")  # the starter has no thousand singular values
    assert [trial.method for trial in study.failed] == ["pissa"]
    assert [group.method for group in study.groups] == ["full"]
    alone = Comparison(config, methods=["full"], seeds=1, grids={"full": [1e-3]})
    assert "were given" in run_compare(alone, tmp_path / "given").notes[0]
    with pytest.raises(TrainingError, match="no method came to its end"):
        run_compare(Comparison(config, methods=["pissa"], seeds=1), tmp_path / "b")

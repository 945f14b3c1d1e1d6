"""Trials, groups, studies."""

from __future__ import annotations

import json

import numpy as np

from lorikeet.evaluate import Score
from lorikeet.study.record import SEED, Cost, Study, Trial


def _trial(**values: object) -> Trial:
    score = Score(np.array([1.25, 2.5]), np.array([3, 4]), 11)
    options = {"name": "a", "method": "lora", "test": score, "curve": [(1, 0.5)], **values}
    return Trial(**options)  # type: ignore[arg-type]


def test_a_trial_survives_json() -> None:
    trial = _trial(cost=Cost(1.5, 1000), settings={"lora.r": 8, SEED: 1}, answers=["ja", "nein"])
    back = Trial.from_json(json.loads(json.dumps(trial.to_json())))
    assert json.dumps(back.to_json()) == json.dumps(trial.to_json())
    assert back.test is not None
    assert back.test.nll == 3.75 / 7
    assert (back.cost, back.curve, back.other) == (Cost(1.5, 1000), [(1, 0.5)], None)


def test_the_summary_has_the_figures_that_others_read() -> None:
    trial = _trial(parameters=1000, trainable=50, steps=4, tokens=600, cost=Cost(2.0, 77))
    found = trial.summary()
    assert (found["trainable_share"], found["seconds_per_step"]) == (0.05, 0.5)
    assert (found["tokens_per_second"], found["peak_memory"]) == (300, 77)
    assert found["nll"] == 3.75 / 7
    failed = _trial(test=None, error="no").summary()
    assert (failed["nll"], failed["perplexity"], failed["error"]) == (None, None, "no")


def test_groups_differ_in_their_seed_alone() -> None:
    trials = [
        _trial(name=f"{r}{seed}", settings={"lora.r": r, SEED: seed}, seed=seed)
        for seed in (1, 0)
        for r in (8, 16)
    ]
    failed = _trial(name="x", settings={"lora.r": 8, SEED: 2}, error="no", test=None)
    study = Study("sweep", [_trial(name="base", method="base"), *trials, failed], {})
    assert [group.label for group in study.groups] == ["lora r=8", "lora r=16"]
    assert [trial.seed for trial in study.groups[0].trials] == [0, 1]
    assert study.base is not None
    assert study.failed == [failed]

"""What a sweep varies."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorikeet.config import load_config
from lorikeet.errors import ConfigError
from lorikeet.study.grid import Choice, Range, Sweep, changed, file_name
from lorikeet.study.record import SEED


def _sweep(**options: object) -> Sweep:
    varied = {
        "lora.r": [Choice(8, {"lora.alpha": 16}), Choice(16, {"lora.alpha": 32})],
        "data.limit": [Choice(100), Choice(200)],
        SEED: [Choice(0), Choice(1)],
    }
    return Sweep(load_config(), {**varied, **options})


def test_a_grid_is_every_combination_once_in_the_order_of_the_file() -> None:
    trials = _sweep().trials()
    assert [trial.settings for trial in trials] == [
        {"lora.r": r, "data.limit": limit, SEED: seed}
        for r in (8, 16)
        for limit in (100, 200)
        for seed in (0, 1)
    ]
    assert len({trial.name for trial in trials}) == 8
    for trial in trials:
        run = trial.config
        assert (run.lora.r, run.data.limit, run.train.seed) == tuple(trial.settings.values())
        assert run.lora.alpha == 2 * run.lora.r  # what follows is set, and is no setting


def test_values_given_twice_make_one_trial() -> None:
    sweep = Sweep(load_config(), {"lora.r": [Choice("8"), Choice(8)], SEED: [Choice(0)]})
    assert [trial.name for trial in sweep.trials()] == ["r=8,seed=0"]
    assert sweep.values() == {"lora.r": [8], SEED: [0]}


@pytest.mark.parametrize(
    ("choices", "differ"),
    [
        (
            [Choice(8, {"lora.alpha": 16}), Choice(8, {"lora.alpha": 32})],
            "lora.alpha 16.0 and 32.0",
        ),
        ([Choice(8), Choice("8")], ""),
    ],
)
def test_trials_of_one_name_are_one_trial_or_refused(choices: list[Choice], differ: str) -> None:
    sweep = Sweep(load_config(), {"lora.r": choices, SEED: [Choice(0)]})
    if not differ:
        assert [trial.name for trial in sweep.trials()] == ["r=8,seed=0"]
        return
    with pytest.raises(ConfigError, match=f"r=8,seed=0 stands for {differ}"):
        sweep.trials()


def test_every_combination_that_is_no_run_is_reported_and_each_problem_once() -> None:
    varied = {
        "lora.dora": [Choice(False), Choice(True)],
        "lora.init": [Choice("kaiming"), Choice("pissa")],
        "lora.r": [Choice(4), Choice(-1)],
        SEED: [Choice(0), Choice(1)],
    }
    with pytest.raises(ConfigError) as error:
        Sweep(load_config(), varied).trials()
    assert sum("pissa" in problem for problem in error.value.problems) == 1
    assert sum("lora.r" in problem for problem in error.value.problems) == 1


def test_draws_are_the_same_every_time_and_each_is_done_with_every_seed() -> None:
    varied = {
        "train.learning_rate": Range(1e-5, 1e-2, log=True),
        "lora.r": Range(2, 64, log=True),
        "lora.init": [Choice("kaiming"), Choice("gaussian")],
        SEED: [Choice(0), Choice(7)],
    }
    sweep = Sweep(load_config(), varied, draws=30)
    trials = sweep.trials()
    assert [t.settings for t in trials] == [t.settings for t in sweep.trials()]
    assert [t.config.train.seed for t in trials] == [0, 7] * 30
    rates = [t.config.train.learning_rate or 0 for t in trials]
    assert all(1e-5 <= rate <= 1e-2 for rate in rates)
    below = sum(rate < math.sqrt(1e-5 * 1e-2) for rate in rates[::2])
    assert 5 < below < 25  # even in the logarithm
    other = Sweep(load_config(), varied, draws=30, draw_seed=1).trials()
    assert [t.settings for t in other] != [t.settings for t in trials]


@given(low=st.integers(1, 50), width=st.integers(1, 50), log=st.booleans(), seed=st.integers(0, 99))
def test_a_draw_lies_in_its_range_and_whole_numbers_stay_whole(
    low: int, width: int, log: bool, seed: int
) -> None:
    drawn = Range(low, low + width, log).draw(random.Random(seed))
    assert isinstance(drawn, int)
    assert low <= drawn <= low + width


def test_changed_options_leave_the_others_as_they_are() -> None:
    config = load_config(overrides={"lora.rank_pattern": "q_proj=3", "train.max_memory": "6GB"})
    run = changed(config, {"lora.r": 3})
    assert run.lora.r == 3
    assert changed(run, {"lora.r": config.lora.r}) == config


def test_names_are_good_for_files_and_stay_apart() -> None:
    assert file_name("r=8,seed=0") == "r=8,seed=0"
    assert "/" not in file_name("target_modules=.*(q|v)_proj/..,seed=0")
    long = ["x" * 200 + end for end in "ab"]
    assert len({file_name(name) for name in long}) == 2
    assert all(len(file_name(name)) < 100 for name in long)

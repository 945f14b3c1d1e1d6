"""Findings of sweeps in which it is known what there is to find."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import base, grid, score, trial

from lorikeet.study.findings import Finding, findings
from lorikeet.study.record import SEED, Study, Trial

SEEDS = (0, 1, 2)


def of(study: Study, topic: str) -> list[Finding]:
    return [finding for finding in findings(study) if finding.topic == topic]


def only(study: Study, topic: str) -> Finding:
    (found,) = of(study, topic)
    return found


def diminishing(settings: Mapping[str, Any]) -> float:
    """Rank pays up to 8 and not beyond; four times the rows are worth 0.2 nats."""
    return 2.0 + {2: 0.2, 4: 0.1}.get(settings["lora.r"], 0.0) - 0.001 * settings["data.limit"] / 4


@pytest.fixture(scope="module")
def ranks() -> Study:
    varied = {"lora.r": (2, 4, 8, 16, 32), "data.limit": (400, 1200), SEED: SEEDS}
    return grid(varied, diminishing, seed_sd=0.002)


def test_diminishing_returns(ranks: Study) -> None:
    found = only(ranks, "r")
    steps = {(step["from"], step["to"]): step for step in found.figures["steps"]}
    assert list(steps) == [("2", "4"), ("4", "8"), ("8", "16"), ("16", "32")]
    for pair, planted in zip(steps, (-0.1, -0.1, 0.0, 0.0), strict=True):
        low, high = steps[pair]["difference"]["interval95"]
        assert low < planted < high
        assert (high < 0) == (planted < 0)
        assert steps[pair]["settings"] == 2
        assert steps[pair]["difference"]["seeds"] == 3
        assert steps[pair]["cost_ratios"]["trainable parameters"] == 2
        assert set(steps[pair]["by_setting"]) == {"rows=400", "rows=1200"}
    assert found.text.startswith("r, averaged over 2 settings of the other options: 2 to 4")
    assert found.text.count("not distinguishable, at +100 % trainable parameters") == 2
    assert found.text.count("better, at +100 % trainable parameters") == 2
    assert found.figures["best"] in ("8", "16", "32")
    told = {one["to"] for one in found.figures["from_best"] if one["difference"]["nll"] > 0.05}
    assert told == {"2", "4"}


def test_the_effect_of_rows(ranks: Study) -> None:
    found = only(ranks, "rows")
    (step,) = found.figures["steps"]
    assert step["difference"]["nll"] == pytest.approx(-0.2, abs=0.003)
    assert step["difference"]["interval95"][1] < -0.19
    assert step["settings"] == 5
    assert "400 to 1200 perplexity -18." in found.text
    assert "better, at +200 % training tokens. Best is 1200" in found.text


def test_the_best_and_what_is_not_distinguishable_from_it(ranks: Study) -> None:
    found = only(ranks, "best")
    assert found.figures["best"] in {f"lora r={r} rows=1200" for r in (8, 16, 32)}
    close = {found.figures["best"], *found.figures["not_distinguishable"]}
    assert close == {f"lora r={r} rows=1200" for r in (8, 16, 32)}
    assert "7 groups are distinguishable from it" in found.text
    smallest = of(ranks, "smallest")
    if found.figures["best"] != "lora r=8 rows=1200":
        assert smallest[0].figures["group"] == "lora r=8 rows=1200"


def test_gains_per_megabyte_and_per_second(ranks: Study) -> None:
    """Rank 2 saves 8 kB; 400 rows take 51 seconds and gain 0.9 at rank 2, 1.1 at rank 8."""
    megabytes, seconds = only(ranks, "per megabyte"), only(ranks, "per second")
    assert megabytes.figures["best"] == "lora r=2 rows=1200"
    assert megabytes.figures["gain_per_megabyte"]["lora r=2 rows=1200"] == pytest.approx(
        1.1 / 0.008, rel=0.02
    )
    assert seconds.figures["best"] == "lora r=8 rows=400"
    assert seconds.figures["gain_per_second"]["lora r=8 rows=400"] == pytest.approx(
        1.1 / 54, rel=0.02
    )
    assert not megabytes.measured
    assert seconds.measured


def test_only_the_clock_and_memory_are_measured(ranks: Study) -> None:
    slower = [
        t if t.cost is None else replace(t, cost=replace(t.cost, seconds=7.0)) for t in ranks.trials
    ]
    before, after = findings(ranks), findings(replace(ranks, trials=slower))
    assert [f for f in before if not f.measured] == [f for f in after if not f.measured]
    assert {finding.topic for finding in before if finding.measured} == {
        "seconds", "memory", "per second",
    }  # fmt: skip


def test_no_effect_is_not_found() -> None:
    """Five targets that do the same: no step, and nothing but the best's luck, is told apart."""
    varied = {"lora.target_modules": [["q"], ["k"], ["v"], "all"], SEED: SEEDS}
    study = grid(varied, lambda _: 2.0, seed_sd=0.01)
    found = only(study, "target_modules")
    assert [step["from"] for step in found.figures["steps"]] == ["q", "k", "v"]
    assert "better" not in found.text
    assert "worse" not in found.text
    assert only(study, "best").figures["not_distinguishable"]


def test_a_learning_rate_at_the_end_and_its_selection() -> None:
    varied = {"train.learning_rate": (1e-5, 1e-4, 1e-3), SEED: (0,)}
    study = grid(varied, lambda s: 2.0 - 0.1 * math.log10(s["train.learning_rate"]))
    found = only(study, "learning_rate")
    assert "It is the highest that was tried: a better one may lie beyond." in found.text
    chosen = only(study, "selection")
    assert "its learning rate was picked so" in chosen.text
    assert chosen.figures["picked_by_halves"] == ["lora learning_rate=0.001"] * 2
    assert chosen.figures["nll_picked_elsewhere"] == pytest.approx(chosen.figures["nll"])
    assert "Either half of the documents alone picks the same one" in chosen.text
    inside = grid(varied, lambda s: 2.0 + abs(math.log10(s["train.learning_rate"] / 1e-4)))
    assert "may lie beyond" not in only(inside, "learning_rate").text


def test_picking_among_equals_flatters() -> None:
    """Forty groups that are the same but for noise in their documents."""
    varied = {"lora.alpha": tuple(range(40)), SEED: (0,)}
    study = grid(varied, lambda _: 2.0)
    noisy = [
        t if t.method == "base" else replace(t, test=score(2.0, t.name, noise=0.5))
        for t in study.trials
    ]
    chosen = only(replace(study, trials=noisy), "selection")
    assert chosen.figures["nll"] < chosen.figures["nll_picked_elsewhere"] - 0.02
    assert "Picked on one half of the documents and measured on the other" in chosen.text
    assert "learning rate" not in chosen.text


def test_one_seed_is_said_once(ranks: Study) -> None:
    single = grid({"lora.r": (2, 4), SEED: (0,)}, lambda _: 2.0)
    texts = " ".join(finding.text for finding in findings(single))
    assert texts.count("how far another seed would move its figures is unknown") == 1
    assert "unknown" not in only(ranks, "seeds").text
    assert "With 3 seeds an interval can reach 4.3 standard errors" in only(ranks, "seeds").text


def test_what_seeds_do() -> None:
    found = only(grid({SEED: tuple(range(200))}, lambda _: 2.0, seed_sd=0.03), "seeds")
    assert found.figures["median"] == pytest.approx(0.03, rel=0.15)
    assert f"standard deviation of {found.figures['median']:.4f} nats/token" in found.text


def without(study: Study, **gone: Any) -> Study:
    """Trials of these settings fail."""
    wanted = {key.replace("__", "."): value for key, value in gone.items()}
    return replace(
        study,
        trials=[
            replace(
                t, test=None, curve=(), error="Traceback\n  ...\nValueError: no luck in /a/b/c.py"
            )
            if t.method != "base" and wanted.items() <= t.settings.items()
            else t
            for t in study.trials
        ],
    )


def test_failures_and_unequal_seeds(ranks: Study) -> None:
    study = without(ranks, lora__r=8, data__limit=400, train__seed=1)
    found = only(study, "failures")
    assert found.text == (
        "1 of 30 runs failed: method=lora,lora.r=8,data.limit=400,train.seed=1"
        " (ValueError: no luck in …/c.py)."
    )
    assert "Groups have 2 to 3 seeds" in only(study, "seeds").text
    step = only(study, "r").figures["steps"][2]
    assert (step["from"], step["to"], step["settings"]) == ("8", "16", 2)
    assert step["difference"]["seeds"] == 2  # those that both settings have
    assert not step["difference"]["interval95"][1] < 0


def test_a_setting_that_failed_is_left_out_of_its_steps(ranks: Study) -> None:
    study = without(ranks, lora__r=8, data__limit=400)
    steps = only(study, "r").figures["steps"]
    assert [step["settings"] for step in steps] == [2, 1, 1, 2]
    assert "averaged over 1 to 2 settings" in only(study, "r").text


def test_seeds_that_no_two_settings_share() -> None:
    study = grid({"lora.r": (2, 4), "data.limit": (400, 1200), SEED: (0, 1)}, diminishing)
    study = without(without(study, data__limit=400, train__seed=0), data__limit=1200, train__seed=1)
    (step,) = only(study, "r").figures["steps"]
    low, high = step["difference"]["interval95"]
    assert low < -0.1 < high < 0
    assert (step["settings"], step["difference"]["seeds"]) == (2, 1)


def test_other_documents_are_not_compared() -> None:
    study = grid({"data.max_length": (64, 128), "lora.r": (2, 8), SEED: (0,)}, lambda _: 2.0)
    cut = [
        t
        if t.method == "base"
        else replace(t, test=score(2.0, t.name, cut=t.settings["data.max_length"]))
        for t in study.trials
    ]
    study = replace(study, trials=cut)
    assert "no two of its 2 values can be compared" in only(study, "max_length").text
    step = only(study, "r").figures["steps"][0]
    assert step["settings"] == 1  # averages are of one kind of documents
    assert set(step["by_setting"]) == {"max_length=64", "max_length=128"}
    assert only(study, "selection").figures["groups"] == 2


def test_random_draws_have_no_steps() -> None:
    varied = {"lora.r": (2, 4, 8), "train.learning_rate": (1e-4, 2e-4, 3e-4), SEED: (0,)}
    trials = [
        trial("lora", 2.0 - r / 100, {"lora.r": r, "train.learning_rate": rate, SEED: 0})
        for r, rate in ((2, 1e-4), (4, 3e-4), (8, 2e-4))
    ]
    study = Study("sweep", [base(), *trials], varied)
    assert only(study, "r").figures["steps"] == []
    assert only(study, "best").figures["best"] == "lora r=8 learning_rate=0.0002"


def test_without_a_base() -> None:
    study = grid({"lora.r": (2, 8), SEED: SEEDS}, lambda s: 2.0 - s["lora.r"] / 100)
    study = replace(study, trials=study.trials[1:])
    topics = [finding.topic for finding in findings(study)]
    assert "best" in topics
    assert "per second" not in topics
    assert "against the base" not in only(study, "best").text


def test_one_document() -> None:
    """A difference without an interval is told as such."""

    def single(t: Trial) -> Trial:
        assert t.test is not None
        return replace(
            t,
            test=replace(
                t.test, nats=t.test.nats[:1], tokens_per_document=t.test.tokens_per_document[:1]
            ),
        )

    study = grid({"lora.r": (2, 8), SEED: (0,)}, lambda s: 2.0 - s["lora.r"] / 100)
    study = replace(study, trials=[single(t) for t in study.trials])
    assert "no interval" in only(study, "r").text
    assert "nll_picked_elsewhere" not in only(study, "selection").figures


def test_nothing_came_to_its_end() -> None:
    study = without(grid({"lora.r": (2, 8), SEED: SEEDS}, lambda _: 2.0))
    (found,) = findings(study)
    assert found.topic == "failures"
    assert found.figures["runs"] == 6
    assert "and 1 more" not in found.text


@settings(deadline=None, max_examples=25, derandomize=True)
@given(st.integers(0, 2**32))
def test_the_order_of_trials_makes_no_difference(seed: int) -> None:
    study = grid(
        {"lora.r": (2, 8), "lora.dora": (False, True), SEED: (0, 1)},
        lambda s: 2.0 - s["lora.r"] / 100,
    )
    trials = list(study.trials)
    random.Random(seed).shuffle(trials)
    assert findings(replace(study, trials=trials)) == findings(study)


@settings(deadline=None, max_examples=25, derandomize=True)
@given(
    st.lists(st.sampled_from((2, 4, 8, 16)), min_size=2, max_size=4, unique=True), st.integers(1, 3)
)
def test_identical_groups_are_never_distinguishable(ranks: list[int], seeds: int) -> None:
    same = {seed: score(2.0, str(seed)) for seed in range(seeds)}
    study = grid({"lora.r": ranks, SEED: tuple(range(seeds))}, lambda _: 2.0)
    study = replace(
        study,
        trials=[t if t.method == "base" else replace(t, test=same[t.seed]) for t in study.trials],
    )
    text = only(study, "r").text
    assert (
        text.count("+0.00 % [+0.00, +0.00] (+0.0000 nats/token), not distinguishable")
        >= len(ranks) - 1
    )
    assert len(only(study, "best").figures["not_distinguishable"]) == len(ranks) - 1


def test_every_figure_is_json(ranks: Study) -> None:
    for finding in findings(ranks):
        json.dumps(finding.figures, allow_nan=False)
        assert finding.text.endswith(".")
        assert finding.figures
        assert not np.any([sign in finding.text for sign in ("nan", "None", "  ")])

"""Findings of comparisons, and of runs that went wrong, in which the truth is planted."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from planted import PARAMETERS, base, curve, score, trial

from lorikeet.study.findings import Finding, findings
from lorikeet.study.findings.runs import fall
from lorikeet.study.record import SEED, Candidate, Study, Trial


def compare(lora: float = 2.0, full: float = 2.0, *, seeds: int = 3, **more: Any) -> Study:
    """LoRA and full fine-tuning, the losses that are planted, a second text."""
    trials = [base(other=score(4.0, "other", noise=0))]
    for seed in range(seeds):
        other = {"other": score(4.02, f"lora other {seed}")}
        trials.append(trial("lora", lora, {SEED: seed}, **other))
        whole = {"trainable": PARAMETERS, "saved_bytes": 4 * PARAMETERS, "r": None}
        forgotten = {"other": score(4.3, f"full other {seed}")}
        trials.append(trial("full", full, {SEED: seed}, **whole, **forgotten))
    return Study("compare", trials, {SEED: range(seeds)}, other_name="prose", **more)


def of(study: Study, topic: str) -> list[Finding]:
    return [finding for finding in findings(study) if finding.topic == topic]


def test_each_method_against_the_base() -> None:
    lora, full = of(compare(lora=2.1), "against the base")
    assert (lora.figures["method"], full.figures["method"]) == ("lora", "full")
    low, high = lora.figures["difference"]["interval95"]
    assert low < -0.9 < high < 0
    assert lora.figures["trainable_share"] == 0.008
    assert lora.figures["perplexity"] == pytest.approx(
        lora.figures["base_perplexity"] * lora.figures["difference"]["perplexity"]
    )
    assert ", better. It trains 0.800 % of the parameters." in lora.text
    assert "It trains 100 % of the parameters." in full.text


@pytest.mark.parametrize(
    ("lora", "full", "noise", "words", "not_worse"),
    [
        (2.0, 2.0, 0.02, "It is not worse by more than 1 % of perplexity", True),
        (1.9, 2.0, 0.02, "It is not worse by more than 1 % of perplexity", True),
        (2.1, 2.0, 0.02, "It is worse by more than 1 % of perplexity", False),
        (2.005, 2.0, 0.2, "Whether it is worse by more than 1 % of perplexity is open", False),
    ],
)
def test_not_worse_than_full(
    lora: float, full: float, noise: float, words: str, not_worse: bool
) -> None:
    study = compare(lora, full)
    study = replace(
        study,
        trials=[
            t
            if t.method == "base"
            else replace(t, test=score({"lora": lora, "full": full}[t.method], t.name, noise=noise))
            for t in study.trials
        ],
    )
    (found,) = of(study, "against full")
    assert words in found.text
    assert found.figures["not_worse"] is not_worse
    assert found.figures["margin"] == 0.01
    low, high = found.figures["difference"]["interval95"]
    assert low < lora - full < high
    assert (high <= math.log(1.01)) is not_worse
    assert "It trains 0.800 % of full's parameters." in found.text


def test_variants_are_compared_with_lora() -> None:
    study = compare()
    variants = [trial("dora", 1.9, {SEED: seed}) for seed in range(3)]
    study = replace(study, trials=[*variants, *study.trials])
    assert [f.figures["method"] for f in of(study, "against full")] == ["lora", "dora"]
    (found,) = of(study, "against lora")
    assert found.figures["method"] == "dora"
    assert ", better." in found.text
    assert "parameters" not in found.text  # it trains as many


def test_what_was_forgotten() -> None:
    lora, full = of(compare(), "forgetting")
    assert lora.text.startswith("lora: on prose perplexity +2.0 %")
    assert "some was forgotten" in lora.text
    assert lora.figures["against_base"]["nll"] == pytest.approx(0.02, abs=0.005)
    assert lora.figures["against_full"]["interval95"][1] < -0.2
    assert full.figures["against_base"]["nll"] == pytest.approx(0.3, abs=0.005)
    assert "Against full" not in full.text
    none = [replace(t, other=None) for t in compare().trials]
    assert of(replace(compare(), trials=none), "forgetting") == []


def test_the_learning_rates_that_were_picked() -> None:
    tried = [
        Candidate("lora", 1e-3, 2.2, False),
        Candidate("lora", 1e-4, 2.1, False),
        Candidate("lora", 3e-4, 2.0, True),
        Candidate("full", 1e-5, 2.5, False),
        Candidate("full", 3e-5, 2.0, True),
        Candidate("full", 1e-4, None, False),
        Candidate("dora", 2e-4, 2.0, True),
    ]
    dora, full, lora = of(compare(candidates=tried), "learning rates")
    assert dora.text == "dora: 2e-4, the only one that was tried."
    assert lora.text == (
        "lora: 3e-4 was picked out of 3 learning rates from 1e-4 to 1e-3; the next best was 0.1000"
        " nats/token behind."
    )
    assert full.text.endswith("0.5000 nats/token behind. 1e-4 failed.")
    assert not full.figures["at_end"]
    (found,) = of(compare(candidates=tried[3:5]), "learning rates")
    assert found.figures["at_end"]
    assert "It is the highest of them: a better one may lie beyond." in found.text


def test_what_is_cheapest() -> None:
    study = compare()
    trained, saved = of(study, "parameters")[0], of(study, "size")[0]
    assert trained.figures["ratios"] == {"lora": 1.0, "full": 125.0}
    assert trained.text == "Fewest trained parameters: lora, 8,000; full takes 125 times as much."
    assert saved.text == "Least to save: lora, 32.0 kB; full takes 125 times as much."
    assert not trained.measured and not saved.measured
    slow = [
        replace(t, cost=replace(t.cost, seconds=100.0 * (1 + (t.method == "full"))))
        if t.cost
        else t
        for t in study.trials
    ]
    (found,) = of(replace(study, trials=slow), "seconds")
    assert found.text == "Fewest seconds in steps: lora, 100; full takes 2.00 times as much."
    assert found.measured
    # A clock that differs as much between seeds tells no method from the other.
    noisy = [
        replace(t, cost=replace(t.cost, seconds=100.0 + 40 * t.seed + 3 * (t.method == "full")))
        if t.cost
        else t
        for t in study.trials
    ]
    (found,) = of(replace(study, trials=noisy), "seconds")
    assert found.text == "Fewest seconds in steps: lora, 140; not told from that: full."
    assert found.figures["not_told_from_least"] == ["full"]
    assert of(replace(study, trials=[replace(t, cost=None) for t in study.trials]), "seconds") == []


def test_one_method_has_fewer_seeds() -> None:
    study = compare(lora=2.1)
    kept = [t for t in study.trials if (t.method, t.seed) != ("full", 2)]
    (found,) = of(replace(study, trials=kept), "against full")
    low, high = found.figures["difference"]["interval95"]
    assert low < 0.1 < high
    assert low > 0


def changed(study: Study, method: str, seed: int, **values: Any) -> Study:
    return replace(
        study,
        trials=[
            replace(t, **values) if (t.method, t.seed) == (method, seed) else t
            for t in study.trials
        ],
    )


NAME = "method=lora,train.seed=1"


def test_all_runs_learnt() -> None:
    (found,) = of(compare(), "convergence")
    assert found.text.startswith("All 6 runs learnt")
    assert found.figures["falls"][NAME]["fall"] == pytest.approx(0.9, abs=0.1)
    assert "least)." in found.text


def test_a_loss_that_does_not_fall() -> None:
    study = changed(compare(), "lora", 1, curve=curve(3.0, 3.0), test=score(3.0, "flat"))
    (found,) = of(study, "convergence")
    assert found.text.startswith("Of 1 run of 6 the training loss cannot be seen to fall")
    assert found.figures["flat"] == [NAME]


def test_a_flat_curve_whose_model_got_better_is_no_alarm() -> None:
    study = changed(compare(), "lora", 1, curve=curve(3.0, 3.2))
    (found,) = of(study, "convergence")
    assert found.text.startswith("All 6 runs learnt: of 5 the training loss fell")
    assert found.text.endswith(
        ", and 1 run whose training loss cannot be seen to fall is better than the base on the test"
        " rows."
    )
    assert found.figures["flat_but_better"] == [NAME]


def test_a_run_that_ends_above_the_base() -> None:
    study = changed(compare(), "lora", 1, test=score(3.3, "worse"))
    found = of(study, "convergence")[0]
    assert found.text.startswith(f"1 run is worse than the base model on the test rows: {NAME}")
    assert found.figures["worse_than_base"][NAME]["nll"] == pytest.approx(0.3, abs=0.01)


def test_a_loss_that_is_no_number() -> None:
    worst = score(2.0, "x")
    study = changed(compare(), "lora", 1, test=replace(worst, nats=worst.nats * np.inf))
    found = of(study, "convergence")[0]
    assert found.text == f"The loss of {NAME} is not finite."
    assert [f.figures["method"] for f in of(study, "against the base")] == ["full"]
    study = changed(compare(), "lora", 1, curve=[(1, 2.0), (2, math.nan)])
    assert of(study, "convergence")[0].figures["not_finite"] == [NAME]


@pytest.mark.parametrize(("last", "risen"), [(2.04, True), (2.004, False), (1.9, False)])
def test_validation_that_rises_at_the_end(last: float, risen: bool) -> None:
    seen = [(10, 2.5), (20, 2.0), (30, last)]
    found = of(changed(compare(), "lora", 1, evaluations=seen), "convergence")
    told = [finding for finding in found if "risen" in finding.figures]
    assert bool(told) is risen
    if told:
        assert f"{NAME} (from 2.0000 at step 20 to {last:.4f})" in told[0].text


def test_how_far_a_loss_fell() -> None:
    """By hand: thirds of 3 and 3, means 4 and 1, variances 1 and 1, df 4: 2.776 sqrt(2 / 3)."""
    by, reach = fall(list(enumerate([3.0, 4.0, 5.0, 0.0, 1.0, 2.0]))) or (0, 0)
    assert by == pytest.approx(3)
    assert reach == pytest.approx(2.7764451 * math.sqrt(2 / 3))
    assert fall([(1, 2.0)] * 5) is None
    assert fall([(1, 2.0)] * 6) == (0.0, 0.0)


def test_a_flat_loss_is_called_so_as_often_as_it_should() -> None:
    random = np.random.default_rng(5)
    alarms = 0
    for _ in range(400):
        by, reach = fall(list(enumerate(2 + 0.3 * random.normal(size=80)))) or (0, 0)
        alarms += by > reach
    assert alarms / 400 < 0.05  # one side of a 95 % interval


def test_six_failures_are_not_cut_short_and_eight_are() -> None:
    failed = [
        Trial(f"run {i}", "lora", {SEED: i}, seed=i, error=f"the disk is full ({i})")
        for i in range(8)
    ]
    study = compare()
    (six,) = of(replace(study, trials=[*study.trials, *failed[:6]]), "failures")
    (eight,) = of(replace(study, trials=[*study.trials, *failed]), "failures")
    assert "more" not in six.text
    assert eight.text.endswith("run 4 (the disk is full (4)) and 3 more.")
    assert len(eight.figures["failed"]) == 8


def test_a_loss_beyond_what_a_perplexity_can_be_is_still_told() -> None:
    """exp(710) is more than a float can hold."""
    assert "inf" in of(compare(lora=2000.0), "against full")[0].text

"""Intervals hold the truth as often as they say, by simulation; and figures by hand."""

from __future__ import annotations

import json
import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated import Setting, Sides, coverage

from lorikeet.evaluate import Score, paired_difference, student_t95
from lorikeet.study.statistics import Estimate, difference, estimate, interval

KINDS = ("estimate", "base", "pair")


def some(documents: int = 40, seeds: int = 3, *, seed: int = 0, sd: float = 0.1) -> list[Score]:
    draw = np.random.default_rng(seed)
    tokens = np.random.default_rng(99).integers(5, 80, documents)
    level = 2 + 0.3 * np.random.default_rng(98).normal(size=documents)
    return [
        Score(tokens * (level + sd * draw.normal() + sd * draw.normal(size=documents)), tokens, 0)
        for _ in range(seeds)
    ]


def typical() -> list[Setting]:
    """Few and many documents; one seed, seeds that do nothing, as much as documents, half that."""
    return [
        Setting(kind, documents, seeds, sd, spread, heavy)
        for kind, (documents, spread), (seeds, sd, heavy) in product(
            KINDS,
            [(30, 0.8), (150, 0.15), (300, 0.8)],
            [(1, 0.0, False), (3, 0.0, True), (3, 1.0, False), (5, 0.5, True)],
        )
    ]


def test_intervals_cover_the_truth() -> None:
    """36 settings, 1,500 studies each: 0.6 % of standard error a setting."""
    found = {setting: coverage(setting, interval, studies=1500) for setting in typical()}
    off = {setting: share for setting, share in found.items() if not 0.92 <= share <= 0.98}
    assert off == {}
    assert 0.945 <= float(np.mean(list(found.values()))) <= 0.965


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*KINDS, "unequal"])
@pytest.mark.parametrize("seeds", [1, 2, 3, 5])
def test_intervals_cover_the_truth_wherever_looked(kind: str, seeds: int) -> None:
    """Single settings within 93 to 97 % but for the chance of 3,000 studies, their means within
    93.5 to 97.2 %. Two seeds are at 92 % where they are nearly all that matters."""
    if kind == "unequal" and seeds < 3:
        pytest.skip("two seeds against two are a pair, one against two is a base")
    studies, chance = 3000, 3.5
    least, most = (0.92, 0.98) if seeds == 2 else (0.93, 0.97)
    low, high = (
        end + sign * chance * math.sqrt(end * (1 - end) / studies)
        for end, sign in ((least, -1), (most, 1))
    )
    for sd in (0.0,) if seeds == 1 else (0.0, 0.5, 1.0, 2.0, 4.0):
        found = {}
        for spread, heavy, documents in product((0.15, 0.8), (False, True), (30, 150, 300)):
            setting = Setting(kind, documents, seeds, sd, spread, heavy)
            found[setting] = coverage(setting, interval, studies=studies)
        assert {s: share for s, share in found.items() if not low <= share <= high} == {}
        mean = float(np.mean(list(found.values())))
        assert (0.92 if seeds == 2 else 0.935) <= mean <= (0.975 if seeds == 2 else 0.972)


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [3, 5])
def test_noise_alone_is_not_taken_for_more_than_it_is(seeds: int) -> None:
    """Two methods that are the same in every document: there the intervals are conservative."""
    for sd, crossed in product((0.0, 1.0, 2.0), (1.0, 3.0)):
        setting = Setting("base", 100, seeds, sd, 0.5, True, crossed)
        assert coverage(setting, interval, studies=3000) >= 0.93


def over_documents(sides: Sides, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The rejected way: the seeds' mean as if it were one score, and the normal's quantile."""
    mean, total, n = sides[0].mean(-2), tokens.sum(-1), tokens.shape[-1]
    nll = mean.sum(-1) / total
    residuals = mean - nll[:, None] * tokens
    return nll, np.sqrt(n / (n - 1) * (residuals**2).sum(-1)) / total, np.full_like(nll, 1.96)


def over_seeds(sides: Sides, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The other rejected way: a t interval of the seeds' losses, the documents taken as all."""
    level = sides[0].sum(-1) / tokens.sum(-1)[:, None]
    seeds = level.shape[-1]
    t = np.full(len(level), student_t95(seeds - 1))
    return level.mean(-1), level.std(-1, ddof=1) / math.sqrt(seeds), t


def test_simpler_ways_do_not() -> None:
    """Documents alone are too narrow where seeds differ, seeds alone where they do not."""
    apart, alike = (Setting("base", 150, 3, sd) for sd in (2.0, 0.0))
    assert coverage(apart, over_documents, studies=1000) < 0.85
    assert coverage(alike, over_seeds, studies=1000) < 0.6
    assert coverage(apart, interval, studies=1000) > 0.93
    assert coverage(alike, interval, studies=1000) > 0.93


def test_one_seed_by_hand() -> None:
    """Ratio 2, residuals 1, -1, 0, 0 over 1 - 0.1, 1 - 0.3: the jackknife's variance."""
    found = estimate([Score(np.array([3.0, 5.0, 4.0, 8.0]), np.array([1, 3, 2, 4]), 0)])
    assert found.nll == 2
    squares = 1 / 0.9**2 + 1 / 0.7**2
    assert found.stderr == pytest.approx(math.sqrt(3 / 4 * squares) / 10)
    kurtosis = 4 * (1 / 0.9**4 + 1 / 0.7**4) / squares**2
    df = min(8 / (kurtosis - 1 / 3), 3)
    assert found.df == pytest.approx(df, rel=1e-6)
    assert found.high == pytest.approx(2 + student_t95(df) * found.stderr)
    assert (found.documents, found.seeds) == (4, 1)


def test_the_jackknife_is_that_of_leaving_documents_out() -> None:
    """Linearised residuals over one minus the share are the exact leave-one-out differences."""
    (score,) = some(seeds=1)
    nats, tokens, n = score.nats, score.tokens_per_document, len(score.nats)
    without = (nats.sum() - nats) / (tokens.sum() - tokens)
    expected = math.sqrt((n - 1) / n * ((without - score.nll) ** 2).sum())
    assert estimate([score]).stderr == pytest.approx(expected)


@pytest.mark.parametrize("documents", [2, 5, 40])
def test_one_seed_has_the_evaluators_own_interval(documents: int) -> None:
    first, second = some(documents, 2, seed=3)
    theirs, ours = paired_difference(first, second), difference([first], [second])
    assert ours.nll == pytest.approx(theirs.nll)
    assert ours.stderr == pytest.approx(theirs.stderr)
    assert (ours.low, ours.high) == pytest.approx(theirs.interval)
    assert ours.df == pytest.approx(theirs.df, rel=1e-6)


def test_seeds_widen_the_interval_and_never_narrow_it() -> None:
    """The seeds' share comes on top of the documents', which is what one mean score would have."""
    for seed in range(20):
        scores = some(seed=seed)
        mean = Score(
            np.mean([score.nats for score in scores], axis=0), scores[0].tokens_per_document, 0
        )
        with_seeds, without = estimate(scores), estimate([mean])
        assert with_seeds.stderr is not None and without.stderr is not None
        assert with_seeds.nll == pytest.approx(without.nll)
        assert with_seeds.stderr >= without.stderr * (1 - 1e-12)
        levels = [score.nll for score in scores]
        assert with_seeds.stderr >= np.std(levels, ddof=1) / math.sqrt(3) * (1 - 1e-12)
        assert with_seeds.df is not None and without.df is not None
        assert with_seeds.df <= without.df + 1e-6


def test_seeds_that_differ_by_a_level_alone() -> None:
    """Documents the same under every seed: the variance is the sum of both sources."""
    (score,) = some(seeds=1)
    tokens = score.tokens_per_document
    scores = [Score(score.nats + level * tokens, tokens, 0) for level in (-0.3, 0.1, 0.2)]
    alone = estimate([score]).stderr or 0
    seeds = np.var([-0.3, 0.1, 0.2], ddof=1) / 3
    assert estimate(scores).stderr == pytest.approx(math.sqrt(alone**2 + seeds))


def by_loops(scores: list[Score]) -> tuple[float, float]:
    """Variance of the mean and t, term by term: the slow and obvious way."""
    tokens = scores[0].tokens_per_document
    seeds, n, total = len(scores), len(tokens), float(tokens.sum())
    level = [float(score.nats.sum()) / total for score in scores]
    nll = sum(level) / seeds
    mean = [sum(float(score.nats[d]) for score in scores) / seeds for d in range(n)]
    out = [(mean[d] - nll * tokens[d]) / (1 - tokens[d] / total) for d in range(n)]
    documents = (n - 1) / n * sum(e**2 for e in out) / total**2
    kurtosis = n * sum(e**4 for e in out) / sum(e**2 for e in out) ** 2
    t = student_t95(min(max(2 * n / (kurtosis - (n - 3) / (n - 1)), 1), n - 1))
    between = sum((one - nll) ** 2 for one in level) / (seeds - 1) / seeds
    crossed = 0.0
    for s, d in product(range(seeds), range(n)):
        crossed += (scores[s].nats[d] - mean[d] - (level[s] - nll) * tokens[d]) ** 2
    crossed *= n / (n - 1) / total**2 / (seeds - 1) / seeds
    variance = documents + max(between - min(crossed, documents), 0)
    share = between / variance
    return variance, t + share**1.5 * (student_t95(seeds - 1) - t)


@pytest.mark.parametrize("sd", [0.0, 0.02, 0.1, 0.5])
def test_variance_and_quantile_against_loops(sd: float) -> None:
    for seed in range(5):
        scores = some(25, 4, seed=seed, sd=sd)
        found = estimate(scores)
        variance, t = by_loops(scores)
        assert found.stderr == pytest.approx(math.sqrt(variance))
        assert found.high is not None and found.stderr is not None
        assert (found.high - found.nll) / found.stderr == pytest.approx(t)
        assert found.df is not None
        assert student_t95(found.df) == pytest.approx(t)


def test_unequal_seeds_against_loops() -> None:
    """Both sides' seeds add, with Welch's degrees of freedom."""
    ours, theirs = some(25, 4, seed=1, sd=0.3), some(25, 2, seed=2, sd=0.3)
    tokens = ours[0].tokens_per_document
    between, crossed = [], []
    for side in (ours, theirs):
        mean = np.mean([score.nats for score in side], axis=0)
        level = np.array([score.nll for score in side])
        rest = [s.nats - mean - (s.nll - level.mean()) * tokens for s in side]
        between.append(level.var(ddof=1) / len(side))
        squares = sum(float((r**2).sum()) for r in rest) * 25 / 24 / tokens.sum() ** 2
        crossed.append(squares / (len(side) - 1) / len(side))
    gap = [np.mean([score.nats for score in side], axis=0) for side in (ours, theirs)]
    documents = estimate([Score(gap[0] - gap[1], tokens, 0)]).stderr or 0
    variance = documents**2 + sum(between) - min(sum(crossed), documents**2)
    welch = sum(between) ** 2 / (between[0] ** 2 / 3 + between[1] ** 2)
    found = difference(ours, theirs)
    assert found.stderr == pytest.approx(math.sqrt(variance))
    low = estimate([Score(gap[0] - gap[1], tokens, 0)]).df or 0
    share = (sum(between) / variance) ** 1.5
    t = student_t95(low) + share * (student_t95(welch) - student_t95(low))
    assert found.high is not None and found.stderr is not None
    assert (found.high - found.nll) / found.stderr == pytest.approx(t)


def test_pairs_of_seeds_take_out_what_a_seed_does_to_both() -> None:
    """A seed that moves both sides alike moves no difference; independent seeds would."""
    base, tokens = some(), some()[0].tokens_per_document
    better = [Score(score.nats - 0.05 * tokens, tokens, 0) for score in base]
    paired = difference(better, base)
    assert paired.nll == pytest.approx(-0.05)
    assert paired.stderr == pytest.approx(0, abs=1e-9)
    unequal = difference(better, base[:2])
    assert not unequal.distinguishable
    assert unequal.seeds == 3


def test_one_score_is_the_same_for_every_seed() -> None:
    scores, (base,) = some(), some(seeds=1, seed=7)
    once, thrice = difference(scores, [base]), difference(scores, [base] * 3)
    assert once == thrice
    back = difference([base], scores)
    assert (back.nll, back.low, back.high) == pytest.approx(
        (-once.nll, -(once.high or 0), -(once.low or 0))
    )


@settings(deadline=None, max_examples=25, derandomize=True)
@given(st.integers(2, 30), st.integers(1, 4), st.integers(0, 1000))
def test_identical_groups_are_never_distinguishable(documents: int, seeds: int, seed: int) -> None:
    scores = some(documents, seeds, seed=seed)
    found = difference(scores, scores)
    assert (found.nll, found.low, found.high) == (0, 0, 0)
    assert not found.distinguishable


@settings(deadline=None, max_examples=25, derandomize=True)
@given(st.permutations(range(4)), st.permutations(range(40)))
def test_the_order_of_seeds_and_documents_makes_no_difference(
    seeds: list[int], documents: list[int]
) -> None:
    scores, others = some(seeds=4), some(seeds=4, seed=5)

    def turned(given: list[Score]) -> list[Score]:
        return [
            Score(given[i].nats[documents], given[i].tokens_per_document[documents], 0)
            for i in seeds
        ]

    before, after = difference(scores, others), difference(turned(scores), turned(others))
    assert (after.nll, after.low, after.high) == pytest.approx(
        (before.nll, before.low, before.high)
    )


def test_what_has_no_interval() -> None:
    single = estimate([Score(np.array([4.0]), np.array([2]), 0)] * 3)
    assert single == Estimate(2.0, None, None, None, None, 1, 3)
    assert not single.distinguishable
    assert single.perplexity_interval is None
    assert str(single) == "2.0000 nats/token"
    first, *others = some()
    broken = Score(first.nats * math.inf, first.tokens_per_document, 0)
    for found in (estimate([broken, *others]), difference([broken, *others], [first])):
        assert found.low is None
        assert found.summary()["nll"] is None
        json.dumps(found.summary(), allow_nan=False)
    far = estimate([Score(first.nats * 1e4, first.tokens_per_document, 0)])
    assert far.perplexity == math.inf
    json.dumps(far.summary(), allow_nan=False)


def test_what_is_shown() -> None:
    found = estimate(some())
    assert found.low is not None and found.high is not None
    assert found.perplexity_interval == (math.exp(found.low), math.exp(found.high))
    assert found.perplexity == math.exp(found.nll)
    assert str(found) == (
        f"{found.nll:.4f} nats/token, 95 % interval [{found.low:.4f}, {found.high:.4f}]"
    )
    assert found.summary()["interval95"] == [found.low, found.high]
    assert found.distinguishable  # from 0
    json.dumps(found.summary(), allow_nan=False)


def test_scores_of_other_documents_are_refused() -> None:
    first, other = some(40), some(39)
    for wrong in (lambda: estimate([*first, *other]), lambda: difference(first, other)):
        with pytest.raises(ValueError, match="not of the same documents"):
            wrong()
    for empty in (
        lambda: estimate([]),
        lambda: difference(first, []),
        lambda: difference([], first),
    ):
        with pytest.raises(ValueError, match="no score"):
            empty()

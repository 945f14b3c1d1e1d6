"""Statistics of loss curves: on noise they are silent, on a fault they are not."""

from __future__ import annotations

import numpy as np
import pytest

from lorikeet.study.doctor.curves import (
    SHORTEST,
    WINDOW,
    falls_of_evaluations,
    falls_of_steps,
    largest_rise,
)
from lorikeet.study.doctor.facts import Curve
from lorikeet.study.doctor.learning import RISE, RISE_MARGIN, RISE_Z, STILL, STILL_Z


def curve(loss: np.ndarray, *, rate: np.ndarray | None = None) -> Curve:
    n = len(loss)
    return Curve(loss, np.ones(n) if rate is None else rate, np.ones(n), np.full(n, 100.0))


def noisy(level: np.ndarray, seed: int, *, noise: float = 0.06) -> np.ndarray:
    """Losses whose batches differ by so much, as rows of Dolly do."""
    return level * np.exp(noise * np.random.default_rng(seed).standard_normal(len(level)))


def rises(loss: np.ndarray) -> bool:
    rise = largest_rise(curve(loss))
    assert rise is not None
    sure = rise.z >= max(RISE_Z, rise.chance + RISE_MARGIN)
    return sure and rise.high - rise.low >= RISE * loss[0]


@pytest.mark.parametrize("steps", [20, 100, 1000, 10_000])
def test_noise_is_no_rise(steps: int) -> None:
    spent = np.linspace(0, 1, steps)
    level = 2 + 2 * np.exp(-4 * spent)
    assert sum(rises(noisy(level, seed)) for seed in range(100)) <= 1
    assert sum(rises(noisy(np.full(steps, 4.0), seed)) for seed in range(100)) <= 1


@pytest.mark.parametrize("steps", [20, 100, 1000])
def test_a_loss_that_doubles_is_a_rise(steps: int) -> None:
    spent = np.linspace(0, 1, steps)
    level = 4 + 4 * np.exp(-(((spent - 0.4) / 0.2) ** 2))
    assert all(rises(noisy(level, seed)) for seed in range(50))


def test_rare_hard_batches_are_no_rise() -> None:
    """Rows that are nearly learnt but for one in six: the loss jumps a thousandfold."""
    for seed in range(50):
        hard = np.random.default_rng(seed).random(300) < 1 / 6
        loss = np.where(hard, 0.8, 0.001) + 8 * np.exp(-np.arange(300) / 10)
        assert not rises(noisy(loss, seed))


def test_a_short_run_says_nothing() -> None:
    few = curve(np.ones(SHORTEST - 1))
    assert largest_rise(few) is None
    assert falls_of_steps(few) is None


def test_the_largest_rise_is_where_it_is() -> None:
    loss = np.full(100, 4.0)
    loss[60:80] = 6.0
    rise = largest_rise(curve(noisy(loss, 0, noise=0.01)))
    assert rise is not None
    assert abs(rise.step - 61) <= WINDOW
    assert rise.low == pytest.approx(4, rel=0.02)
    assert rise.high == pytest.approx(6, rel=0.02)


def test_a_base_that_was_measured_is_the_start() -> None:
    loss = noisy(np.full(50, 6.0), 0, noise=0.02)  # the first step has already jumped
    assert not rises(loss)
    rise = largest_rise(curve(loss), start=4.0)
    assert rise is not None
    assert rise.low == pytest.approx(4.0)
    assert rise.z > 20


def test_falls_of_a_straight_line_and_of_a_bend() -> None:
    """Over the learning rate spent, whatever the schedule."""
    n = 200
    rate = 0.5 * (1 + np.cos(np.pi * np.arange(n) / n))
    spent = curve(np.ones(n), rate=rate).spent
    straight = falls_of_steps(curve(noisy(5 - 2 * spent, 0, noise=0.02), rate=rate))
    bent = falls_of_steps(curve(noisy(3 + 2 * np.exp(-5 * spent), 0, noise=0.02), rate=rate))
    assert straight is not None
    assert bent is not None
    assert straight.before == pytest.approx(1, abs=0.1)
    assert straight.after == pytest.approx(1, abs=0.1)
    value, error = straight.excess(STILL)
    assert value == pytest.approx(1, abs=3 * error)  # slopes 2 and 2: 2 - half of 2
    assert value > STILL_Z * error
    value, error = bent.excess(STILL)
    assert value < 0


def test_the_error_of_an_excess_is_right() -> None:
    """As often as 5 % says does noise pass for a line of half the slope."""
    n = 120
    spent = np.arange(n) / n
    level = 5 - 2 * np.minimum(spent, 0.5) - 1 * np.maximum(spent - 0.5, 0)
    above = 0
    for seed in range(400):
        loss = level + 0.2 * np.random.default_rng(seed).standard_normal(n)
        falls = falls_of_steps(curve(loss))
        assert falls is not None
        value, error = falls.excess(STILL)
        above += value > STILL_Z * error
    assert 8 <= above <= 34  # 20 expected


def test_falls_of_evaluations() -> None:
    ten = curve(np.ones(10))
    falls = falls_of_evaluations(ten, [(2, 3.5), (5, 3.0), (10, 2.5)], base=4.0)
    assert falls is not None
    assert falls.place == pytest.approx(0.5)
    assert (falls.before, falls.after) == (1.0, 0.5)
    assert falls.excess(STILL) == (0.0, 0.0)
    assert falls_of_evaluations(ten, [(10, 2.5)], base=4.0) is None
    assert falls_of_evaluations(ten, [(5, 2.5)], base=4.0) is None  # stopped before the end

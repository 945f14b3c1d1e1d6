"""The learning rate at chosen steps."""

from __future__ import annotations

import math

import pytest

from lorikeet.train import Schedule


def values(schedule: Schedule, *steps: int) -> list[float]:
    return [schedule(step) for step in steps]


def test_cosine() -> None:
    schedule = Schedule(1.0, 100, "cosine")
    expected = [1.0, 0.5 * (1 + math.cos(math.pi / 4)), 0.5, 0.5 * (1 + math.cos(0.99 * math.pi))]
    assert values(schedule, 0, 25, 50, 99) == pytest.approx(expected)


def test_linear() -> None:
    assert values(Schedule(2.0, 10, "linear"), 0, 5, 9) == pytest.approx([2.0, 1.0, 0.2])


def test_constant() -> None:
    schedule = Schedule(3e-4, 10, "constant", warmup=2)
    assert values(schedule, 0, 1, 2, 9) == pytest.approx([1e-4, 2e-4, 3e-4, 3e-4])


@pytest.mark.parametrize("warmup", [10, 0.1])
def test_warmup_in_steps_and_as_a_share(warmup: float) -> None:
    schedule = Schedule(1.1, 100, "cosine", warmup=warmup)
    assert schedule.warmup_steps == 10
    assert values(schedule, 0, 4, 9, 10) == pytest.approx([0.1, 0.5, 1.0, 1.1])
    assert schedule(55) == pytest.approx(1.1 / 2)


def test_warmup_longer_than_the_run() -> None:
    rates = values(Schedule(1.0, 5, "cosine", warmup=10), *range(5))
    assert rates == pytest.approx([k / 11 for k in range(1, 6)])


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("total", [1, 2, 7, 50])
@pytest.mark.parametrize("warmup", [0.0, 0.03, 0.5, 1, 3])
def test_every_step_learns(kind: str, total: int, warmup: float) -> None:
    schedule = Schedule(1.0, total, kind, warmup)
    rates = [schedule(step) for step in range(total)]
    assert all(0 < rate <= 1 for rate in rates)
    rising, falling = rates[: schedule.warmup_steps], rates[schedule.warmup_steps :]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)

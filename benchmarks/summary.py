"""From answers to figures: rates, ratios of the same round, their medians and spread."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.contestants import GEMM, Contestant
from benchmarks.protocol import Answer
from benchmarks.roofline import Shape, base_operations, step_operations
from benchmarks.workload import StepSize

LOSS_TOLERANCE = 0.01
"""The first losses of all contestants are those of the same weights on the same rows: farther apart
than this, relatively, they did not do the same."""


@dataclass(frozen=True)
class Spread:
    """Of the rounds' figures: how many, median, quartiles, extremes."""

    count: int
    median: float
    q1: float
    q3: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """Quartiles interpolate between the values; of a single one all five are that one."""
        q1, median, q3 = (
            statistics.quantiles(values, n=4, method="inclusive")
            if len(values) > 1
            else [values[0]] * 3
        )
        return Spread(len(values), median, q1, q3, min(values), max(values))


@dataclass(frozen=True)
class Deviation:
    """How far a curve of loss is from another, relatively.

    Attributes:
        largest: of a single step, without sign.
        step: which one, from 0.
        mean: of the curves' means, with sign.
    """

    largest: float
    step: int
    mean: float

    @staticmethod
    def of(curve: Sequence[float], reference: Sequence[float]) -> Deviation:
        """Compare step by step; both have the same length."""
        apart = [abs(a - b) / abs(b) for a, b in zip(curve, reference, strict=True)]
        largest = max(apart)
        mean = statistics.mean(curve) / statistics.mean(reference) - 1
        return Deviation(largest, apart.index(largest), mean)


@dataclass(frozen=True)
class Figures:
    """A contestant's line.

    Attributes:
        tokens_per_second: of the whole optimizer step.
        seconds: of a step.
        reference_is_faster: its seconds divided by the reference's in the same round.
        share_of_roofline: least possible time, at the rate of the same round, divided by its time.
        first_loss: nats per supervised token of the first step of all, warm-up included.
    """

    tokens_per_second: Spread
    seconds: Spread
    reference_is_faster: Spread
    share_of_roofline: Spread
    first_loss: float


@dataclass(frozen=True)
class Summary:
    """A workload's table.

    Attributes:
        figures: by contestant.
        reference: whom the others are compared with.
        gemm_rate: operations a second of the model's own products.
        roofline: tokens a second that this rate allows, by method.
        tokens: mean tokens of the measured steps.
        supervised: mean supervised tokens of them.
        warnings: what makes the figures doubtful.
    """

    figures: dict[str, Figures]
    reference: str
    gemm_rate: Spread
    roofline: dict[str, Spread]
    tokens: float
    supervised: float
    warnings: list[str]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def summarise(
    contestants: Sequence[Contestant],
    answers: Mapping[str, Sequence[Answer]],
    sizes: Sequence[StepSize],
    shape: Shape,
    *,
    r: int,
    warmup: int,
) -> Summary:
    """Figures of the rounds after the warm-up.

    Args:
        contestants: who took part; the first is the reference.
        answers: of every contestant and of `gemm`, one for each round.
        sizes: of each round's step.
        shape: the model's.
        r: rank of LoRA.
        warmup: rounds that do not count.
    """
    rounds = range(warmup, len(sizes))
    seconds = {name: [given[k].seconds for k in rounds] for name, given in answers.items()}
    steps = [sizes[k] for k in rounds]
    rates = [base_operations(shape, s) / t for s, t in zip(steps, seconds[GEMM.name], strict=True)]
    least = {
        method: [
            step_operations(shape, s, method=method, r=r) / rate
            for s, rate in zip(steps, rates, strict=True)
        ]
        for method in sorted({c.method for c in contestants if c.method})
    }
    reference = contestants[0].name
    figures = {}
    for contestant in contestants:
        assert contestant.method
        times = seconds[contestant.name]
        figures[contestant.name] = Figures(
            tokens_per_second=Spread.of([s.tokens / t for s, t in zip(steps, times, strict=True)]),
            seconds=Spread.of(times),
            reference_is_faster=_ratios(times, seconds[reference]),
            share_of_roofline=_ratios(least[contestant.method], times),
            first_loss=answers[contestant.name][0].loss or 0.0,
        )
    return Summary(
        figures=figures,
        reference=reference,
        gemm_rate=Spread.of(rates),
        roofline={
            method: Spread.of([s.tokens / t for s, t in zip(steps, times, strict=True)])
            for method, times in least.items()
        },
        tokens=statistics.mean(s.tokens for s in steps),
        supervised=statistics.mean(s.supervised for s in steps),
        warnings=_doubts(figures),
    )


def _ratios(over: Sequence[float], under: Sequence[float]) -> Spread:
    return Spread.of([a / b for a, b in zip(over, under, strict=True)])


def _doubts(figures: Mapping[str, Figures]) -> list[str]:
    losses = {name: line.first_loss for name, line in figures.items()}
    if max(losses.values()) - min(losses.values()) <= LOSS_TOLERANCE * max(losses.values()):
        return []
    shown = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
    return [f"the contestants do not start from the same loss: {shown}"]

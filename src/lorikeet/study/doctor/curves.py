"""What a curve of losses says against its own noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lorikeet.study.doctor.facts import Curve

WINDOW = 5
"""Steps that are taken together before losses are compared: enough that one batch of hard rows
does not count as a rise, few enough that the first steps of a run still make a window."""

SHORTEST = 2 * WINDOW
"""Steps below which there are not two windows to compare."""


@dataclass(frozen=True)
class Rise:
    """The largest rise of the loss in a run, of means over `WINDOW` steps.

    Attributes:
        step: number of the first step of the high window, from 1.
        low: nats per token before it.
        high: at its top.
        z: the rise of the logarithm in standard errors.
        chance: the largest z that noise alone brings about: the expected range of as many normal
            means as there are windows side by side, 2 sqrt(2 ln m) of theirs.
    """

    step: int
    low: float
    high: float
    z: float
    chance: float


def largest_rise(curve: Curve, *, start: float | None = None) -> Rise | None:
    """Find the largest rise in standard errors: over the start, or over any window before.

    Noise is that of the logarithm from step to step, which stays about the same while the loss
    falls to a tenth: log-losses differ by what the batches' rows differ by. It is taken from the
    differences of neighbours, which a rise that lasts hardly widens. A median of them would pass
    over the rare hard batches of rows that are mostly easy, and call each of them a rise.

    Args:
        curve: the steps.
        start: nats per token of the base, if it was measured; else the first step's loss is taken,
            with its noise.

    Returns:
        None for a run that is too short.
    """
    if len(curve) < SHORTEST:
        return None
    logs = np.log(np.maximum(curve.loss, np.finfo(float).tiny))
    noise = max(float(np.diff(logs).std()) / math.sqrt(2), np.finfo(float).eps)
    chance = 2 * math.sqrt(math.log(len(curve) / WINDOW))
    means = np.log(np.maximum(_windows(curve), np.finfo(float).tiny))
    first = logs[0] if start is None else math.log(max(start, np.finfo(float).tiny))
    top = int(means.argmax())
    error = noise * math.sqrt(1 / WINDOW + (1 if start is None else 0))
    z = (float(means[top]) - first) / error
    found = [Rise(top + 1, math.exp(first), math.exp(means[top]), z, chance)]
    lowest = np.minimum.accumulate(means)[:-WINDOW]
    rises = means[WINDOW:] - lowest
    if len(rises):
        i = int(rises.argmax())
        z = float(rises[i]) / (noise * math.sqrt(2 / WINDOW))
        found.append(
            Rise(i + WINDOW + 1, math.exp(lowest[i]), math.exp(means[i + WINDOW]), z, chance)
        )
    return max(found, key=lambda rise: rise.z)


def _windows(curve: Curve) -> np.ndarray:
    """Token-weighted mean loss of every `WINDOW` steps in a row, [N - WINDOW + 1]."""
    ones = np.ones(WINDOW)
    nats = np.convolve(curve.loss * curve.supervised, ones, "valid")
    return nats / np.convolve(curve.supervised, ones, "valid")


@dataclass(frozen=True)
class Falls:
    """How far the loss fell before and after a place in the run.

    AdamW's steps are about as long as the learning rate. So while a run is far from anywhere, its
    loss is a straight line over the learning rate spent, whatever the schedule; when it arrives,
    the line bends.

    Attributes:
        place: share of the whole learning rate that was spent before.
        before: nats per token, above zero for a fall.
        after: the same of the rest.
        covariance: of the two, [2, 2]; zero for evaluations, which are of the same rows each time.
    """

    place: float
    before: float
    after: float
    covariance: np.ndarray

    @property
    def slopes(self) -> tuple[float, float]:
        """Nats per token that each part would have fallen if it were the whole run."""
        return self.before / self.place, self.after / (1 - self.place)

    def excess(self, share: float) -> tuple[float, float]:
        """The slope after the place less a share of the slope before, and its standard error."""
        form = np.array([-share / self.place, 1 / (1 - self.place)])
        value = float(form @ np.array([self.before, self.after]))
        return value, math.sqrt(float(form @ self.covariance @ form))


def falls_of_steps(curve: Curve) -> Falls | None:
    """Fit a line with a bend at half of the learning rate spent, every token weighing the same.

    Returns:
        None for a run that is too short.
    """
    n = len(curve)
    if n < SHORTEST or not curve.learning_rate.any():
        return None
    spent = curve.spent
    lines = np.stack([np.ones(n), np.minimum(spent, 0.5), np.maximum(spent - 0.5, 0)], axis=1)
    weights = curve.supervised / curve.supervised.mean()
    inverse = np.linalg.pinv((lines.T * weights) @ lines)
    fitted = inverse @ (lines.T * weights) @ curve.loss
    residuals = curve.loss - lines @ fitted
    variance = float((weights * residuals**2).sum()) / (n - 3)
    before, after = -fitted[1:] / 2
    return Falls(0.5, float(before), float(after), variance * inverse[1:, 1:] / 4)


def falls_of_evaluations(
    curve: Curve, evaluations: Sequence[tuple[int, float]], *, base: float
) -> Falls | None:
    """The same from validations, the base being the first of them.

    Returns:
        None without an evaluation after the last step and one before it.
    """
    inner = [(step, nll) for step, nll in evaluations if 0 < step < len(curve)]
    if not inner or evaluations[-1][0] != len(curve):
        return None
    after = np.append(curve.spent[1:], 1.0)  # spent by the end of each step
    step, middle = min(inner, key=lambda found: abs(after[found[0] - 1] - 0.5))
    place = float(after[step - 1])
    if not 0 < place < 1:
        return None
    return Falls(place, base - middle, middle - evaluations[-1][1], np.zeros((2, 2)))

"""Exact match: the share of answers that are right to the last character, task by task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

from lorikeet.starter.instance import Instance

Z_95 = 1.959964  # the 97.5 % quantile of the normal distribution


def wilson(correct: int, total: int) -> tuple[float, float]:
    """Return the 95 % interval of a share (Wilson 1927, JASA 22, equation for score limits).

    Raises:
        ValueError: nothing was counted.
    """
    if total < 1:
        raise ValueError("a share of nothing has no interval")
    share, z2 = correct / total, Z_95 * Z_95
    middle = share + z2 / (2 * total)
    half = Z_95 * sqrt(share * (1 - share) / total + z2 / (4 * total * total))
    scale = 1 + z2 / total
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


@dataclass(frozen=True, slots=True)
class Tally:
    """How many answers were exactly right.

    Attributes:
        tasks: `(correct, total)` per task, in the order of first appearance.
    """

    tasks: dict[str, tuple[int, int]]

    @property
    def correct(self) -> int:
        """Right answers over all tasks."""
        return sum(correct for correct, _ in self.tasks.values())

    @property
    def total(self) -> int:
        """Answers over all tasks."""
        return sum(total for _, total in self.tasks.values())

    @property
    def share(self) -> float:
        """The overall share of right answers, between 0 and 1."""
        return self.correct / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the overall share."""
        return wilson(self.correct, self.total)

    def markdown(self) -> str:
        """A table with a line per task and one for all of them."""
        low, high = self.interval
        lines = ["| task | exact | of | share |", "|---|---:|---:|---:|"]
        for task, (correct, total) in sorted(self.tasks.items()):
            lines.append(f"| {task} | {correct} | {total} | {correct / total:.1%} |")
        lines.append(f"| **all** | {self.correct} | {self.total} | {self.share:.1%} |")
        lines.append(f"\n95 % interval of the share over all tasks: {low:.1%} to {high:.1%}.")
        return "\n".join(lines) + "\n"


def tally(instances: Sequence[Instance], answers: Sequence[str]) -> Tally:
    """Score one answer per instance; nothing is trimmed, nothing is forgiven.

    Raises:
        ValueError: the lengths differ, or there is nothing to score.
    """
    if len(instances) != len(answers) or not instances:
        raise ValueError(f"expected one answer each, found {len(answers)} for {len(instances)}")
    tasks: dict[str, tuple[int, int]] = {}
    for instance, answer in zip(instances, answers, strict=True):
        correct, total = tasks.get(instance.task, (0, 0))
        tasks[instance.task] = (correct + (answer == instance.answer), total + 1)
    return Tally(tasks)

"""What a better perplexity costs: time, room, and what the model knew before."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lorikeet.study.outcomes import Outcome, names
from lorikeet.study.plots.axes import Mark, ends, name_points, numeric_axis
from lorikeet.study.plots.naming import looks
from lorikeet.study.plots.style import (
    INK,
    MUTED,
    PALE,
    WIDTH,
    Look,
    Picture,
    look,
    new_figure,
    picture,
)

_HEIGHT = 3.8
_AXES = (WIDTH - 0.9, _HEIGHT - 0.95)  # inches, about: the rest are labels


@dataclass(frozen=True)
class Price:
    """Something that a group costs.

    Attributes:
        name: in a file's name.
        title: in a heading: "Perplexity against ...".
        label: on the axis, with the unit.
        of: what a group costs, least, median and most; None if that is not known.
    """

    name: str
    title: str
    label: str
    of: Callable[[Outcome], tuple[float, float, float] | None]


def _seconds(outcome: Outcome) -> tuple[float, float, float] | None:
    found = outcome.spread("seconds")
    return (found.least, found.median, found.greatest) if found and found.least > 0 else None


def _megabytes(outcome: Outcome) -> tuple[float, float, float] | None:
    size = outcome.saved_bytes / 1e6
    return (size, size, size) if size else None


def _trainable(outcome: Outcome) -> tuple[float, float, float] | None:
    count = float(outcome.trainable)
    return (count, count, count) if count else None


PRICES = (
    Price("seconds", "time", "seconds in training steps", _seconds),
    Price("megabytes", "size", "megabytes saved", _megabytes),
    Price("trainable", "trained parameters", "parameters that were trained", _trainable),
)
"""What perplexity is set against."""


def plot_front(outcomes: Sequence[Outcome], price: Price) -> Picture | None:
    """Perplexity against a price; groups that cost more and are no better stand back."""
    known = [
        (outcome, cost)
        for outcome in outcomes
        if not outcome.is_base and math.isfinite(outcome.test.perplexity)
        for cost in [price.of(outcome)]
        if cost is not None
    ]
    if len({cost[1] for _, cost in known}) < 2:
        return None
    points = [(cost[1], outcome.test.perplexity) for outcome, cost in known]
    best = front(points)
    figure = new_figure(_HEIGHT)
    axes = figure.subplots()
    numeric_axis(axes, "x", [value for _, cost in known for value in cost], at_values=False)
    reach = [ends(outcome.test) for outcome, _ in known]
    numeric_axis(axes, "y", [value for pair in reach for value in pair], at_values=False)
    for index, ((x, y), (low, high)) in enumerate(zip(points, reach, strict=True)):
        on_front = index in best
        least, _, most = known[index][1]
        axes.errorbar(
            [x],
            [y],
            yerr=[[y - low], [high - y]],
            xerr=[[x - least], [most - x]],
            color=look(0).colour if on_front else PALE,
            marker="o" if on_front else "s",
            ms=7 if on_front else 4,
            elinewidth=1,
            zorder=4 if on_front else 2,
        )
    stairs = [points[index] for index in best]
    axes.plot(*zip(*stairs, strict=True), color=look(0).colour, lw=1, drawstyle="steps-post")
    called = names(outcomes)
    marks = [
        Mark(*point, called[outcome.label], (cost[0], cost[2]), reach[index])
        for index, ((outcome, cost), point) in enumerate(zip(known, points, strict=True))
    ]
    others = [mark for index, mark in enumerate(marks) if index not in best]
    for (x, y), (next_x, next_y) in itertools.pairwise(stairs):
        others += [Mark(x, y, "", across=(x, next_x)), Mark(next_x, y, "", up=(next_y, y))]
    name_points(axes, [marks[index] for index in best], size=_AXES, avoid=others)
    axes.set_xlabel(price.label)
    axes.set_ylabel("perplexity on the test rows")
    title = f"Perplexity against {price.title}"
    axes.set_title(title)
    caption = (
        "Blue, joined: nothing that costs less has a lower perplexity. Pale: something is at least"
        " as good for less. Vertical lines are 95 % intervals"
    )
    caption += ", horizontal ones span the seeds." if price.name == "seconds" else "."
    return picture(f"front_{price.name}", figure, title=title, caption=caption)


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which points no other beats in both coordinates, lower being better; by the first one."""
    order = sorted(range(len(points)), key=lambda i: (points[i], i))
    found: list[int] = []
    for index in order:
        if not found or points[index][1] < points[found[-1]][1]:
            found.append(index)
    return found


def plot_forgetting(outcomes: Sequence[Outcome], other_name: str) -> Picture | None:
    """Perplexity on the second text against that on the test rows, the base with its lines."""
    known = [
        (outcome, outcome.other)
        for outcome in outcomes
        if outcome.other is not None
        and math.isfinite(outcome.test.perplexity)
        and math.isfinite(outcome.other.perplexity)
    ]
    if sum(not outcome.is_base for outcome, _ in known) < 1:
        return None
    figure = new_figure(_HEIGHT)
    axes = figure.subplots()
    numeric_axis(axes, "x", [v for o, _ in known for v in ends(o.test)], at_values=False)
    numeric_axis(axes, "y", [v for _, other in known for v in ends(other)], at_values=False)
    marks, called, look_of = [], names(outcomes), looks(outcomes)
    for outcome, other in known:
        x, y = outcome.test.perplexity, other.perplexity
        (left, right), (low, high) = ends(outcome.test), ends(other)
        one = look_of.get(outcome.label, Look(INK, "*", "-"))
        if outcome.is_base:
            axes.axhline(y, color=MUTED, lw=1, ls=(0, (4, 3)), zorder=1)
        axes.errorbar(
            [x],
            [y],
            xerr=[[x - left], [right - x]],
            yerr=[[y - low], [high - y]],
            color=one.colour,
            marker=one.marker,
            ms=9 if outcome.is_base else 6,
            elinewidth=1,
            zorder=3,
        )
        marks.append(Mark(x, y, called[outcome.label], (left, right), (low, high)))
    name_points(axes, marks, size=_AXES)
    axes.set_xlabel("perplexity on the test rows: what was learned")
    axes.set_ylabel("perplexity on the second text")
    title = f"Learned and forgotten: {other_name}" if other_name else "Learned and forgotten"
    axes.set_title(title)
    caption = (
        "Left is better on what was trained, low is better on the second text. Above the dashed"
        " line, which is the base's, something was forgotten. Lines are 95 % intervals."
    )
    return picture("forgetting", figure, title=title, caption=caption)

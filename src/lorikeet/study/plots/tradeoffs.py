"""What a better perplexity costs: time, room, and what the model knew before."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lorikeet.study.outcomes import Outcome, names
from lorikeet.study.plots.axes import Mark, ends, name_points, numeric_axis
from lorikeet.study.plots.naming import looks, shortened
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
from lorikeet.study.statistics import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
    marks = _priced(outcomes, price)
    if len({mark.x for mark in marks}) < 2:
        return None
    figure, axes = _crossed(marks)
    best = front([(mark.x, mark.y) for mark in marks])
    for index, mark in enumerate(marks):
        ahead = index in best
        _cross(axes, mark, look(0) if ahead else Look(PALE, "s", "-"), size=7 if ahead else 4)
    stairs = [marks[index] for index in best]
    steps = [(mark.x, mark.y) for mark in stairs]
    axes.plot(*zip(*steps, strict=True), color=look(0).colour, lw=1, drawstyle="steps-post")
    avoid = [mark for index, mark in enumerate(marks) if index not in best]
    for (x, y), (next_x, next_y) in itertools.pairwise(steps):
        avoid += [Mark(x, y, "", across=(x, next_x)), Mark(next_x, y, "", up=(next_y, y))]
    name_points(axes, stairs, size=_AXES, avoid=avoid)
    title = f"Perplexity against {price.title}"
    axes.set(xlabel=price.label, ylabel="perplexity on the test rows")
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
    """Perplexity on the second text against that on the test rows, the base with its line."""
    known = [outcome for outcome in outcomes if outcome.other is not None]
    marks = {o.label: _learned(o, o.other) for o in known if o.other is not None}
    marks = {k: mark for k, mark in marks.items() if math.isfinite(mark.x + mark.y)}
    base = next((marks.get(o.label) for o in known if o.is_base), None)
    if len(marks) - (base is not None) < 1:
        return None
    called, look_of = names(outcomes), looks(outcomes)
    marks = {label: replace(mark, name=called[label]) for label, mark in marks.items()}
    figure, axes = _crossed(list(marks.values()))
    for label, mark in marks.items():
        one = look_of.get(label, Look(INK, "*", "-"))
        _cross(axes, mark, one, size=6 if label in look_of else 9)
    if base is not None:
        axes.axhline(base.y, color=MUTED, lw=1, ls=(0, (4, 3)), zorder=1)
    base_first = sorted(marks, key=lambda label: (label in look_of, marks[label].x))
    name_points(axes, [marks[label] for label in base_first], size=_AXES)
    axes.set_xlabel("perplexity on the test rows: what was learned")
    axes.set_ylabel("perplexity on the second text")
    title = f"Learned and forgotten: {other_name}" if other_name else "Learned and forgotten"
    axes.set_title(shortened(title, width=60))
    caption = (
        "Left is better on what was trained, low is better on the second text. Above the dashed"
        " line, which is the base's, something was forgotten. Lines are 95 % intervals."
    )
    return picture("forgetting", figure, title=title, caption=caption)


def _priced(outcomes: Sequence[Outcome], price: Price) -> list[Mark]:
    """Every group whose price is known, with what it reaches in both directions."""
    called, found = names(outcomes), []
    for outcome in outcomes:
        cost, y = price.of(outcome), outcome.test.perplexity
        if cost is not None and math.isfinite(y) and not outcome.is_base:
            least, middle, most = cost
            name = called[outcome.label]
            found.append(Mark(middle, y, name, (least, most), ends(outcome.test)))
    return found


def _learned(outcome: Outcome, other: Estimate) -> Mark:
    x, y = outcome.test.perplexity, other.perplexity
    return Mark(x, y, "", ends(outcome.test), ends(other))


def _crossed(marks: Sequence[Mark]) -> tuple[Figure, Axes]:
    """Axes with room for the marks and their intervals."""
    figure = new_figure(_HEIGHT)
    axes = figure.subplots()
    numeric_axis(axes, "x", [v for mark in marks for v in mark.across or ()], at_values=False)
    numeric_axis(axes, "y", [v for mark in marks for v in mark.up or ()], at_values=False)
    return figure, axes


def _cross(axes: Axes, mark: Mark, one: Look, *, size: float) -> None:
    """A mark with its intervals."""
    (left, right), (low, high) = mark.across or (mark.x, mark.x), mark.up or (mark.y, mark.y)
    axes.errorbar(
        [mark.x],
        [mark.y],
        xerr=[[mark.x - left], [right - mark.x]],
        yerr=[[mark.y - low], [high - mark.y]],
        color=one.colour,
        marker=one.marker,
        ms=size,
        elinewidth=1,
        zorder=2 if one.colour == PALE else 4,
    )

"""How training went: losses by step, and the learning rates that were tried."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lorikeet.study.outcomes import Outcome, by_quality, names
from lorikeet.study.plots.axes import End, name_ends, numeric_axis
from lorikeet.study.plots.naming import looks, shortened
from lorikeet.study.plots.style import INK, PALE, Look, Picture, look, new_figure, picture
from lorikeet.study.record import Study, Trial

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TOGETHER = 6  # groups that share one panel
_PANELS = 12  # panels at most: of more groups the nine best and the three worst
_WORST = 3
_POINTS = 150  # of a line; more would not be seen
_BEHIND = 40  # of a line that only stands behind others
_CLIMB = 1.2  # so far above the highest start a curve is followed
_HEIGHT = 3.7

_Curve = Sequence[tuple[int, float]]


@dataclass(frozen=True)
class Line:
    """A group's curve: its mean over seeds, and each seed by itself; [N, 2], step and loss."""

    name: str
    look: Look
    mean: np.ndarray
    seeds: Sequence[np.ndarray]


def plot_losses(outcomes: Sequence[Outcome]) -> Picture | None:
    """Training loss by step: single seeds light, their smoothed mean strong."""
    lines = _lines(outcomes, lambda trial: trial.curve, smooth=True)
    caption = (
        "Each strong line is the mean over seeds, smoothed over a twentieth of the run; light"
        " lines are single seeds."
    )
    return _picture("loss", lines, "Training loss", "nats per token", caption)


def plot_validations(outcomes: Sequence[Outcome]) -> Picture | None:
    """Loss on the validation rows while training."""
    lines = _lines(outcomes, lambda trial: trial.evaluations, smooth=False)
    caption = "Means over seeds; light lines are single seeds."
    title = "Loss on the validation rows while training"
    return _picture("validation", lines, title, "nats per token", caption)


def plot_rates(study: Study, outcomes: Sequence[Outcome]) -> Picture | None:
    """Validation loss of every learning rate that was tried, by method; the picked ones ringed."""
    tried: dict[str, list[tuple[float, float]]] = {}
    for c in study.candidates:
        if c.nll is not None and math.isfinite(c.nll):
            tried.setdefault(c.method, []).append((c.learning_rate, c.nll))
    rates = {c.learning_rate for c in study.candidates}
    if len(rates) < 2 or not tried:
        return None
    figure = new_figure(_HEIGHT)
    axes = figure.subplots()
    numeric_axis(axes, "x", sorted(rates), at_values=True)
    losses = [nll for points in tried.values() for _, nll in points]
    numeric_axis(axes, "y", losses, at_values=False)
    named, look_of = [], looks(outcomes)
    for index, (method, points) in enumerate(tried.items()):
        one = look_of.get(method, look(index))
        points.sort()
        axes.plot(*zip(*points, strict=True), lw=1.5, zorder=3, **one.line)
        named.append(End(*points[-1], method, one.colour))
    picked = [(c.learning_rate, c.nll) for c in study.candidates if c.picked and c.nll is not None]
    for x, y in picked:
        axes.plot([x], [y], "o", mfc="none", mec=INK, ms=11, mew=1.2, zorder=4)
    failed = sorted({c.learning_rate for c in study.candidates if c.nll is None})
    if failed:
        at = axes.get_xaxis_transform()
        axes.plot(failed, [0.96] * len(failed), "x", color=INK, ms=7, mew=2, transform=at)
    name_ends(axes, named, height=_HEIGHT - 1)
    axes.set_xlabel("peak learning rate")
    axes.set_ylabel("nats per token, validation rows")
    axes.set_title("Learning rates that were tried")
    caption = "Rings mark what was picked for each method, by validation rows alone."
    if failed:
        caption += " A cross at the top: a run with this rate failed."
    return picture(
        "learning_rates", figure, title="Learning rates that were tried", caption=caption
    )


def thinned(curve: _Curve, *, most: int = _POINTS) -> np.ndarray:
    """A curve [N, 2] of so many points at most, each the mean of its neighbours.

    Values that are no number are left out.
    """
    points = np.array([pair for pair in curve if math.isfinite(pair[1])], dtype=np.float64)
    return _thin(points.reshape(-1, 2), most=most)


def _thin(points: np.ndarray, *, most: int) -> np.ndarray:
    if len(points) <= most:
        return points
    return np.array([part.mean(0) for part in np.array_split(points, most)])


def smoothed(curve: np.ndarray, *, window: int) -> np.ndarray:
    """Centred rolling mean of [N, 2].

    At the start, where curves are steep, the window shrinks; at the end its later half is missing.
    """
    half = window // 2
    found = curve.copy()
    for index in range(len(curve)):
        reach = min(half, index)
        found[index, 1] = curve[index - reach : index + reach + 1, 1].mean()
    return found


def _lines(
    outcomes: Sequence[Outcome], curve: Callable[[Trial], _Curve], *, smooth: bool
) -> list[Line]:
    """The groups with a curve, the best first."""
    found, called, look_of = [], names(outcomes), looks(outcomes)
    for outcome in by_quality(outcomes):
        seeds = [thinned(curve(trial)) for trial in outcome.trials]
        seeds = [seed for seed in seeds if len(seed) > 1]
        if seeds:
            mean = _mean(seeds)
            window = max(3, len(mean) // 20) if smooth else 1
            mean = smoothed(mean, window=window)
            found.append(Line(called[outcome.label], look_of[outcome.label], mean, seeds))
    return found


def _mean(seeds: Sequence[np.ndarray]) -> np.ndarray:
    """Mean over seeds at each step that all of them reached."""
    last = min(seed[-1, 0] for seed in seeds)
    steps = seeds[0][seeds[0][:, 0] <= last, 0]
    at = [np.interp(steps, seed[:, 0], seed[:, 1]) for seed in seeds]
    return np.stack([steps, np.mean(at, axis=0)], axis=1)


def _picture(
    name: str, lines: Sequence[Line], title: str, unit: str, caption: str
) -> Picture | None:
    if not lines:
        return None
    if len(lines) <= _TOGETHER:
        return _together(name, lines, title, unit, caption)
    shown = list(lines)
    if len(lines) > _PANELS:
        shown = [*lines[: _PANELS - _WORST], *lines[-_WORST:]]
        caption += (
            f" Of {len(lines)} groups the {_PANELS - _WORST} best and the {_WORST} worst have a"
            " panel; grey lines are all the others."
        )
    else:
        caption += " Grey lines are the other groups."
    return _small_multiples(name, lines, shown, title, unit, caption)


def _together(name: str, lines: Sequence[Line], title: str, unit: str, caption: str) -> Picture:
    figure = new_figure(_HEIGHT)
    axes = figure.subplots()
    _limits(axes, lines)
    named = []
    alike = len({line.look for line in lines}) < len(lines)
    for index, line in enumerate(lines):
        one = look(index) if alike else line.look
        _draw(axes, line, one)
        step, loss = map(float, line.mean[-1])
        named.append(End(step, loss, line.name, one.colour))
    name_ends(axes, named, height=_HEIGHT - 1)
    axes.set(xlabel="optimizer step", ylabel=unit)
    axes.set_title(title)
    return picture(name, figure, title=title, caption=caption)


def _small_multiples(
    name: str,
    lines: Sequence[Line],
    shown: Sequence[Line],
    title: str,
    unit: str,
    caption: str,
) -> Picture:
    columns = 3
    rows = -(-len(shown) // columns)
    figure = new_figure(1.35 * rows + 0.9)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for place, axes in enumerate(grid.flat):
        if place >= len(shown):
            axes.set_axis_off()
            continue
        _limits(axes, lines)
        for other in lines:
            axes.plot(*_thin(other.mean, most=_BEHIND).T, color=PALE, lw=0.7, zorder=1)
        _draw(axes, shown[place], look(0))
        label = shortened(shown[place].name, width=24, lines=2)
        axes.set_title(label, fontsize=8, fontweight="normal", pad=3)
        axes.tick_params(labelsize=8, labelbottom=place + columns >= len(shown))
    figure.supxlabel("optimizer step", fontsize=9)
    figure.supylabel(unit, fontsize=9)
    figure.suptitle(title, x=0.01, ha="left", fontsize=10, fontweight="bold")
    return picture(name, figure, title=title, caption=caption)


def _limits(axes: Axes, lines: Sequence[Line]) -> None:
    """All of the means and nearly all of the seeds; what climbs far above its start is cut."""
    from matplotlib.ticker import MaxNLocator

    steps = [float(line.mean[-1, 0]) for line in lines]
    numeric_axis(axes, "x", [0.0, *steps], at_values=False)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
    means = np.concatenate([line.mean[:, 1] for line in lines])
    seeds = np.concatenate([seed[:, 1] for line in lines for seed in line.seeds])
    low, high = np.percentile(seeds, (0.5, 99.5))
    highest = _CLIMB * max(float(line.mean[0, 1]) for line in lines)
    reach = [min(float(low), means.min()), min(max(float(high), means.max()), highest)]
    numeric_axis(axes, "y", reach, at_values=False, log=False)


def _draw(axes: Axes, line: Line, one: Look) -> None:
    if len(line.seeds) > 1:
        for seed in line.seeds:
            axes.plot(*seed.T, color=one.colour, lw=0.6, alpha=0.35, zorder=2)
    axes.plot(*line.mean.T, color=one.colour, lw=1.8, linestyle=one.dash, zorder=3)

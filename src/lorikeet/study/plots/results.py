"""What came out: perplexity of every group with its interval, and how far each is from the best."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lorikeet.study.figures import perplexity
from lorikeet.study.outcomes import Outcome, against, by_quality, names
from lorikeet.study.plots.axes import ends, mark_base, numeric_axis, with_base
from lorikeet.study.plots.naming import looks, shortened
from lorikeet.study.plots.style import INK, MUTED, PAPER, Look, Picture, new_figure, picture
from lorikeet.study.statistics import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST = 40  # groups that a picture shows
_BESIDE = 26  # characters of a name that fit beside the axes; longer ones stand above their row


def plot_perplexities(outcomes: Sequence[Outcome]) -> Picture | None:
    """A row for each group: perplexity, 95 % interval, and its single seeds; the best on top."""
    shown = [o for o in by_quality(outcomes) if math.isfinite(o.test.perplexity)][:_MOST]
    if not shown:
        return None
    base = next((o.test.perplexity for o in outcomes if o.is_base), None)
    values = [value for o in shown for value in (*ends(o.test), *_seeds(o))]
    called, look_of = names(outcomes), looks(outcomes)
    figure, axes = _rows([called[outcome.label] for outcome in shown])
    numeric_axis(axes, "x", with_base(values, base), at_values=False)
    for row, outcome in enumerate(shown):
        seeds = _seeds(outcome)
        if len(seeds) > 1:
            places = [row + 0.24] * len(seeds)
            axes.plot(seeds, places, "|", color=MUTED, ms=6, mew=1, zorder=2)
        _interval(axes, row, outcome.test.perplexity, ends(outcome.test), look_of[outcome.label])
        _write(axes, row, perplexity(outcome.test.perplexity))
    mark_base(axes, "x", base)
    axes.set_xlabel("perplexity on the test rows (lower is better)")
    axes.set_title("Perplexity", pad=16)
    caption = "Marks are means over seeds, lines 95 % intervals, small strokes single seeds."
    return picture("perplexity", figure, title="Perplexity", caption=caption + _left_out(outcomes))


def plot_differences(outcomes: Sequence[Outcome]) -> Picture | None:
    """A row for each group: paired difference to the best one, with its 95 % interval."""
    ranked = [o for o in by_quality(outcomes) if math.isfinite(o.test.perplexity)][:_MOST]
    if len(ranked) < 2:
        return None
    best = ranked[0]
    rows = [(o, against(o, best)) for o in ranked[1:]]
    known = [(o, gap) for o, gap in rows if gap is not None]
    if not known:
        return None
    called, look_of = names(outcomes), looks(outcomes)
    figure, axes = _rows([called[outcome.label] for outcome, _ in known])
    values = [0.0, *(value for _, gap in known for value in _nats(gap))]
    numeric_axis(axes, "x", values, at_values=False)
    axes.axvline(0, color=MUTED, lw=1, zorder=1)
    for row, (outcome, gap) in enumerate(known):
        one, hollow = look_of[outcome.label], not gap.distinguishable
        _interval(axes, row, gap.nll, _nats(gap), one, hollow=hollow)
        _write(axes, row, f"{gap.nll:+.3f}")
    axes.set_xlabel("nats per token more than the best (paired by document)")
    name = shortened(called[best.label], width=44)
    axes.set_title(f"Distance to the best: {name}")
    caption = (
        "The same documents are compared one by one, so these intervals are mostly narrower than"
        " the perplexities'. Hollow marks: the interval includes 0, no difference was shown. The"
        " best was picked by the same figures, so it looks a little better than it is."
    )
    return picture("difference", figure, title="Distance to the best", caption=caption)


def _rows(labels: Sequence[str]) -> tuple[Figure, Axes]:
    """Axes with a named row for each label, the first on top."""
    above = max(map(len, labels)) > _BESIDE
    tall = 0.42 if above else 0.29
    figure = new_figure(tall * len(labels) + 1.15)
    axes = figure.subplots()
    axes.set_ylim(len(labels) - 0.4, -0.75 if above else -0.6)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    if above:
        axes.set_yticks([])
        at = axes.get_yaxis_transform()
        for row, label in enumerate(labels):
            text = shortened(label, width=72)
            axes.text(
                0,
                row - 0.2,
                text,
                transform=at,
                va="bottom",
                fontsize=8,
                color=INK,
                bbox={"fc": PAPER, "ec": "none", "pad": 0.5},
            )
    else:
        axes.set_yticks(range(len(labels)), [shortened(label, width=_BESIDE) for label in labels])
    return figure, axes


def _interval(
    axes: Axes,
    row: int,
    value: float,
    reach: tuple[float, float],
    one: Look,
    *,
    hollow: bool = False,
) -> None:
    axes.plot(reach, (row, row), "-", color=one.colour, lw=2, solid_capstyle="butt", zorder=3)
    fill = PAPER if hollow else one.colour
    axes.plot([value], [row], one.marker, color=one.colour, ms=6, mfc=fill, zorder=4)


def _write(axes: Axes, row: int, text: str) -> None:
    at = axes.get_yaxis_transform()
    axes.text(1.02, row, text, transform=at, va="center", fontsize=8, color=INK)


def _seeds(outcome: Outcome) -> list[float]:
    found = [score.perplexity for score in outcome.scores]
    return [value for value in found if math.isfinite(value)]


def _nats(estimate: Estimate) -> tuple[float, float]:
    if estimate.low is None or estimate.high is None:
        return estimate.nll, estimate.nll
    return estimate.low, estimate.high


def _left_out(outcomes: Sequence[Outcome]) -> str:
    ranked, called = by_quality(outcomes), names(outcomes)
    lost = [called[o.label] for o in ranked if not math.isfinite(o.test.perplexity)]
    more = len(ranked) - len(lost) - _MOST
    text = f" The {_MOST} best are shown; {more} more are in the table." if more > 0 else ""
    return text + (f" Not shown, for they have no finite one: {', '.join(lost)}." if lost else "")

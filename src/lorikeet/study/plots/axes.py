"""Axes: scales that fit the values, ticks that do not touch, names beside what they name."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorikeet.study.figures import perplexity
from lorikeet.study.plots.naming import shortened
from lorikeet.study.plots.style import INK, MUTED, PAPER
from lorikeet.study.statistics import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DOUBLING = 4.0  # values that differ by this factor stand on a logarithmic axis
_FONT = 8.0  # points, of names
_CHARACTER = 0.62  # mean width of a character, in font sizes
_EARLY = 0.75  # share of the axes' width: a line that ends before it is named there
_MULTIPLES = ((1,), (1, 3), (1, 2, 5), (1, 2, 3, 5), (1, 1.5, 2, 3, 4, 5, 7))  # of a power of ten


def spans_factors(values: Sequence[float]) -> bool:
    """Whether a logarithmic axis suits the values: all above zero, and far apart by factors."""
    return min(values) > 0 and max(values) / min(values) >= _DOUBLING


def numeric_axis(
    axes: Axes, which: str, values: Sequence[float], *, at_values: bool, log: bool | None = None
) -> bool:
    """Set up an axis for positive or signed values, with room on both sides.

    Args:
        axes: the axes.
        which: "x" or "y".
        values: everything that is to be seen, interval ends included; finite.
        at_values: put ticks at the values themselves (an option's) rather than at round figures.
        log: whether it is logarithmic; if not given, it is for values that differ by factors.

    Returns:
        Whether it is logarithmic.
    """
    from matplotlib import ticker

    axis = axes.xaxis if which == "x" else axes.yaxis
    set_scale, set_limits = getattr(axes, f"set_{which}scale"), getattr(axes, f"set_{which}lim")
    log = spans_factors(values) if log is None else log
    set_scale("log" if log else "linear")
    low, high = _with_room(min(values), max(values), log=log)
    set_limits(low, high)
    if at_values:
        shown = _apart(sorted(set(values)), low, high, log=log, long=which == "x")
        axis.set_major_locator(ticker.FixedLocator(shown))
    elif log and high / low >= 2:
        axis.set_major_locator(ticker.FixedLocator(round_figures(low, high)))
    else:
        axis.set_major_locator(ticker.MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axis.set_minor_locator(ticker.NullLocator())
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: number(value)))
    return log


def round_figures(low: float, high: float) -> list[float]:
    """Ticks of a logarithmic axis: the fewest kinds of multiples of ten that give four ticks."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    powers = range(first, last + 1, max(1, (last - first) // 6))
    found: list[float] = []
    for multiples in _MULTIPLES:
        found = [m * 10.0**power for power in powers for m in multiples]
        found = [value for value in found if low <= value <= high]
        if len(found) >= 4:
            break
    return found


def number(value: float) -> str:
    """A figure on an axis: 1,500 or 0.25 or 2e-4."""
    if value == 0:
        return "0"
    if abs(value) >= 1e9:
        return f"{value:.0e}".replace("+", "")
    if abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) < 1e-3:
        digits, _, exponent = f"{value:.2e}".partition("e")
        return f"{float(digits):g}e{int(exponent)}"
    return f"{value:.4g}"


def _with_room(low: float, high: float, *, log: bool) -> tuple[float, float]:
    if log:
        room = (high / low) ** 0.06
        return low / room, high * room
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return low - room, high + room


def _apart(
    values: Sequence[float], low: float, high: float, *, log: bool, long: bool
) -> list[float]:
    """The values whose labels do not touch each other, from the first on."""

    def place(value: float) -> float:
        if log:
            return math.log(value / low) / math.log(high / low)
        return (value - low) / (high - low)

    kept: list[float] = []
    for value in values:
        size = 0.019 * (len(number(value)) + 1) if long else 0.05
        if not kept or place(value) - place(kept[-1]) >= size:
            kept.append(value)
    return kept


@dataclass(frozen=True)
class End:
    """The end of a line, which is to be named at the right edge: place, name and colour."""

    x: float
    y: float
    name: str
    colour: str


def name_ends(axes: Axes, named: Sequence[End], *, height: float) -> None:
    """Write each line's name to the right of the axes, at its height or as near as there is room.

    A line that ends well before the right edge is named where it ends.

    Args:
        axes: their limits must be set.
        named: the lines.
        height: of the axes, in inches.
    """
    to_fraction = axes.transScale + axes.transLimits
    places = [tuple(map(float, to_fraction.transform((end.x, end.y)))) for end in named]
    early = [end for end, (x, _) in zip(named, places, strict=True) if x < _EARLY]
    late = [end for end in named if end not in early]
    texts = [shortened(end.name, width=20, lines=3) for end in late]
    tall = [_FONT * 1.3 * (text.count("\n") + 1) / (72 * height) for text in texts]
    wanted = [min(max(y, 0.0), 1.0) for x, y in places if x >= _EARLY]
    low, high = axes.get_ylim()
    for end, text, y in zip(late, texts, spread_out(wanted, tall), strict=True):
        axes.annotate(
            text,
            xy=(end.x, min(max(end.y, low), high)),
            xytext=(1.06, y),
            textcoords="axes fraction",
            va="center",
            fontsize=_FONT,
            color=INK,
            arrowprops={
                "arrowstyle": "-",
                "color": end.colour,
                "lw": 0.8,
                "relpos": (0, 0.5),
                "shrinkA": 2,
                "shrinkB": 3,
            },
        )
    for end in early:
        place: dict[str, Any] = {"xytext": (5, 3), "textcoords": "offset points", "va": "bottom"}
        axes.annotate(shortened(end.name, width=20), xy=(end.x, end.y), fontsize=_FONT, **place)


def spread_out(wanted: Sequence[float], tall: Sequence[float]) -> list[float]:
    """Centres from 0 to 1, in the order of `wanted` and near it, that leave each its height."""
    order = sorted(range(len(wanted)), key=lambda i: (wanted[i], i))
    placed = dict.fromkeys(order, 0.0)
    floor = 0.0
    for i in order:
        placed[i] = max(wanted[i], floor + tall[i] / 2)
        floor = placed[i] + tall[i] / 2
    ceiling = max(1.0, sum(tall))
    for i in reversed(order):
        placed[i] = min(placed[i], ceiling - tall[i] / 2)
        ceiling = placed[i] - tall[i] / 2
    return [placed[i] for i in range(len(wanted))]


@dataclass(frozen=True)
class Mark:
    """A point that is to be named beside it, and how far its intervals reach."""

    x: float
    y: float
    name: str
    across: tuple[float, float] | None = None
    up: tuple[float, float] | None = None


def name_points(
    axes: Axes, marks: Sequence[Mark], *, size: tuple[float, float], avoid: Sequence[Mark] = ()
) -> None:
    """Write names beside points, each at the first of eight places where it covers nothing.

    Where there is none a name may lie over intervals, on a ground of its own, but over no point
    and no other name: a point that nobody can name tells nothing.

    Args:
        axes: their limits must be set.
        marks: the points, the most important first: in a crowd the last may go without a name.
        size: width and height of the axes, in inches.
        avoid: other points, which names must not cover.
    """
    width, height = size[0] * 72, size[1] * 72
    to_fraction = axes.transScale + axes.transLimits

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = to_fraction.transform((x, y))
        return float(across) * width, float(up) * height

    boxes = [_boxes(mark, place) for mark in (*marks, *avoid)]
    dots, lines = [dot for dot, *_ in boxes], [line for _, *lines in boxes for line in lines]

    def beside(mark: Mark, text: str, taken: Sequence[_Box]) -> tuple[int, int, _Box] | None:
        """The first free place."""
        wide = max(map(len, text.split("\n"))) * _CHARACTER * _FONT
        tall = (text.count("\n") + 1) * 1.25 * _FONT
        x, y = place(mark.x, mark.y)
        for dx, dy in _PLACES:
            left = x + dx * _AWAY - (0 if dx > 0 else wide if dx < 0 else wide / 2)
            bottom = y + dy * _AWAY - (0 if dy > 0 else tall if dy < 0 else tall / 2)
            box = (left, bottom, left + wide, bottom + tall)
            inside = left >= 0 and bottom >= 0 and box[2] <= width and box[3] <= height
            if inside and not any(_touch(box, other) for other in taken):
                return dx, dy, box
        return None

    for mark in marks:
        text = shortened(mark.name, width=24, lines=2)
        found = beside(mark, text, [*dots, *lines]) or beside(mark, text, dots)
        if found is not None:
            dx, dy, box = found
            dots.append(box)
            _write_beside(axes, mark, text, dx, dy)


def _write_beside(axes: Axes, mark: Mark, text: str, dx: int, dy: int) -> None:
    axes.annotate(
        text,
        xy=(mark.x, mark.y),
        xytext=(dx * _AWAY, dy * _AWAY),
        textcoords="offset points",
        ha="left" if dx > 0 else "right" if dx < 0 else "center",
        va="bottom" if dy > 0 else "top" if dy < 0 else "center",
        fontsize=_FONT,
        bbox={"facecolor": PAPER, "edgecolor": "none", "alpha": 0.75, "pad": 0.5},
        zorder=5,  # above the intervals
    )


_AWAY = 6.0
_PLACES = ((1, 1), (1, -1), (-1, 1), (-1, -1), (0, 1), (0, -1), (1, 0), (-1, 0))

_Box = tuple[float, float, float, float]


def _boxes(mark: Mark, place: Callable[[float, float], tuple[float, float]]) -> list[_Box]:
    """What a mark covers: left, bottom, right and top of its dot and of its two intervals."""
    x, y = place(mark.x, mark.y)
    found = [(x - 5, y - 5, x + 5, y + 5)]
    if mark.across:
        found.append(
            (place(mark.across[0], mark.y)[0], y - 1, place(mark.across[1], mark.y)[0], y + 1)
        )
    if mark.up:
        found.append((x - 1, place(mark.x, mark.up[0])[1], x + 1, place(mark.x, mark.up[1])[1]))
    return found


def _touch(one: _Box, other: _Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def with_base(values: Sequence[float], base: float | None) -> list[float]:
    """The values, and the base's figure with them unless it would squeeze them together."""
    if base is None or not math.isfinite(base):
        return list(values)
    low, high = min(values), max(values)
    reach = 1.5 * (high - low)
    return [*values, base] if low - reach <= base <= high + reach else list(values)


def mark_base(axes: Axes, which: str, base: float | None) -> None:
    """Mark the base's figure by a line, or by an arrow towards where it lies beyond the edge."""
    if base is None or not math.isfinite(base):
        return
    across = which == "x"
    low, high = axes.get_xlim() if across else axes.get_ylim()
    name, x, side = f"base {perplexity(base)}", 1.0, "right"
    where: Any = axes.transAxes
    if low <= base <= high:
        line = axes.axvline if across else axes.axhline
        line(base, color=MUTED, lw=1, ls=(0, (4, 3)), zorder=1)
        if across:
            x, side, where = base, "center", axes.get_xaxis_transform()
        else:
            name = f"dashed: {name}"
    elif across:
        name = f"{name} →" if base > high else f"← {name}"
        x, side = (1.0, "right") if base > high else (0.0, "left")
    else:
        name = f"↑ {name}" if base > high else f"↓ {name}"
    text: dict[str, Any] = {"fontsize": _FONT, "color": MUTED, "ha": side, "va": "bottom"}
    axes.text(x, 1.01, name, transform=where, **text)


def ends(estimate: Estimate) -> tuple[float, float]:
    """Both ends of the perplexity's interval; the perplexity itself where there is none."""
    found = estimate.perplexity_interval
    if found is None or not all(map(math.isfinite, found)):
        return estimate.perplexity, estimate.perplexity
    return found

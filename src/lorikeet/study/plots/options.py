"""How perplexity depends on the options that a study varies."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lorikeet.study.figures import perplexity
from lorikeet.study.outcomes import Outcome
from lorikeet.study.plots.axes import (
    End,
    ends,
    mark_base,
    name_ends,
    number,
    numeric_axis,
    round_figures,
    spans_factors,
    with_base,
)
from lorikeet.study.plots.naming import MOST_LOOKS, shortened
from lorikeet.study.plots.style import INK, MUTED, PALE, Look, Picture, look, new_figure, picture
from lorikeet.study.record import SEED, Study, short, shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_HEIGHT = 3.7
_MOST_CELLS = 12  # columns or rows of a heat map
_MOST_PANELS = 4


def numeric_options(study: Study) -> list[str]:
    """Varied options, the seed left out, with two numbers or more."""
    return [
        option
        for option, values in study.varied.items()
        if option != SEED and len(set(map(str, values))) > 1 and all(map(_is_number, values))
    ]


def plot_option(study: Study, outcomes: Sequence[Outcome], option: str) -> Picture | None:
    """Perplexity against an option: a line for each setting of the others, 95 % intervals."""
    lines = _lines(outcomes, option)
    if not any(len(line) > 1 for line in lines.values()):
        return None
    base = next((o.test.perplexity for o in outcomes if o.is_base), None)
    failed = _failed(study, option, lines)
    figure = new_figure(_HEIGHT)
    axes = figure.subplots()
    found = [outcome for line in lines.values() for outcome in line]
    x = sorted({outcome.settings[option] for outcome in found} | set(failed))
    numeric_axis(axes, "x", x, at_values=True)
    y = [value for outcome in found for value in ends(outcome.test)]
    numeric_axis(axes, "y", with_base(y, base), at_values=False)
    _draw_lines(axes, lines, option, log=spans_factors(x))
    mark_base(axes, "y", base)
    if failed:
        at = axes.get_xaxis_transform()
        axes.plot(failed, [0.96] * len(failed), "x", color=INK, ms=7, mew=2, transform=at)
    axes.set_xlabel(_axis_name(option))
    axes.set_ylabel("perplexity on the test rows")
    title = f"Perplexity by {_title(option)}"
    axes.set_title(shortened(title, width=60))
    caption = "Means over seeds with 95 % intervals; lower is better."
    if len(lines) > MOST_LOOKS:
        caption += (
            f" Of {len(lines)} settings of the other options, the one with the best is named."
        )
    if failed:
        caption += " A cross at the top: every run there failed."
    return picture(f"by_{short(option)}", figure, title=title, caption=caption)


def _lines(outcomes: Sequence[Outcome], option: str) -> dict[str, list[Outcome]]:
    """Groups with a perplexity, by the other options' values, each line by this option's."""
    trained = [o for o in outcomes if option in o.settings and math.isfinite(o.test.perplexity)]
    apart = [
        other
        for other in {key: None for o in trained for key in o.settings}
        if other != option and len({str(o.settings.get(other)) for o in trained}) > 1
    ]
    methods = {outcome.method for outcome in trained}
    lines: dict[str, list[Outcome]] = {}
    for outcome in trained:
        parts = [outcome.method] if len(methods) > 1 else []
        parts += [
            f"{short(o)}={shown(outcome.settings[o])}" for o in apart if o in outcome.settings
        ]
        lines.setdefault(" ".join(parts), []).append(outcome)
    return {k: sorted(line, key=lambda o: float(o.settings[option])) for k, line in lines.items()}


def _draw_lines(
    axes: Axes, lines: Mapping[str, Sequence[Outcome]], option: str, *, log: bool
) -> None:
    best = min(lines, key=lambda name: min(o.test.nll for o in lines[name]))
    many = len(lines) > MOST_LOOKS
    named = []
    for index, (name, line) in enumerate(lines.items()):
        one = look(0) if many and name == best else Look(PALE, "o", "-") if many else look(index)
        x = _side_by_side(axes, [o.settings[option] for o in line], index, len(lines), log=log)
        y = [outcome.test.perplexity for outcome in line]
        low = [value - ends(outcome.test)[0] for value, outcome in zip(y, line, strict=True)]
        high = [ends(outcome.test)[1] - value for value, outcome in zip(y, line, strict=True)]
        style = {"capsize": 2, "lw": 1.5, "elinewidth": 1, "zorder": 2 if one.colour == PALE else 3}
        axes.errorbar(x, y, (low, high), **one.line, **style)  # type: ignore[arg-type]
        if name and (not many or name == best):
            named.append(End(x[-1], y[-1], name, one.colour))
    name_ends(axes, named, height=_HEIGHT - 1)


def _side_by_side(
    axes: Axes, values: Sequence[float], index: int, of: int, *, log: bool
) -> list[float]:
    """The values, moved by a hair so that the lines' intervals do not hide each other."""
    if of > MOST_LOOKS:
        return list(values)
    low, high = axes.get_xlim()
    share = 0.008 * (index - (of - 1) / 2)
    if log:
        return [value * (high / low) ** share for value in values]
    return [value + (high - low) * share for value in values]


def _failed(study: Study, option: str, lines: Mapping[str, Sequence[Outcome]]) -> list[Any]:
    """Values of the option at which no run came to its end."""
    done = {outcome.settings[option] for line in lines.values() for outcome in line}
    return sorted({t.settings[option] for t in study.failed if option in t.settings} - done)


def plot_heat_map(study: Study, outcomes: Sequence[Outcome]) -> Picture | None:
    """Two options against each other: perplexity and its 95 % interval in every cell.

    Further options make panels of their own, up to four; of more there is no heat map.
    """
    options = [o for o, values in study.varied.items() if o != SEED and len(values) > 1]
    options.sort(key=lambda option: -len(study.varied[option]))
    if len(options) < 2:
        return None
    down, across, *rest = options
    panels = list(itertools.product(*(study.varied[option] for option in rest)))
    tables = [dict(zip(rest, panel, strict=True)) for panel in panels]
    rows, columns = study.varied[down], study.varied[across]
    if max(len(rows), len(columns)) > _MOST_CELLS or len(panels) > _MOST_PANELS:
        return None
    cells = [_cells(outcomes, down, across, study, where) for where in tables]
    values = [o.test.perplexity for table in cells for o in table.values()]
    if len(values) < 2:
        return None
    tall = 0.42 * len(rows) + (0.25 if rest else 0)
    figure = new_figure(tall * len(panels) + 1.1 + 0.1 * len(panels))
    stacked = figure.subplots(len(panels), 1, squeeze=False, sharex=True)[:, 0]
    for axes, table, where in zip(stacked, cells, tables, strict=True):
        image = _heat(axes, table, (len(rows), len(columns)), values)
        axes.set_yticks(np.arange(len(rows)) + 0.5, [_tick(value) for value in rows])
        axes.set_ylabel(short(down))
        if where:
            text = " ".join(f"{short(option)}={shown(value)}" for option, value in where.items())
            axes.set_title(shortened(text, width=60), fontsize=9, fontweight="normal", pad=4)
    stacked[-1].set_xticks(np.arange(len(columns)) + 0.5, [_tick(value) for value in columns])
    stacked[-1].set_xlabel(short(across))
    _colour_bar(figure, list(stacked), image, values)
    title = f"Perplexity by {short(down)} and {short(across)}"
    figure.suptitle(title, x=0.01, ha="left", fontsize=10, fontweight="bold")
    caption = (
        "Each cell: perplexity, below it the 95 % interval. Darker is better; the frame marks the"
        " best. A dash: no run came to its end."
    )
    return picture("heat_map", figure, title=title, caption=caption)


def _cells(
    outcomes: Sequence[Outcome], down: str, across: str, study: Study, where: Mapping[str, Any]
) -> dict[tuple[int, int], Outcome]:
    rows = [str(value) for value in study.varied[down]]
    columns = [str(value) for value in study.varied[across]]
    found: dict[tuple[int, int], Outcome] = {}
    for o in outcomes:
        here = all(str(o.settings.get(option)) == str(value) for option, value in where.items())
        if here and down in o.settings and across in o.settings:
            place = rows.index(str(o.settings[down])), columns.index(str(o.settings[across]))
            if math.isfinite(o.test.perplexity):
                found[place] = o
    return found


def _heat(
    axes: Axes,
    cells: Mapping[tuple[int, int], Outcome],
    shape: tuple[int, int],
    values: Sequence[float],
) -> Any:
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.patches import Rectangle

    table = np.full(shape, np.nan)
    for place, outcome in cells.items():
        table[place] = outcome.test.perplexity
    low, high = min(values), max(values)
    scale = LogNorm(low, high) if high > 2 * low else Normalize(low, high)
    image = axes.pcolormesh(table, cmap="viridis", norm=scale, edgecolors="none")
    small = 7 if shape[1] <= 6 else 6
    for row, column in np.ndindex(shape):
        found = cells.get((row, column))
        text = _in_cell(found, narrow=shape[1] > 6) if found else "-"
        dark = found and scale(found.test.perplexity) < 0.6
        colour = "#ffffff" if dark else "#000000" if found else MUTED
        axes.text(
            column + 0.5, row + 0.5, text, ha="center", va="center", color=colour, fontsize=small
        )
        if found and found.test.perplexity == low:
            corner, colour = (column + 0.04, row + 0.04), look(1).colour
            axes.add_patch(Rectangle(corner, 0.92, 0.92, fill=False, ec=colour, lw=2.5))
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return image


def _colour_bar(
    figure: Figure, stacked: Sequence[Axes], image: Any, values: Sequence[float]
) -> None:
    from matplotlib.ticker import FuncFormatter

    low, high = min(values), max(values)
    ticks = round_figures(low, high) if high > 2 * low else None
    bar = figure.colorbar(image, ax=list(stacked), aspect=25, pad=0.02, ticks=ticks)
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    bar.ax.minorticks_off()
    bar.set_label("perplexity")
    bar.outline.set_visible(False)


def _in_cell(outcome: Outcome, *, narrow: bool) -> str:
    value, (low, high) = perplexity(outcome.test.perplexity), ends(outcome.test)
    if low == high:
        return value
    if narrow:
        return f"{value}\n±{perplexity((high - low) / 2)}"
    return f"{value}\n{perplexity(low)} to {perplexity(high)}"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _tick(value: Any) -> str:
    return number(value) if _is_number(value) else shortened(shown(value), width=14, lines=2)


def _title(option: str) -> str:
    return {"lora.r": "rank", "data.limit": "rows of data"}.get(
        option, short(option).replace("_", " ")
    )


def _axis_name(option: str) -> str:
    return {"lora.r": "rank r", "data.limit": "rows of data"}.get(
        option, short(option).replace("_", " ")
    )

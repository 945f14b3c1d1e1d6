"""Two options against each other: perplexity in every cell."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lorikeet.study.figures import is_number, perplexity
from lorikeet.study.outcomes import Outcome
from lorikeet.study.plots.axes import ends, number, round_figures
from lorikeet.study.plots.naming import shortened
from lorikeet.study.plots.style import MUTED, Picture, look, new_figure, picture
from lorikeet.study.record import SEED, Study, short, shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_CELLS = 12  # columns or rows of a heat map
_MOST_PANELS = 4


@dataclass(frozen=True)
class Grid:
    """What a heat map shows.

    Attributes:
        down: the option of its rows.
        across: the option of its columns.
        panels: settings of the further options, one heat map each.
        cells: for each panel, the groups by row and column.
        values: the perplexities of all of them.
    """

    down: str
    across: str
    panels: Sequence[Mapping[str, Any]]
    cells: Sequence[Mapping[tuple[int, int], Outcome]]
    values: Sequence[float]


def plot_heat_map(study: Study, outcomes: Sequence[Outcome]) -> Picture | None:
    """Two options against each other: perplexity and its 95 % interval in every cell.

    Further options make panels of their own, up to four; of more there is no heat map, nor is
    there one of a study that did not plan every combination.
    """
    grid = _grid(study, outcomes)
    if grid is None:
        return None
    rows, columns = study.varied[grid.down], study.varied[grid.across]
    tall = 0.42 * len(rows) + (0.25 if len(grid.panels) > 1 else 0)
    figure = new_figure(tall * len(grid.panels) + 1.1 + 0.1 * len(grid.panels))
    stacked = list(figure.subplots(len(grid.panels), 1, squeeze=False, sharex=True)[:, 0])
    for axes, cells, where in zip(stacked, grid.cells, grid.panels, strict=True):
        image = _heat(axes, cells, (len(rows), len(columns)), grid.values)
        axes.set_yticks(np.arange(len(rows)) + 0.5, [_tick(value) for value in rows])
        axes.set_ylabel(short(grid.down))
        text = " ".join(f"{short(option)}={shown(value)}" for option, value in where.items())
        axes.set_title(shortened(text, width=60), fontsize=9, fontweight="normal", pad=4)
    stacked[-1].set_xticks(np.arange(len(columns)) + 0.5, [_tick(value) for value in columns])
    stacked[-1].set_xlabel(short(grid.across))
    _colour_bar(figure, stacked, image, grid.values)
    title = f"Perplexity by {short(grid.down)} and {short(grid.across)}"
    figure.suptitle(title, x=0.01, ha="left", fontsize=10, fontweight="bold")
    caption = (
        "Each cell: perplexity, below it the 95 % interval. Darker is better; the frame marks the"
        " best. A dash: no run came to its end."
    )
    return picture("heat_map", figure, title=title, caption=caption)


def _grid(study: Study, outcomes: Sequence[Outcome]) -> Grid | None:
    """The two options with the most values, and the others; None if they make no heat map."""
    options = [o for o, values in study.varied.items() if o != SEED and len(values) > 1]
    options.sort(key=lambda option: -len(study.varied[option]))
    if len(options) < 2 or not _is_planned_whole(study, options):
        return None
    down, across, *rest = options
    values = itertools.product(*(study.varied[option] for option in rest))
    panels = [dict(zip(rest, panel, strict=True)) for panel in values]
    if len(study.varied[down]) > _MOST_CELLS or len(panels) > _MOST_PANELS:
        return None
    cells = [_cells(outcomes, down, across, study, where) for where in panels]
    found = [o.test.perplexity for panel in cells for o in panel.values()]
    return Grid(down, across, panels, cells, found) if len(found) > 1 else None


def _is_planned_whole(study: Study, options: Sequence[str]) -> bool:
    """Whether there was a trial for every combination of the options' values."""
    trials = [
        trial for trial in study.trials if all(option in trial.settings for option in options)
    ]
    planned = {tuple(str(trial.settings[option]) for option in options) for trial in trials}
    return len(planned) == math.prod(len(study.varied[option]) for option in options)


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


def _tick(value: Any) -> str:
    return number(value) if is_number(value) else shortened(shown(value), width=14, lines=2)

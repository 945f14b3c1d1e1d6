"""Heat maps of what an adapter does to which weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lorikeet.adapters.anatomy import Anatomy
from lorikeet.files import disk_errors
from lorikeet.study.plots.style import new_figure, plain, render, require_plots, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_STYLE: dict[Any, Any] = {"svg.hashsalt": "lorikeet", "svg.fonttype": "none", "font.size": 9}
_COLOURS = "viridis"  # light grows with the value: readable with any colour vision, and in grey
_CELL = 0.36  # inches
_MOST_ROWS = 40  # rows that are named, and whose figures are written, one by one


def plot_anatomy(anatomy: Anatomy, path: Path, *, title: str = "") -> None:
    """Draw how far an adapter moves each weight, and in how many directions, blocks by kinds.

    The same adapter gives the same file, byte for byte, with the same version of matplotlib.

    Args:
        anatomy: from `examine`.
        path: the suffix says what is written: .png or .svg.
        title: stands above the picture.

    Raises:
        ConfigError: see `require_plots`.
        StorageError: the disk refused the write.
    """
    require_plots(path)
    kind = path.suffix.lower()[1:]
    with styled(_STYLE):
        content = render(_figure(anatomy, title), kind, dpi=150)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def _figure(anatomy: Anatomy, title: str) -> Figure:
    kinds, layers = list(anatomy.by_kind()), anatomy.layers
    width = 2 * (max(2.2, _CELL * len(kinds)) + 1.6)
    height = min(max(2.0, _CELL * len(layers)), 16) + 2.0
    figure = new_figure(height, width=width)
    moved, ranks = figure.subplots(1, 2, sharey=True)
    norms = np.full((len(layers), len(kinds)), np.nan)
    effective = norms.copy()
    for (layer, kind), group in anatomy.cells().items():
        place = layers.index(layer), kinds.index(kind)
        norms[place] = anatomy.moved(group)
        effective[place] = group.effective_rank
    if anatomy.weighed:
        power, what = -2, "‖update‖ / ‖W‖ (%)"
    else:
        power = math.floor(math.log10(np.nanmax(norms) or 1.0))
        what = f"rms of the update's entries (1e{power})"
    norms /= 10.0**power
    highest = max(anatomy.ranks)
    r = f"r up to {highest}" if len(anatomy.ranks) > 1 else f"r = {highest}"
    _panel(moved, norms, "How far the weights moved", what, np.nanmax(norms))
    _panel(ranks, effective, "In how many directions", f"effective rank ({r})", highest)
    names = ["other" if layer is None else str(layer) for layer in layers]
    _label(moved, kinds, names)
    _label(ranks, kinds, names)
    ranks.tick_params(axis="y", labelleft=False)
    moved.set_ylabel("block")
    if title:
        figure.suptitle(plain(title))
    return figure


def _panel(axes: Axes, values: np.ndarray, title: str, unit: str, top: float) -> None:
    """One heat map from 0 to `top`; places without an adapter stay white, with a dash."""
    top = top or 1.0
    image = axes.imshow(values, cmap=_COLOURS, vmin=0, vmax=top, aspect="auto")
    if len(values) <= _MOST_ROWS:
        for (row, column), value in np.ndenumerate(values):
            colour = "0.6" if np.isnan(value) else "white" if value < 0.6 * top else "black"
            text = "-" if np.isnan(value) else _figures(value)
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=7)
    axes.set_title(title, fontsize=10)
    axes.figure.colorbar(image, ax=axes, label=unit, aspect=30)


def _figures(value: float) -> str:
    return f"{value:.2f}" if value < 0.95 else f"{value:.1f}" if value < 99.5 else f"{value:.0f}"


def _label(axes: Axes, kinds: list[str], names: list[str]) -> None:
    axes.set_xticks(range(len(kinds)), [plain(kind) for kind in kinds])
    axes.tick_params(axis="x", length=2, rotation=50)
    for label in axes.get_xticklabels():
        label.set(ha="right", rotation_mode="anchor")
    step = -(-len(names) // _MOST_ROWS)
    rows = [row for row in range(len(names)) if row % step == 0 or names[row] == "other"]
    axes.set_yticks(rows, [names[row] for row in rows])

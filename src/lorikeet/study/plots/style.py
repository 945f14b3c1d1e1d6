"""How every picture looks, and how it becomes bytes: the same ones for the same content.

Colours are those of Okabe and Ito (Color Universal Design, 2008), which all kinds of colour vision
tell apart; markers and dashes tell the same series apart in grey.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorikeet.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 5.4
"""Inches of a picture: at this width a phone shows text of 9 points as it is."""

INK, MUTED, GRID, PAPER, PALE = "#1d1d1f", "#696973", "#e2e2e7", "#fefefe", "#b4b4bd"
"""Text and axes; what stands back; lines behind the data; the ground; data that stands back."""

_SUFFIXES = (".png", ".svg")
_VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--grid",
    PAPER: "--paper",
    PALE: "--pale",
}
_SERIES = (
    ("#0072b2", "o", "-"),
    ("#d55e00", "s", "--"),
    ("#009e73", "^", "-."),
    ("#c2609a", "D", ":"),
    ("#b07c00", "v", (0, (5, 1, 1, 1))),
    ("#3a95cc", "P", (0, (1, 1))),
    ("#7a5195", "X", (0, (6, 2))),
    ("#5f5f5f", "*", (0, (3, 1, 1, 1, 1, 1))),
)
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "lorikeet",  # ids come from it instead of from chance
    "font.size": 9,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib: the same on every machine
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.facecolor": "none",
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.linewidth": 0.8,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "figure.facecolor": PAPER,
    "lines.markersize": 5,
}


@dataclass(frozen=True)
class Picture:
    """A finished picture.

    Attributes:
        name: its files are `NAME.svg` and `NAME.png`.
        title: what it shows, in a few words.
        caption: how to read it, in sentences.
        svg: the picture as SVG.
        png: the same as PNG.
    """

    name: str
    title: str
    caption: str
    svg: bytes
    png: bytes


@dataclass(frozen=True)
class Look:
    """How one series is told from the others, with colour and without."""

    colour: str
    marker: str
    dash: Any

    @property
    def line(self) -> dict[str, Any]:
        """Arguments of `Axes.plot` and `Axes.errorbar`."""
        return {"color": self.colour, "marker": self.marker, "linestyle": self.dash}


def look(index: int) -> Look:
    """The look of the series with this number; they repeat after eight."""
    return Look(*_SERIES[index % len(_SERIES)])


def require_plots(path: Path) -> None:
    """Find out whether a picture can be made, before the work for it is done.

    Raises:
        ConfigError: the suffix is none of ours, or matplotlib is not installed.
    """
    if path.suffix.lower() not in _SUFFIXES:
        raise ConfigError(f"{path} must end in {' or '.join(_SUFFIXES)}")
    if not can_plot():
        raise ConfigError(
            "pictures need matplotlib, which is not installed: pip install 'lorikeet[plots]'"
        )


def can_plot() -> bool:
    """Whether matplotlib is installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


@contextmanager
def styled(style: dict[Any, Any] | None = None) -> Iterator[None]:
    """Build and render figures in here; `style` replaces the look of a study's pictures."""
    from matplotlib import rc_context

    with rc_context(_STYLE if style is None else style), warnings.catch_warnings():
        # A name may hold signs that the font lacks: a box in the PNG, as written in the SVG.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        warnings.filterwarnings("ignore", message="Matplotlib currently does not support")
        yield


def new_figure(height: float, *, width: float = WIDTH) -> Figure:
    """An empty figure, in inches, that belongs to no window and no global list."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def render(figure: Figure, kind: str, *, dpi: int = 200) -> bytes:
    """The figure as `svg` or `png`, without the date and without what made it."""
    timeless: dict[str, Any] = {"Date": None} if kind == "svg" else {"Software": None}
    content = io.BytesIO()
    figure.savefig(content, format=kind, dpi=dpi, metadata=timeless)
    return content.getvalue()


def picture(name: str, figure: Figure, *, title: str, caption: str) -> Picture:
    """Render a figure in both formats, laid out once; call it within `styled`."""
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)
    figure.set_layout_engine(None)  # "none" would lay it out again for each format
    return Picture(name, title, caption, render(figure, "svg"), render(figure, "png"))


def plain(text: str) -> str:
    """Text that matplotlib does not take for a formula, on one line."""
    return "".join(c if c.isprintable() else " " for c in text).replace("$", r"\$")


def inline_svg(made: Picture) -> str:
    """The SVG as a part of a page: ids of its own, the page's font, colours that follow its theme.

    Its description is the element with the id `caption-NAME`.
    A page that holds it sets the variables `--ink`, `--muted`, `--grid`, `--paper`, `--pale` and
    `--series-0` to `--series-7`; where it does not, the colours are those of the file.
    """
    text = made.svg.decode("utf-8")
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{made.name}-", text)
    for fonts in (r"(font-family:)", r"(font: [^;\"]*?px)"):  # matplotlib from 3.11 on, and before
        text = re.sub(fonts + r" [^;\"]*", r"\1 var(--font, sans-serif)", text)
    text = text.replace("<svg ", f'<svg role="img" aria-labelledby="caption-{made.name}" ', 1)
    for colour, variable in _theme():
        text = text.replace(colour, f"var({variable}, {colour})")
    return text


def _theme() -> Iterator[tuple[str, str]]:
    yield from _VARIABLES.items()
    for index, (colour, _, _) in enumerate(_SERIES):
        yield colour, f"--series-{index}"

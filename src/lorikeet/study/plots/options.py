"""How perplexity depends on the options that a study varies."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lorikeet.study.figures import is_number
from lorikeet.study.outcomes import Outcome
from lorikeet.study.plots.axes import (
    End,
    ends,
    mark_base,
    name_ends,
    numeric_axis,
    spans_factors,
    with_base,
)
from lorikeet.study.plots.naming import MOST_LOOKS
from lorikeet.study.plots.style import INK, PALE, Look, Picture, look, new_figure, picture
from lorikeet.study.record import SEED, Study, short, shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_HEIGHT = 3.7
_TICKS = 8  # values of an option that each have a tick; of more, round figures have


def numeric_options(study: Study) -> list[str]:
    """Varied options, the seed left out, with two numbers or more."""
    return [
        option
        for option, values in study.varied.items()
        if option != SEED and len(set(map(str, values))) > 1 and all(map(is_number, values))
    ]


def plot_option(study: Study, outcomes: Sequence[Outcome], option: str) -> Picture | None:
    """Perplexity against an option: a line for each setting of the others, 95 % intervals.

    Where no two groups differ in this option alone, as in random draws, the marks are not joined.
    """
    lines = _lines(outcomes, option)
    found = [outcome for line in lines.values() for outcome in line]
    if len({outcome.settings[option] for outcome in found}) < 2:
        return None
    joined = any(len(line) > 1 for line in lines.values())
    lines = lines if joined else {"": found}
    failed = _failed(study, option, lines)
    figure = new_figure(_HEIGHT)
    axes = figure.subplots()
    x = sorted({outcome.settings[option] for outcome in found} | set(failed))
    numeric_axis(axes, "x", x, at_values=len(x) <= _TICKS)
    base = next((o.test.perplexity for o in outcomes if o.is_base), None)
    y = [value for outcome in found for value in ends(outcome.test)]
    numeric_axis(axes, "y", with_base(y, base), at_values=False)
    _draw_lines(axes, lines, option, joined=joined, log=spans_factors(x))
    mark_base(axes, "y", base)
    if failed:
        at = axes.get_xaxis_transform()
        axes.plot(failed, [0.96] * len(failed), "x", color=INK, ms=7, mew=2, transform=at)
    axes.set(xlabel=_axis_name(option), ylabel="perplexity on the test rows")
    title = f"Perplexity by {_title(option)}"
    axes.set_title(title)
    caption = _caption(len(lines), joined=joined, failed=bool(failed))
    return picture(f"by_{short(option)}", figure, title=title, caption=caption)


def _caption(lines: int, *, joined: bool, failed: bool) -> str:
    text = "Means over seeds with 95 % intervals; lower is better."
    if not joined:
        text += " Other options differ from mark to mark as well."
    if lines > MOST_LOOKS:
        text += f" Of {lines} settings of the other options, the one with the best is named."
    return text + (" A cross at the top: every run there failed." if failed else "")


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
    axes: Axes,
    lines: Mapping[str, Sequence[Outcome]],
    option: str,
    *,
    joined: bool,
    log: bool,
) -> None:
    best = min(lines, key=lambda name: min(o.test.nll for o in lines[name]))
    many = len(lines) > MOST_LOOKS
    named = []
    for index, (name, line) in enumerate(lines.items()):
        one = look(0) if many and name == best else Look(PALE, "o", "-") if many else look(index)
        one = one if joined else replace(one, dash="none")
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


def _title(option: str) -> str:
    return {"lora.r": "rank", "data.limit": "rows of data"}.get(
        option, short(option).replace("_", " ")
    )


def _axis_name(option: str) -> str:
    return {"lora.r": "rank r", "data.limit": "rows of data"}.get(
        option, short(option).replace("_", " ")
    )

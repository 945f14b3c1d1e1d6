"""A finding, and how its figures are put into words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorikeet.study import figures
from lorikeet.study.statistics import Estimate
from lorikeet.study.wording import listed

_NAMES = 5  # in one sentence


@dataclass(frozen=True)
class Finding:
    """A sentence or two, and the figures behind them.

    Attributes:
        topic: what it is about, in a word or three.
        text: plain text.
        figures: JSON-ready; every figure of the text is among them, with more digits.
        measured: whether a clock or the peak of memory has a say in it. All others are the same
            for two runs of one study on a CPU.
    """

    topic: str
    text: str
    figures: Mapping[str, Any]
    measured: bool = False


def change(gap: Estimate, *, of: str = "perplexity ") -> str:
    """A difference in words: `perplexity -1.9 % [-2.5, -1.3] (-0.0192 nats/token)`.

    The difference in nats per token is the logarithm of the ratio of two perplexities, so both are
    one statement with one interval. Of several seeds or settings it is the ratio of the geometric
    means.
    """
    if not math.isfinite(gap.nll):
        return f"nats/token {figures.fixed(gap.nll, decimals=4)}"
    ratio, ends = gap.perplexity, gap.perplexity_interval
    if ends is None:
        return f"{of}{percent(ratio)} ({gap.nll:+.4f} nats/token; no interval)"
    low, high = (percent(end, like=ratio).removesuffix(" %") for end in ends)
    return f"{of}{percent(ratio)} [{low}, {high}] ({gap.nll:+.4f} nats/token)"


def percent(ratio: float, *, like: float | None = None) -> str:
    """A ratio as a change in percent, with the decimals that `like` would have: `+0.42 %`."""
    shown = figures.fixed(100 * (ratio - 1), decimals=_decimals(ratio if like is None else like))
    return f"{shown} %" if shown.startswith("-") else f"+{shown} %"


def _decimals(ratio: float) -> int:
    """More for a change of less than one percent, and close to minus a hundred."""
    if 0 < ratio < 0.1:
        return max(1, -1 - math.floor(math.log10(ratio)))
    by = abs(100 * (ratio - 1))
    return 2 if by < 1 else 1 if by < 100 else 0


def verdict(gap: Estimate) -> str:
    """Whether a difference can be told from none, and which way it goes."""
    if not gap.distinguishable:
        return "not distinguishable"
    return "better" if gap.nll < 0 else "worse"


def some(names: Sequence[str]) -> str:
    """The names, or the first of them and how many more there are."""
    if len(names) <= _NAMES + 1:
        return listed(names)
    return f"{', '.join(names[:_NAMES])} and {len(names) - _NAMES} more"

"""How figures are written in tables, pictures and on the page."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lorikeet.study.statistics import Estimate

NONE = "-"
"""Stands where there is no figure."""


def perplexity(value: float) -> str:
    """Four digits that count: 3.482, 31.24, 1,204."""
    return fixed(value, decimals=_decimals(value))


def fixed(value: float, *, decimals: int) -> str:
    """So many decimals, whatever the value."""
    if math.isnan(value):
        return "nan"
    if math.isinf(value):
        return "inf" if value > 0 else "-inf"
    return f"{value:.2e}" if abs(value) >= 1e7 else f"{value:,.{decimals}f}"


def perplexity_of(estimate: Estimate) -> str:
    """Perplexity with its 95 % interval: `3.482 [3.238, 3.744]`."""
    value, ends = estimate.perplexity, estimate.perplexity_interval
    if ends is None or not math.isfinite(value):
        return perplexity(value)
    low, high = (fixed(end, decimals=_decimals(value)) for end in ends)
    return f"{perplexity(value)} [{low}, {high}]"


def difference_of(estimate: Estimate | None) -> str:
    """A difference in nats per token with its 95 % interval: `-0.0503 [-0.0663, -0.0343]`."""
    if estimate is None:
        return NONE
    if not math.isfinite(estimate.nll):
        return fixed(estimate.nll, decimals=4)
    if estimate.low is None or estimate.high is None:
        return f"{estimate.nll:+.4f}"
    return f"{estimate.nll:+.4f} [{estimate.low:+.4f}, {estimate.high:+.4f}]"


def difference_in_short(estimate: Estimate | None) -> str:
    """The same in little room: `-0.050 ±0.016`."""
    if estimate is None or not math.isfinite(estimate.nll):
        return difference_of(estimate)
    if estimate.low is None or estimate.high is None:
        return f"{estimate.nll:+.3f}"
    return f"{estimate.nll:+.3f} ±{(estimate.high - estimate.low) / 2:.3f}"


def nats(value: float | None) -> str:
    """Nats per token: 1.2475."""
    return NONE if value is None else fixed(value, decimals=4)


def rate(value: float) -> str:
    """A learning rate: 2e-4."""
    if value >= 0.1:
        return f"{value:g}"
    digits, _, exponent = f"{value:.3e}".partition("e")
    return f"{float(digits):g}e{int(exponent)}"


def size(count: float | None) -> str:
    """Bytes in decimal units: 19.6 MB."""
    if not count:
        return NONE
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.{_decimals(count / scale) - 1}f} {unit}"
    return f"{count:.0f} B"


def three_digits(value: float) -> str:
    """Three digits that count: 0.612, 61.2, 1,840."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else NONE
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def whole_numbers(numbers: Sequence[int]) -> str:
    """`0-4` for numbers in a row, `0, 2, 7` for others."""
    if not numbers:
        return NONE
    first, last = numbers[0], numbers[-1]
    if len(numbers) > 2 and list(numbers) == list(range(first, last + 1)):
        return f"{first}-{last}"
    return ", ".join(map(str, numbers))


def is_number(value: object) -> bool:
    """Whether an option's value is a number; True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _decimals(value: float) -> int:
    if not math.isfinite(value) or value >= 1000:
        return 0
    return 4 - len(str(int(abs(value))))

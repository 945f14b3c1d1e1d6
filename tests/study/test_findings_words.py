"""How figures are put into words."""

from __future__ import annotations

import math

import pytest

from lorikeet.study.findings.finding import change, percent, some, verdict
from lorikeet.study.statistics import Estimate


def gap(nll: float, reach: float | None) -> Estimate:
    if reach is None:
        return Estimate(nll, None, None, None, None, 1, 1)
    return Estimate(nll, nll - reach, nll + reach, reach / 2, 9.0, 50, 3)


@pytest.mark.parametrize(
    ("ratio", "text"),
    [
        (1.0, "+0.00 %"),
        (0.9958, "-0.42 %"),
        (1.019, "+1.9 %"),
        (0.25, "-75.0 %"),
        (0.0123, "-98.8 %"),
        (0.000277, "-99.972 %"),
        (13.04, "+1,204 %"),
        (math.inf, "+inf %"),
        (0.0, "-100 %"),
    ],
)
def test_a_ratio_in_percent(ratio: float, text: str) -> None:
    assert percent(ratio) == text


def test_a_difference_has_one_interval_in_both_units() -> None:
    """exp(-0.02) is 1.98 % less, exp(-0.03) 2.96 % and exp(-0.01) 0.995 %."""
    assert change(gap(-0.02, 0.01)) == "perplexity -2.0 % [-3.0, -1.0] (-0.0200 nats/token)"
    assert change(gap(0.002, 0.01), of="") == "+0.20 % [-0.80, +1.21] (+0.0020 nats/token)"
    assert change(gap(-0.02, None)) == "perplexity -2.0 % (-0.0200 nats/token; no interval)"
    assert change(gap(math.inf, None)) == "nats/token inf"


def test_verdicts() -> None:
    assert verdict(gap(-0.02, 0.01)) == "better"
    assert verdict(gap(0.02, 0.01)) == "worse"
    assert verdict(gap(0.02, 0.02)) == verdict(gap(0.02, None)) == "not distinguishable"


def test_long_lists_are_cut() -> None:
    assert some(["a", "b"]) == "a and b"
    assert some(list("abcdef")) == "a, b, c, d, e and f"
    assert some(list("abcdefg")) == "a, b, c, d, e and 2 more"

"""How figures are written."""

from __future__ import annotations

import math

import pytest

from lorikeet.study import figures
from lorikeet.study.statistics import Estimate


def made(nll: float, low: float | None, high: float | None) -> Estimate:
    return Estimate(nll, low, high, None, None, documents=10, seeds=3)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3.48219, "3.482"),
        (31.2371, "31.24"),
        (312.371, "312.4"),
        (1204.4, "1,204"),
        (2.4e17, "2.40e+17"),
        (math.inf, "inf"),
        (math.nan, "nan"),
    ],
)
def test_perplexities_have_four_digits(value: float, text: str) -> None:
    assert figures.perplexity(value) == text


def test_an_interval_has_the_decimals_of_its_figure() -> None:
    estimate = made(math.log(10.5), math.log(9.5), math.log(111.5))
    assert figures.perplexity_of(estimate) == "10.50 [9.50, 111.50]"
    assert figures.perplexity_of(made(math.log(10.5), None, None)) == "10.50"
    assert figures.perplexity_of(made(800.0, 799.0, 801.0)) == "inf"


def test_differences() -> None:
    assert figures.difference_of(made(-0.05, -0.0663, -0.0337)) == "-0.0500 [-0.0663, -0.0337]"
    assert figures.difference_of(made(0.05, None, None)) == "+0.0500"
    assert figures.difference_of(made(math.nan, None, None)) == "nan"
    assert figures.difference_of(None) == "-"
    assert figures.difference_in_short(made(-0.05, -0.0663, -0.0337)) == "-0.050 ±0.016"


@pytest.mark.parametrize(
    ("value", "text"), [(2e-4, "2e-4"), (1.5e-5, "1.5e-5"), (3.02e-05, "3.02e-5"), (50.0, "50")]
)
def test_learning_rates(value: float, text: str) -> None:
    assert figures.rate(value) == text
    assert float(text) == value


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "-"), (12, "12 B"), (138_000, "138 kB"), (19_600_000, "19.6 MB"), (2.1e9, "2.10 GB")],
)
def test_sizes(count: float, text: str) -> None:
    assert figures.size(count) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.6123, "0.612"), (61.23, "61.2"), (1840.4, "1,840"), (0, "0")]
)
def test_three_digits(value: float, text: str) -> None:
    assert figures.three_digits(value) == text


def test_seeds() -> None:
    assert figures.whole_numbers([]) == "-"
    assert figures.whole_numbers([0, 1]) == "0, 1"
    assert figures.whole_numbers([0, 1, 2, 3]) == "0-3"
    assert figures.whole_numbers([0, 2, 7]) == "0, 2, 7"

"""Exact match counts what is equal, and its interval is Wilson's."""

from __future__ import annotations

import pytest

from lorikeet.starter.exact import tally, wilson
from lorikeet.starter.instance import Instance


def _instance(task: str, answer: str) -> Instance:
    return Instance(task, ({"role": "user", "content": answer},), answer, {}, frozenset())


INSTANCES = [_instance("where", "a"), _instance("who", "b"), _instance("where", "c")]


def test_counts_per_task_and_overall() -> None:
    found = tally(INSTANCES, ["a", "b", "x"])
    assert found.tasks == {"where": (1, 2), "who": (1, 1)}
    assert (found.correct, found.total, found.share) == (2, 3, 2 / 3)


@pytest.mark.parametrize("answer", ["A", "a ", " a", "a.", ""])
def test_nearly_right_is_wrong(answer: str) -> None:
    assert tally(INSTANCES[:1], [answer]).correct == 0


# Reference values: R's binom::binom.wilson, and Newcombe 1998 (81 of 263).
@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (29, 29, 0.8830, 1.0),
    ],
)
def test_wilson_interval(correct: int, total: int, low: float, high: float) -> None:
    assert wilson(correct, total) == pytest.approx((low, high), abs=5e-5)


def test_the_score_carries_its_interval() -> None:
    found = tally(INSTANCES, ["a", "b", "x"])
    assert found.interval == wilson(2, 3)


def test_the_table_has_a_line_per_task_and_one_for_all() -> None:
    assert tally(INSTANCES, ["a", "b", "x"]).markdown() == (
        "| task | exact | of | share |\n|---|---:|---:|---:|\n"
        "| where | 1 | 2 | 50.0% |\n| who | 1 | 1 | 100.0% |\n| **all** | 2 | 3 | 66.7% |\n"
        "\n95 % interval of the share over all tasks: 20.8% to 93.9%.\n"
    )


def test_nothing_to_score_and_missing_answers_are_errors() -> None:
    with pytest.raises(ValueError, match="found 2 for 3"):
        tally(INSTANCES, ["a", "b"])
    with pytest.raises(ValueError, match="found 0 for 0"):
        tally([], [])
    with pytest.raises(ValueError, match="interval"):
        wilson(0, 0)

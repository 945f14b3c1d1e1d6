"""Figures from answers, and the tables that show them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.contestants import CONTESTANTS
from benchmarks.protocol import Answer
from benchmarks.roofline import Shape, base_operations, step_operations
from benchmarks.summary import Deviation, Spread, Summary, summarise
from benchmarks.tables import markdown, memory_table, parity_table, scaling_table, speed_table
from benchmarks.workload import StepSize, Workload, dense

SHAPE = Shape(linears=((2, 3, 4),), head=(2, 10), layers=2, attention_width=5, vocabulary=9)
SIZES = [StepSize((10,), 9), StepSize((20,), 19), StepSize((40,), 39)]
OURS = [9.0, 1.0, 4.0]
THEIRS = [1.0, 2.0, 16.0]
GEMM = [5.0, 0.5, 1.0]


def answers(seconds: list[float], *, loss: float | None = 3.0) -> list[Answer]:
    return [Answer(k, s, loss, 0, 0, 0) for k, s in enumerate(seconds)]


def summary(*, their_loss: float = 3.0) -> Summary:
    given = {
        "lorikeet": answers(OURS),
        "peft-full": answers(THEIRS, loss=their_loss),
        "gemm": answers(GEMM, loss=None),
    }
    contestants = [CONTESTANTS["lorikeet"], CONTESTANTS["peft-full"]]
    return summarise(contestants, given, SIZES, SHAPE, r=2, warmup=1)


def test_rates_and_ratios_leave_the_warm_up_out() -> None:
    found = summary()
    ours, theirs = found.figures["lorikeet"], found.figures["peft-full"]
    assert (ours.tokens_per_second.low, ours.tokens_per_second.high) == (10.0, 20.0)
    assert theirs.reference_is_faster == Spread.of([2.0, 4.0])  # of the same round
    assert ours.reference_is_faster == Spread.of([1.0, 1.0])
    assert (found.tokens, found.supervised) == (30.0, 29.0)


def test_shares_are_formed_at_the_rate_of_the_same_round() -> None:
    found = summary()
    assert found.gemm_rate.high == base_operations(SHAPE, SIZES[2]) / 1.0
    shares = []
    for size, gemm, theirs in zip(SIZES[1:], GEMM[1:], THEIRS[1:], strict=True):
        rate = base_operations(SHAPE, size) / gemm
        shares.append(step_operations(SHAPE, size, method="full", r=2) / rate / theirs)
    assert found.figures["peft-full"].share_of_roofline == Spread.of(shares)


def test_first_losses_apart_are_doubtful() -> None:
    assert summary(their_loss=3.02).warnings == []
    (warning,) = summary(their_loss=3.1).warnings
    assert "lorikeet 3.0000, peft-full 3.1000" in warning


def test_the_spread_interpolates() -> None:
    assert Spread.of([4.0, 1.0, 2.0, 3.0]) == Spread(4, 2.5, 1.75, 3.25, 1.0, 4.0)
    assert Spread.of([7.0]) == Spread(1, 7.0, 7.0, 7.0, 7.0, 7.0)


def test_the_deviation_is_relative() -> None:
    found = Deviation.of([2.0, 3.3, 1.0], [2.0, 3.0, 1.05])
    assert found.largest == pytest.approx(0.1)
    assert found.step == 1
    assert found.mean == pytest.approx(6.3 / 6.05 - 1)


def test_markdown_is_aligned() -> None:
    assert markdown(["name", "n"], [["a", "1"], ["longer", "23"]]) == (
        "| name   |  n |\n| ------ | -: |\n| a      |  1 |\n| longer | 23 |"
    )


def test_the_speed_table() -> None:
    workload = Workload("some", "rows", [], 1, 1)
    found = replace(summary(), warnings=["something is odd"])
    text = speed_table(workload, found, {"lorikeet": {"path": "fast path"}, "peft-full": {}})
    lines = text.splitlines()
    assert lines[0] == "### some: rows"
    ours, theirs = (line.split("|")[1:-1] for line in lines[4:6])
    assert [cell.strip() for cell in ours][:4] == ["lorikeet", "15 [12, 18]", "2.50", "1"]
    assert [cell.strip() for cell in theirs][3:5] == ["3.00 [2.50, 3.50]", "2.00 to 4.00"]
    assert "2 rounds, 30 tokens a step, 29 of them supervised." in text
    assert "**Doubtful:** something is odd." in text
    assert text.endswith("lorikeet: fast path.")


def test_the_other_tables() -> None:
    peaks, loaded = {"a": 2**30, "b": 3 * 2**30}, {"a": 0, "b": 2**30}
    text = memory_table(dense(9, steps=1), peaks, loaded, device="cpu")
    assert "| b          |      3.00 |               1.00 |    3.00 |" in text
    text = parity_table([2.0, 1.0], "a", {"b": Deviation(0.01, 1, -0.005)}, {})
    assert "| b        |            1.000% |       2 |            -0.5000% |" in text
    cell = {"axis": "rank", "value": "4", "about": "x", "steps": 0}
    blank = {"tokens_per_second": None, "peak_bytes": None, "prepare_seconds": None}
    assert "| rank 4 |          |           |" in scaling_table([{**cell, **blank}])


def test_peaks_of_a_gpu_are_those_of_the_steps() -> None:
    text = memory_table(dense(9, steps=1), {"a": 2**30}, {"a": 2**31}, device="cuda")
    assert "| peak of the steps, GiB | peak of loading, GiB |" in text
    assert "| a          |                   1.00 |                 2.00 |" in text

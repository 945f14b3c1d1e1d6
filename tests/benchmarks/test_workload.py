"""What a step counts."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.process import BenchmarkError
from benchmarks.protocol import Answer, Job, Row, read_rows
from benchmarks.workload import StepSize, Workload, check_tokens, dense, dolly


def answer(*, tokens: int, supervised: int) -> Answer:
    return Answer(0, 1.0, 2.0, tokens, supervised, 0)


def test_real_tokens_are_counted_and_no_pads() -> None:
    rows = [Row([1] * n, [0] * (n - s) + [1] * s) for n, s in [(5, 2), (3, 1), (7, 6), (2, 1)]]
    sizes = Workload("some", "", rows, step_examples=2, micro_examples=1).sizes
    assert sizes == [StepSize((5, 3), 3), StepSize((7, 2), 7)]
    assert [size.tokens for size in sizes] == [8, 9]


def test_dense_supervises_all_but_first_tokens() -> None:
    workload = dense(50, steps=3, examples=2, length=16)
    assert workload.sizes == [StepSize((16, 16), 30)] * 3
    assert all(0 <= token < 50 for row in workload.rows for token in row.ids)
    assert workload.rows == dense(50, steps=3, examples=2, length=16).rows


def test_workers_read_the_rows_that_were_written(tmp_path: Path) -> None:
    workload = dense(50, steps=2, examples=3, length=4)
    workload.write(tmp_path / "rows.jsonl")
    assert read_rows(tmp_path / "rows.jsonl") == workload.rows
    job = Job("model", str(tmp_path / "rows.jsonl"), steps=2, step_examples=3, micro_examples=1)
    job.write(tmp_path / "job.json")
    assert list(Job.read(tmp_path / "job.json").step_rows()) == [
        workload.rows[:3],
        workload.rows[3:],
    ]


def test_a_worker_that_saw_something_else_is_refused() -> None:
    size = StepSize((5, 3), 3)
    check_tokens("one", answer(tokens=8, supervised=3), size)
    for seen in (answer(tokens=10, supervised=3), answer(tokens=8, supervised=8)):
        with pytest.raises(BenchmarkError, match=r"one saw .* the workload has 8 and 3"):
            check_tokens("one", seen, size)


def test_too_few_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match="there is no data file"):
        dolly(tmp_path / "none.jsonl", tmp_path, steps=1)


def test_dolly_is_lorikeets_rendering(stories: Path, questions: Path) -> None:
    workload = dolly(questions, stories, steps=2)
    assert len(workload.sizes) == 2
    for row in workload.rows:
        assert len(row.ids) == len(row.supervised)
        assert row.supervised[0] == 0 < sum(row.supervised) < len(row.ids)
    with pytest.raises(BenchmarkError, match="enough for 3 steps, not for 9"):
        dolly(questions, stories, steps=9)


@pytest.mark.parametrize(("micro", "expected"), [(2, 2), (8, 8)])
def test_micro_batches(micro: int, expected: int, stories: Path, questions: Path) -> None:
    workload = dolly(questions, stories, steps=1, micro_examples=micro)
    assert (workload.step_examples, workload.micro_examples) == (8, expected)
    assert workload.rows == dolly(questions, stories, steps=1).rows


def test_micro_batches_that_do_not_fit(stories: Path, questions: Path) -> None:
    with pytest.raises(BenchmarkError, match="8 rows cannot be divided into micro-batches of 3"):
        dolly(questions, stories, steps=1, micro_examples=3)

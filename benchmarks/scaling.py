"""`scaling`: Lorikeet's speed and memory against length, rank, model and rows.

Each cell is a process of its own, with a step that warms up and a few that are timed, and a limit
on its time: a cell that reaches it shows what it has.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from benchmarks.contestants import CONTESTANTS
from benchmarks.process import BenchmarkError, Places, TimeUp, Worker
from benchmarks.protocol import Answer
from benchmarks.rounds import make_job, note
from benchmarks.subject import Subject, make_subject
from benchmarks.tables import scaling_table
from benchmarks.workload import Workload, check_tokens, dense, dolly

LENGTHS = [128, 512, 1024, 2048, 4096]
RANKS = [4, 8, 16, 32, 64, 128]
MODELS = ["models/stories260k", "shapes/smollm-135m", "shapes/tinyllama-1.1b-chat"]
ROWS = [1_000, 10_000, 100_000]
AXES = ["length", "rank", "model", "rows"]

STEP_TOKENS = 4096
"""Of every cell of the length axis: one packed micro-batch of Lorikeet's."""

WARMUP = 1


@dataclass(frozen=True)
class Cell:
    """One point: what is varied, and what is run."""

    axis: str
    value: str
    subject: Subject
    workload: Workload
    r: int = 16
    data: Path | None = None  # a raw file that the worker prepares itself


@dataclass(frozen=True)
class Plan:
    """What the cells are made of.

    Attributes:
        model: folder of the model for every axis but `model`.
        data: rows for the axis `rows`, repeated as often as it takes.
        shared: folder with the models of the axis `model`.
        scratch: for random weights and repeated rows.
        device: cpu or cuda.
        dtype: of weights and computation.
        steps: of each cell, warm-up included.
        seconds: limit of each cell, loading included.
    """

    model: Path
    data: Path
    shared: Path
    scratch: Path
    device: str
    dtype: str
    steps: int
    seconds: float


def measure_scaling(axes: Sequence[str], plan: Plan, places: Places) -> tuple[dict[str, Any], str]:
    """Run the cells of these axes; return everything for JSON, and a table."""
    cells = []
    for cell in _cells(axes, plan):
        cells.append(run_cell(cell, places, dtype=plan.dtype, seconds=plan.seconds))
        note(f"scaling, {cell.axis} {cell.value}: {cells[-1]['steps']} timed steps")
    return {"cells": cells}, scaling_table(cells)


def _cells(axes: Sequence[str], plan: Plan) -> Iterator[Cell]:
    subject = make_subject(plan.model, plan.scratch, dtype=plan.dtype, device=plan.device)
    vocabulary = subject.shape.vocabulary
    if "length" in axes:
        for length in LENGTHS:
            examples = STEP_TOKENS // length
            load = dense(vocabulary, steps=plan.steps, examples=examples, length=length)
            yield Cell("length", str(length), subject, load)
    if "rank" in axes:
        for r in RANKS:
            yield Cell("rank", str(r), subject, dense(vocabulary, steps=plan.steps), r=r)
    if "model" in axes:
        for name in MODELS:
            other = make_subject(
                plan.shared / name, plan.scratch, dtype=plan.dtype, device=plan.device
            )
            load = dense(other.shape.vocabulary, steps=plan.steps)
            yield Cell("model", other.name, other, load)
    if "rows" in axes:
        load = dolly(plan.data, subject.folder, steps=plan.steps)
        for count in ROWS:
            file = plan.scratch / f"rows-{count}.jsonl"
            repeat_rows(plan.data, file, count)
            yield Cell("rows", f"{count:,}", subject, load, data=file)
            file.unlink()


def repeat_rows(data: Path, file: Path, count: int) -> None:
    """Write `count` lines: those of `data`, from the beginning again when they run out."""
    lines = [line + "\n" for line in data.read_text(encoding="utf-8").split("\n") if line]
    with file.open("w", encoding="utf-8") as out:
        out.writelines(islice(cycle(lines), count))


def run_cell(cell: Cell, places: Places, *, dtype: str, seconds: float) -> dict[str, Any]:
    """Run one cell within its time.

    Raises:
        BenchmarkError: the worker ended before its steps were done.
    """
    job = make_job(cell.subject.folder, cell.workload, places, dtype=dtype, r=cell.r)
    settings = {"data": str(cell.data)} if cell.data else {}
    worker = Worker(CONTESTANTS["lorikeet"], replace(job, settings=settings), places)
    answers: list[Answer] = []
    end = time.monotonic() + seconds
    late = False
    with worker:
        try:
            worker.timeout = seconds
            worker.wait_ready()
            for size in cell.workload.sizes:
                worker.timeout = end - time.monotonic()
                answers.append(worker.step())
                check_tokens(f"{cell.axis} {cell.value}", answers[-1], size)
        except TimeUp:
            late = True
    timed = answers[WARMUP:]
    rates = [answer.tokens / answer.seconds for answer in timed]
    return {
        "axis": cell.axis,
        "value": cell.value,
        "model": cell.subject.name,
        "about": cell.workload.about + (f"; stopped after {seconds:.0f} s" if late else ""),
        "tokens_per_second": statistics.median(rates) if rates else None,
        "peak_bytes": answers[-1].peak_bytes if answers else None,
        "prepare_seconds": worker.facts.get("prepare_seconds"),
        "steps": len(timed),
        "answers": [answer.__dict__ for answer in answers],
        "facts": worker.facts,
    }


def check_axes(axes: Sequence[str]) -> None:
    """Refuse an axis that there is not.

    Raises:
        BenchmarkError: with those that there are.
    """
    unknown = [axis for axis in axes if axis not in AXES]
    if unknown:
        raise BenchmarkError(f"unknown axes {', '.join(unknown)}; there are {', '.join(AXES)}")

"""Round robin: everybody does step k before anybody does step k + 1, and the order rotates.

A machine whose speed wanders slows down the contestants of a round alike, so ratios are formed
within rounds; and nobody always comes first.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.contestants import GEMM, Contestant
from benchmarks.process import BenchmarkError, Places, Worker
from benchmarks.protocol import Answer, Job
from benchmarks.roofline import Shape
from benchmarks.workload import Workload, check_tokens


@dataclass(frozen=True)
class Rounds:
    """What came of it.

    Attributes:
        answers: by contestant, one for each round.
        orders: who was when, in each round.
        facts: what each worker said of itself.
    """

    answers: dict[str, list[Answer]]
    orders: list[list[str]]
    facts: dict[str, dict[str, Any]]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def gemm_of(shape: Shape) -> Contestant:
    """The worker that measures the machine, on a model's shapes."""
    return replace(GEMM, settings={"linears": shape.linears, "head": shape.head})


def make_job(model: Path, workload: Workload, places: Places, *, dtype: str, r: int) -> Job:
    """The job of all contestants, but for their settings; writes the rows for the workers."""
    rows = places.folder / f"{workload.name}.jsonl"
    workload.write(rows)
    return Job(
        model=str(model),
        rows=str(rows),
        steps=len(workload.sizes),
        step_examples=workload.step_examples,
        micro_examples=workload.micro_examples,
        device=places.device,
        dtype=dtype,
        r=r,
    )


def play(contestants: Sequence[Contestant], workload: Workload, job: Job, places: Places) -> Rounds:
    """Start everybody, then play a round for each step of the workload.

    Raises:
        BenchmarkError: a worker ended, hung, or saw other tokens than the workload has.
    """
    names = [contestant.name for contestant in contestants]
    orders: list[list[str]] = []
    answers: dict[str, list[Answer]] = {name: [] for name in names}
    with ExitStack() as stack:
        workers = {
            contestant.name: stack.enter_context(
                Worker(contestant, replace(job, settings=contestant.settings), places)
            )
            for contestant in contestants
        }
        for worker in workers.values():
            worker.wait_ready()
        facts = {name: worker.facts for name, worker in workers.items()}
        _check_same("device", facts)
        if places.device == "cpu":  # a GPU's steps hardly depend on them
            _check_same("threads", facts)
        for k, size in enumerate(workload.sizes):
            first = k % len(names)
            orders.append(names[first:] + names[:first])
            for name in orders[-1]:
                answer = workers[name].step()
                check_tokens(name, answer, size)
                answers[name].append(answer)
            times = ", ".join(
                f"{name} {given[-1].seconds:.2f} s" for name, given in answers.items()
            )
            note(f"{workload.name}, round {k + 1} of {job.steps}: {times}")
    return Rounds(answers, orders, facts)


def note(line: str) -> None:
    """Tell, on stderr, how far it is."""
    print(line, file=sys.stderr, flush=True)


def _check_same(fact: str, facts: dict[str, dict[str, Any]]) -> None:
    told = {name: found[fact] for name, found in facts.items()}
    if len(set(told.values())) > 1:
        raise BenchmarkError(f"the contestants do not run with the same {fact}: {told}")

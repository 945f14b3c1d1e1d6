"""`run --memory`: the peak memory of each contestant, alone on the machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from benchmarks.contestants import Contestant
from benchmarks.process import Places, Worker
from benchmarks.rounds import make_job, note
from benchmarks.subject import Subject
from benchmarks.tables import memory_table
from benchmarks.workload import Workload, check_tokens


def measure_memory(
    contestants: Sequence[Contestant],
    subject: Subject,
    workload: Workload,
    places: Places,
    *,
    dtype: str,
    r: int,
) -> tuple[dict[str, Any], str]:
    """Let one after the other do the steps of a workload; return all for JSON, and a table.

    On a CPU the process's peak, loading included: what the machine must have. On a GPU that of the
    steps' tensors, and that of loading beside it.
    """
    job = make_job(subject.folder, workload, places, dtype=dtype, r=r)
    found: dict[str, dict[str, Any]] = {}
    for contestant in contestants:
        with Worker(contestant, replace(job, settings=contestant.settings), places) as worker:
            worker.wait_ready()
            for size in workload.sizes:
                answer = worker.step()
                check_tokens(contestant.name, answer, size)
        found[contestant.name] = {"facts": worker.facts, "last": asdict(answer)}
        note(f"memory, {contestant.name}: {answer.peak_bytes / 2**30:.2f} GiB")
    peaks = {name: line["last"]["peak_bytes"] for name, line in found.items()}
    loaded = {name: line["facts"]["peak_bytes"] for name, line in found.items()}
    report = {"workload": workload.name, "about": workload.about, "contestants": found}
    return report, memory_table(workload, peaks, loaded, device=places.device)

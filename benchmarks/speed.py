"""`run`: tokens a second, ratios of the same round, and shares of the roofline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.contestants import Contestant
from benchmarks.process import Places
from benchmarks.rounds import gemm_of, make_job, play
from benchmarks.subject import Subject
from benchmarks.summary import summarise
from benchmarks.tables import speed_table
from benchmarks.workload import Workload


def measure_speed(
    contestants: Sequence[Contestant],
    subject: Subject,
    workload: Workload,
    places: Places,
    *,
    dtype: str,
    r: int,
    warmup: int,
) -> tuple[dict[str, Any], str]:
    """Play a workload; return everything for JSON, and a table.

    Args:
        contestants: who takes part; the others are compared with the first.
        subject: the model.
        workload: a round for each of its steps.
        places: where workers run.
        dtype: bf16 or fp32, for those that are not left at their own default.
        r: rank of LoRA.
        warmup: rounds that do not count.
    """
    job = make_job(subject.folder, workload, places, dtype=dtype, r=r)
    everybody = [*contestants, gemm_of(subject.shape)]
    rounds = play(everybody, workload, job, places)
    summary = summarise(
        contestants, rounds.answers, workload.sizes, subject.shape, r=r, warmup=warmup
    )
    found = {
        "workload": workload.name,
        "about": workload.about,
        "warmup": warmup,
        "tokens": [size.tokens for size in workload.sizes],
        "supervised": [size.supervised for size in workload.sizes],
        "summary": summary.as_dict(),
        **rounds.as_dict(),
    }
    return found, speed_table(workload, summary, rounds.facts)

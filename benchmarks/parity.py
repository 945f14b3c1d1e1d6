"""`parity`: the same training with other settings: how far apart are the losses?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.contestants import Contestant
from benchmarks.process import Places
from benchmarks.rounds import make_job, play
from benchmarks.subject import Subject
from benchmarks.summary import Deviation
from benchmarks.tables import parity_table
from benchmarks.workload import Workload


def measure_parity(
    contestants: Sequence[Contestant],
    subject: Subject,
    workload: Workload,
    places: Places,
    *,
    dtype: str,
    r: int,
) -> tuple[dict[str, Any], str]:
    """Train everybody from the same weights; return the curves for JSON, and a table.

    The first contestant is the reference. Lorikeet's settings draw the same A; peers draw their own
    and have their own learning rates, so that only their first steps compare.
    """
    job = make_job(subject.folder, workload, places, dtype=dtype, r=r)
    rounds = play(contestants, workload, job, places)
    curves = {
        name: [answer.loss or 0.0 for answer in answers] for name, answers in rounds.answers.items()
    }
    (reference, curve), *others = curves.items()
    found = {name: Deviation.of(other, curve) for name, other in others}
    report = {
        "workload": workload.name,
        "losses": curves,
        "deviations": {name: asdict(deviation) for name, deviation in found.items()},
        "facts": rounds.facts,
    }
    return report, parity_table(curve, reference, found, rounds.facts)

"""All findings of a study."""

from __future__ import annotations

from lorikeet.study.findings.best import best
from lorikeet.study.findings.costs import cheapest
from lorikeet.study.findings.finding import Finding
from lorikeet.study.findings.methods import (
    against_base,
    against_each_other,
    forgetting,
    learning_rates,
)
from lorikeet.study.findings.options import effects
from lorikeet.study.findings.runs import of_convergence, of_failures, of_seeds
from lorikeet.study.record import Study

_OF_RUNS = (of_seeds, of_convergence, of_failures, cheapest)
_OF = {
    "compare": (against_base, against_each_other, forgetting, learning_rates, *_OF_RUNS),
    "sweep": (best, effects, forgetting, *_OF_RUNS),
}


def findings(study: Study) -> list[Finding]:
    """What a study shows, in words; the order of its trials makes no difference.

    Those with `measured` rest on seconds or memory, and belong apart from the others.
    """
    return [finding for found in _OF[study.kind] for finding in found(study)]

"""The groups of a study in an order of their own, and differences between them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np

from lorikeet.evaluate import Score
from lorikeet.study.figures import is_number
from lorikeet.study.record import Group, Study, Trial, shown
from lorikeet.study.statistics import Estimate, difference

_FIRST = ("lora", "full")


def ordered(study: Study) -> list[Group]:
    """Groups with a finite score, in an order that does not depend on that of the trials."""

    def key(group: Group) -> tuple[Any, ...]:
        rank = _FIRST.index(group.method) if group.method in _FIRST else len(_FIRST)
        places = [
            _place(value, study.varied.get(option, ())) for option, value in group.settings.items()
        ]
        return places, rank, group.method, group.label

    return sorted((group for group in study.groups if _finite(group.tests)), key=key)


def nll(group: Group) -> float:
    """Nats per token on the test rows, the mean over seeds."""
    return sum(score.nll for score in group.tests) / len(group.tests)


def gap(scores: Sequence[Score], base: Sequence[Score]) -> Estimate | None:
    """Paired difference; None if there is nothing to pair, or the documents differ."""
    return difference(scores, base) if same_documents([*scores, *base]) and base else None


def same_documents(scores: Sequence[Score]) -> bool:
    """Whether all were scored on the same documents; an option may have changed them."""
    tokens = [score.tokens_per_document for score in scores]
    return bool(tokens) and all(np.array_equal(tokens[0], other) for other in tokens)


def others(group: Group | Trial) -> list[Score]:
    """Scores on the second text, one for each seed."""
    trials = group.trials if isinstance(group, Group) else [group]
    return [trial.other for trial in trials if trial.other is not None]


def pooled(settings: Sequence[Group], seeds: Sequence[int]) -> list[Score]:
    """Scores averaged over settings, document by document: one for each seed.

    Args:
        settings: groups on the same documents.
        seeds: those that each of them has; without any the result is one score, averaged over
            whatever seeds each has.
    """
    if not seeds:
        return [_mean([_mean(group.tests) for group in settings])]
    tests = [{trial.seed: trial.test for trial in group.trials} for group in settings]
    return [_mean([found for test in tests if (found := test[seed])]) for seed in seeds]


def seeds_in_common(groups: Sequence[Group]) -> list[int]:
    """Seeds that all of the groups have."""
    return sorted(set.intersection(*({trial.seed for trial in group.trials} for group in groups)))


def seconds(group: Group) -> float | None:
    """Seconds in steps, the median over seeds; None if nobody measured."""
    found = [trial.cost.seconds for trial in group.trials if trial.cost and trial.cost.seconds]
    return median(found) if found else None


def memory(group: Group) -> float | None:
    """Peak of memory in bytes, the median over seeds; None if the system does not tell."""
    found = [t.cost.peak_memory for t in group.trials if t.cost and t.cost.peak_memory]
    return median(found) if found else None


def seconds_ends(group: Group) -> tuple[float, float] | None:
    """Least and most of the seconds in steps over seeds; None if nobody measured."""
    found = [trial.cost.seconds for trial in group.trials if trial.cost and trial.cost.seconds]
    return (min(found), max(found)) if found else None


def memory_ends(group: Group) -> tuple[float, float] | None:
    """Least and most of the peak of memory over seeds; None if the system does not tell."""
    found = [t.cost.peak_memory for t in group.trials if t.cost and t.cost.peak_memory]
    return (min(found), max(found)) if found else None


def saved(group: Group) -> float | None:
    """Bytes of what is saved, the median over seeds; None if nothing is."""
    return median(trial.saved_bytes for trial in group.trials) or None


def trainable(group: Group) -> float | None:
    """Parameters that are trained; None if nobody counted."""
    return group.trials[0].trainable or None


def _place(value: Any, values: Sequence[Any]) -> tuple[Any, ...]:
    if is_number(value):
        return 0, value, ""
    return 1, list(values).index(value) if value in values else len(values), shown(value)


def _mean(scores: Sequence[Score]) -> Score:
    nats = np.mean([score.nats for score in scores], axis=0)
    return Score(nats, scores[0].tokens_per_document, scores[0].text_bytes)


def _finite(scores: Sequence[Score]) -> bool:
    return bool(scores) and all(math.isfinite(score.nll) for score in scores)

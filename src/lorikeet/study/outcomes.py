"""What came of every group of a study: computed once, for tables, pictures and the page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from lorikeet.evaluate import Score
from lorikeet.study.record import Study, Trial
from lorikeet.study.statistics import Estimate, difference, estimate


@dataclass(frozen=True)
class Spread:
    """A figure that differs from seed to seed: its median, least and greatest value."""

    median: float
    least: float
    greatest: float


@dataclass(frozen=True)
class Outcome:
    """A group of trials, or the base model, and what its test rows say.

    Attributes:
        label: what it is called.
        settings: the options that the study varies, the seed left out; empty for the base.
        trials: its trials, by seed; one for the base.
        test: nats per token on the test rows.
        difference: the same less the base's, paired by document; None without a base on the same
            documents, and for the base.
        other: on the second text; None without one.
        other_difference: the same less the base's.
    """

    label: str
    settings: Mapping[str, Any]
    trials: Sequence[Trial]
    test: Estimate
    difference: Estimate | None
    other: Estimate | None
    other_difference: Estimate | None

    @property
    def method(self) -> str:
        """The method of its trials."""
        return self.trials[0].method

    @property
    def is_base(self) -> bool:
        """Whether it is the model as it was before any training."""
        return self.method == "base"

    @property
    def seeds(self) -> list[int]:
        """Seeds of its trials; none for the base, which has no use for one."""
        return [] if self.is_base else [trial.seed for trial in self.trials]

    @property
    def scores(self) -> list[Score]:
        """Scores on the test rows, one a seed."""
        return [trial.test for trial in self.trials if trial.test is not None]

    @property
    def validation(self) -> float | None:
        """Mean over seeds of the nats per token on the validation rows."""
        found = [trial.validation.nll for trial in self.trials if trial.validation is not None]
        return sum(found) / len(found) if found else None

    @property
    def trainable(self) -> int:
        """Parameters that were trained."""
        return self.trials[0].trainable

    @property
    def trainable_share(self) -> float:
        """The same as a share of the base model's parameters."""
        first = self.trials[0]
        return first.trainable / first.parameters if first.parameters else 0.0

    @property
    def saved_bytes(self) -> int:
        """Median size of what was saved."""
        return int(median(trial.saved_bytes for trial in self.trials))

    @property
    def learning_rates(self) -> list[float]:
        """Its peak learning rates: one, unless they depend on the seed."""
        return sorted({t.learning_rate for t in self.trials if t.learning_rate is not None})

    def spread(self, figure: str) -> Spread | None:
        """A figure of `Trial.summary` over the seeds; None where no trial knows it."""
        found = [trial.summary()[figure] for trial in self.trials if trial.cost is not None]
        found = [value for value in found if value is not None]
        return Spread(median(found), min(found), max(found)) if found else None


def outcomes(study: Study) -> list[Outcome]:
    """The base first, if it was scored, then every group with a score, in the study's order."""
    base = study.base
    found = []
    if base is not None and base.test is not None:
        found.append(_outcome("base", {}, [base], None))
    for group in study.groups:
        if group.tests:
            found.append(_outcome(group.label, group.settings, group.trials, base))
    return found


def by_quality(found: Sequence[Outcome]) -> list[Outcome]:
    """The groups without the base, the lowest loss first; a loss that is no number comes last."""
    trained = [outcome for outcome in found if not outcome.is_base]
    return sorted(trained, key=lambda o: (not math.isfinite(o.test.nll), o.test.nll, o.label))


def names(outcomes: Sequence[Outcome]) -> dict[str, str]:
    """Label to name: the method is left out where all groups share it and more is said."""
    trained = [outcome for outcome in outcomes if not outcome.is_base]
    alone = len({outcome.method for outcome in trained}) == 1
    found = {outcome.label: outcome.label for outcome in outcomes}
    for outcome in trained:
        rest = outcome.label.removeprefix(outcome.method).strip()
        if alone and rest:
            found[outcome.label] = rest
    return found


def against(outcome: Outcome, reference: Outcome) -> Estimate | None:
    """Paired difference of the test losses; None if they are not of the same documents."""
    return _paired(outcome.scores, reference.scores)


def _outcome(
    label: str, settings: Mapping[str, Any], trials: Sequence[Trial], base: Trial | None
) -> Outcome:
    scored = [trial for trial in trials if trial.test is not None]
    tests = [trial.test for trial in scored if trial.test is not None]
    others = [trial.other for trial in scored if trial.other is not None]
    base_other = [base.other] if base and base.other else []
    return Outcome(
        label=label,
        settings=settings,
        trials=scored,
        test=estimate(tests),
        difference=_paired(tests, [base.test] if base and base.test else []),
        other=estimate(others) if others else None,
        other_difference=_paired(others, base_other),
    )


def _paired(scores: Sequence[Score], reference: Sequence[Score]) -> Estimate | None:
    if not scores or not reference:
        return None
    tokens = reference[0].tokens_per_document
    if not all(np.array_equal(score.tokens_per_document, tokens) for score in scores):
        return None  # an option such as data.max_length changed the documents
    return difference(scores, reference)

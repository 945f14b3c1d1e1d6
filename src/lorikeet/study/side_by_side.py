"""Answers side by side: which of a study's answers are shown, and in what order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lorikeet.evaluate import Sample
from lorikeet.study.outcomes import Outcome, by_quality, names
from lorikeet.study.record import Study


@dataclass(frozen=True)
class Answered:
    """A question with the answers of the base and of each group's first seed, the best first.

    Attributes:
        prompt: what was asked.
        reference: the data's own answer.
        answers: name of the group, and its answer.
    """

    prompt: str
    reference: str
    answers: Sequence[tuple[str, str]]


def answered(study: Study, outcomes: Sequence[Outcome]) -> list[Answered]:
    """Every question, with the answers there are."""
    base = [outcome for outcome in outcomes if outcome.is_base]
    called = names(outcomes)
    shown = [(called[o.label], o.trials[0].answers) for o in [*base, *by_quality(outcomes)]]
    return [
        Answered(
            question.prompt,
            question.reference,
            [(label, answers[number]) for label, answers in shown if number < len(answers)],
        )
        for number, question in enumerate(study.questions)
    ]


def all_answers(study: Study) -> list[Sample]:
    """Every question with the answers of every trial, by the trial's name."""
    return [
        Sample(
            question.prompt,
            question.reference,
            {t.name: t.answers[number] for t in study.trials if number < len(t.answers)},
        )
        for number, question in enumerate(study.questions)
    ]

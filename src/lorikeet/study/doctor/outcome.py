"""Symptoms in what came out: no better than the base, learnt by heart, or not to be told."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from lorikeet.evaluate import Z95, student_t95
from lorikeet.study.doctor.facts import Measured, RunFacts
from lorikeet.study.doctor.finding import Finding
from lorikeet.study.doctor.learning import NOTHING

POWER_Z = 0.8416
"""Standard errors by which a difference must lie beyond the 95 % point to be found four times in
five (80 % power)."""

VISIBLE = 0.1
"""Nats per token that a comparison should be able to see, 10 % of perplexity. Useful runs of the
two models here gained from 0.5 to 9."""

FEW = 8
"""Documents below which a standard error is itself too rough to test with."""

GAP_Z = 3.0
"""Standard errors of a gap between rows seen and rows held out that is no accident. Of 48 healthy
runs of one to four epochs the largest reached 2.6."""

GAP = 0.1
"""Nats per token below which a gap does not matter, however sure it is."""

GAP_OF_GAIN = 0.4
"""Share of what was gained on rows seen that does not carry over from which on it is a finding.
Healthy runs of three epochs lose up to a quarter."""

GAP_OF_LOSS = 0.4
"""Share of the loss that is left on rows held out which the gap makes up: where rows held out are
nearly learnt too, the gain is large beside any gap. Healthy runs stay below a sixth."""

LOST = 0.1
"""Share of the best gain on validation rows that was lost again by the end."""

RISEN = 0.05
"""Nats per token by which validation must have risen from its best for that to be a finding."""

SPARSE = 0.1
"""Supervised tokens for each trained parameter. Healthy runs go down to 0.01, so few tokens alone
are no fault; below this they are named as the cause where a gap was found."""

DESERT = 0.002
"""The same, where no rows held out could show a gap: below all healthy runs."""


def outcome_symptoms(facts: RunFacts) -> Iterator[Finding]:
    """All of them."""
    gap = find_gap(facts)
    fitted = list(over_fitting(facts, gap))
    yield from fitted
    yield from few_tokens(facts, gap if fitted else None)
    yield from worse_than_base(facts)
    yield from same_as_base(facts)
    yield from same_answers(facts)


@dataclass(frozen=True)
class Gap:
    """How much more rows seen gained than rows held out.

    Attributes:
        nll: nats per token, above zero if rows held out are worse off.
        stderr: its standard error.
        gain: what rows seen gained, above zero.
        left: loss of rows held out.
        how: what was compared.
    """

    nll: float
    stderr: float
    gain: float
    left: float
    how: str

    @property
    def z(self) -> float:
        """The gap in standard errors."""
        return self.nll / self.stderr if self.stderr else math.inf

    @property
    def matters(self) -> bool:
        """Whether it is sure and large."""
        large = self.nll >= GAP_OF_GAIN * max(self.gain, 0) or self.nll >= GAP_OF_LOSS * self.left
        return self.z >= GAP_Z and self.nll >= GAP and large


def find_gap(facts: RunFacts) -> Gap | None:
    """The gap between rows seen and rows held out; None where it cannot be measured.

    Two ways are right for a random split: the losses after training, or the gains of training,
    which leave out how hard the rows are. The one with the smaller standard error is taken. Older
    folders have no rows seen; there the training loss of the last epoch, whose rows had been seen
    before, stands for them: it is that of weights along the way, so the gap comes out too small.
    """
    held_out = facts.validation
    if held_out is None or held_out.documents < FEW or held_out.tuned_stderr is None:
        return None
    if facts.seen is None:
        return _gap_of_last_epoch(facts, held_out)
    if facts.seen.documents < FEW:
        return None
    return min(_gaps(held_out, facts.seen), key=lambda gap: gap.stderr)


def _gaps(held_out: Measured, seen: Measured) -> list[Gap]:
    assert held_out.tuned_stderr is not None
    assert seen.tuned_stderr is not None
    gain, left = -seen.difference.nll, held_out.tuned
    after = Gap(
        held_out.tuned - seen.tuned,
        math.hypot(held_out.tuned_stderr, seen.tuned_stderr),
        gain,
        left,
        "losses after training",
    )
    first, second = held_out.difference, seen.difference
    if first.stderr is None or second.stderr is None:
        return [after]
    gained = math.hypot(first.stderr, second.stderr)
    return [after, Gap(first.nll - second.nll, gained, gain, left, "gains of training")]


def _gap_of_last_epoch(facts: RunFacts, held_out: Measured) -> Gap | None:
    steps = facts.steps_per_epoch
    if steps is None or facts.steps < 2 * steps or steps < 2 or held_out.tuned_stderr is None:
        return None
    losses, weights = facts.curve.loss[-steps:], facts.curve.supervised[-steps:]
    mean = float(np.average(losses, weights=weights))
    error = float(losses.std(ddof=1)) / math.sqrt(steps)
    return Gap(
        held_out.tuned - mean,
        math.hypot(held_out.tuned_stderr, error),
        held_out.base - mean,
        held_out.tuned,
        "validation loss and training loss of the last epoch",
    )


def over_fitting(facts: RunFacts, gap: Gap | None) -> Iterator[Finding]:
    """Rows learnt by heart: a gap, or a validation loss that went up again."""
    risen = _risen(facts)
    sure = gap is not None and gap.matters
    if not sure and not risen:
        return
    parts: list[str] = []
    evidence: dict[str, Any] = dict(risen)
    if sure:
        assert gap is not None
        low, high = gap.nll - Z95 * gap.stderr, gap.nll + Z95 * gap.stderr
        parts.append(
            f"rows held out are {gap.nll:.3f} nats/token [{low:.3f}, {high:.3f}] behind rows that"
            f" were trained on, which gained {gap.gain:.3f}"
        )
        evidence |= {
            "gap": gap.nll,
            "gap_stderr": gap.stderr,
            "gap_interval95": [low, high],
            "gain_seen": gap.gain,
            "compared": gap.how,
        }
    if risen:
        parts.append(
            f"the validation loss rose from {risen['best_nll']:.3f} (step {risen['best_step']:.0f})"
            f" to {risen['last_nll']:.3f}"
        )
    harmed = risen or (facts.validation is not None and facts.validation.difference.nll > 0)
    yield Finding(
        "over-fitting",
        "problem" if harmed else "hint",
        "; ".join(parts),
        {**evidence, "epochs": facts.epochs},
        "stop earlier (--train.epochs, or --train.eval_every with --train.patience), or give more"
        " rows; a lower rank or --lora.dropout helps less",
    )


def _risen(facts: RunFacts) -> dict[str, float]:
    """Best and last validation, if the loss rose since, at two evaluations or more; else empty.

    The training loss must not have risen with it, which would be a matter of the learning rate.
    """
    if len(facts.evaluations) < 3:
        return {}
    best = min(range(len(facts.evaluations)), key=lambda i: facts.evaluations[i][1])
    step, lowest = facts.evaluations[best]
    last = facts.evaluations[-1][1]
    if facts.config.train.patience and facts.validation and facts.validation.tuned < last:
        return {}  # the weights of the best evaluation were kept
    after = len(facts.evaluations) - 1 - best
    start = facts.validation.base if facts.validation else facts.evaluations[0][1]
    lost = last - lowest
    if after < 2 or lost < max(RISEN, LOST * (start - lowest)):
        return {}
    near, end = facts.curve.loss[max(step - 5, 0) : step], facts.curve.loss[-5:]
    if end.mean() > near.mean():
        return {}
    return {"best_step": step, "best_nll": lowest, "last_nll": last}


def few_tokens(facts: RunFacts, gap: Gap | None) -> Iterator[Finding]:
    """Too little text for so many parameters."""
    tokens, trainable = facts.supervised_tokens, facts.trainable
    if not tokens or not trainable:
        return
    ratio = tokens / trainable
    limit = SPARSE if gap is not None else DESERT if facts.validation is None else 0.0
    if ratio >= limit:
        return
    yield Finding(
        "few-tokens",
        "hint",
        f"{tokens:,} supervised tokens for {trainable:,} trained parameters, {ratio:.2g} for each",
        {"supervised_tokens": tokens, "trainable": trainable, "ratio": ratio},
        "give more rows, or train fewer parameters (--lora.r, --lora.target_modules)",
    )


def worse_than_base(facts: RunFacts) -> Iterator[Finding]:
    """The whole interval of the difference is above zero."""
    measured = facts.validation
    if measured is None or measured.interval is None or measured.interval[0] <= 0:
        return
    yield Finding(
        "worse-than-base",
        "problem",
        f"on the validation rows the tuned model is worse than the base: {measured}",
        measured.summary(),
        "do not use it; a learning rate that is too high and rows learnt by heart are the usual"
        " causes, and the other findings say which",
    )


def same_as_base(facts: RunFacts) -> Iterator[Finding]:
    """A difference whose interval holds zero, and whether the rows could have shown one."""
    measured = facts.validation
    if measured is None:
        return
    evidence, difference = measured.summary(), measured.difference
    stderr, df = difference.stderr, difference.df
    if stderr is None or df is None or measured.interval is None:
        yield Finding(
            "validation-too-small",
            "hint",
            f"a single validation document cannot say how sure the difference {measured} is",
            evidence,
            "hold out more: --data.validation 0.1 of more rows, or a file of its own",
        )
        return
    low, high = measured.interval
    if not low <= 0 <= high or max(-low, high) < NOTHING:  # the latter is known: not learning
        return
    visible = (student_t95(df) + POWER_Z) * stderr
    evidence["smallest_visible"] = visible
    if visible > VISIBLE:
        needed = math.ceil(measured.documents * ((Z95 + POWER_Z) * stderr / VISIBLE) ** 2)
        yield Finding(
            "validation-too-small",
            "hint",
            f"the difference to the base is {measured}; with {measured.documents} documents only"
            f" differences from {visible:.2f} on would show",
            {**evidence, "needed": needed},
            f"hold out about {needed:,} documents to see {VISIBLE} nats/token",
        )
        return
    yield Finding(
        "same-as-base",
        "problem",
        f"on the validation rows the tuned model cannot be told from the base: {measured}, where"
        f" {visible:.2g} would have shown",
        evidence,
        "train longer or with a higher learning rate, and look at samples.jsonl: perhaps the base"
        " could do this already",
    )


def same_answers(facts: RunFacts) -> Iterator[Finding]:
    """Sampled answers that are the base's, to the letter."""
    answers = [list(sample.answers.values()) for sample in facts.samples]
    same = [len(set(texts)) == 1 and len(texts) > 1 for texts in answers]
    if len(same) < 2 or not all(same):
        return
    if facts.validation and facts.validation.difference.nll < -VISIBLE:
        return  # short answers may stay the same while they become much more likely
    yield Finding(
        "same-answers",
        "hint",
        f"all {len(same)} sampled answers are those of the base, to the letter",
        {"samples": len(same)},
        "raise the learning rate or train longer, if the answers were meant to change",
    )

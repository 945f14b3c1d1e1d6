"""Symptoms of how a run learnt: not at all, too fast, too slowly, and what carries over."""

from __future__ import annotations

from collections.abc import Iterator

from lorikeet.study.doctor.curves import (
    Falls,
    falls_of_evaluations,
    falls_of_steps,
    largest_rise,
)
from lorikeet.study.doctor.facts import RunFacts
from lorikeet.study.doctor.finding import Finding, percent, share

NOTHING = 0.02
"""Nats per token, 2 % of perplexity: a change whose whole interval lies within this is none."""

BARELY = 2.0**-9
"""Updates below this share of the weights' norm are below the rounding of bf16, which keeps eight
bits of a number: merged in bf16, they would mostly vanish. Of the hundred runs of two models that
all these thresholds were set by, those with a useful rate moved their weights by 4 % to 100 %,
with a thirtieth of it by 1 %, with a three-hundredth by 0.1 %."""

RISE_Z = 5.0
"""Standard errors of a rise of the loss that is no accident, in a run of some hundred steps. The
largest rise of 48 healthy runs reached 4.8 there, in runs whose learning rate was ten times too
high it was 5.5 to 70."""

RISE_MARGIN = 1.5
"""Standard errors by which a rise must exceed what noise alone brings about in a longer run."""

RISE = 0.05
"""A rise must also be this share of the loss at the start: healthy runs that end near zero rise by
many times their loss, and by a hundredth of where they began."""

RUNAWAY = 30.0
"""Growth of the gradient norm within a run too short for statistics that tells of an explosion;
healthy runs stay below 3."""

STILL = 0.5
"""A loss whose slope over the learning rate spent is, after the middle of the run, at least this
share of what it was before, has not bent: on an exponential approach half the slope means that two
fifths of the way are still to go."""

STILL_Z = 1.645
"""One-sided 95 % point for that share."""

AGAIN = 0.2
"""Part of a second epoch that still counts as one: few rows have been seen twice, so the training
loss is that of rows new to the model."""

SWAMPED = 1.5
"""Updates of this many times the norm of the weights that they change. Healthy runs moved them by
at most once their norm (rank 8 on two matrices alone), runs with rates that were ten times too high
by 1.9 times and more."""


def learning_symptoms(facts: RunFacts) -> Iterator[Finding]:
    """All of them."""
    yield from not_learning(facts)
    yield from idle_modules(facts)
    too_high = list(rate_too_high(facts))
    yield from too_high
    if not too_high:  # a rate that falls from too high lets the loss fall to the end
        yield from rate_too_low(facts)
        yield from still_falling(facts)


def not_learning(facts: RunFacts) -> Iterator[Finding]:
    """An update that is zero, or one that changes nothing on the validation rows."""
    advice = (
        "raise the learning rate tenfold until the loss moves; if it then gets worse, the base"
        " could do before what the rows ask for"
    )
    evidence = {"learning_rate": facts.config.train.peak, "steps": facts.steps}
    if _zero(facts):
        yield Finding(
            "not-learning",
            "problem",
            "the adapter's update is zero in every module: it is the base model as it was",
            {**evidence, "update_norm": 0.0},
            advice,
        )
        return
    if facts.validation is None or facts.validation.interval is None:
        return
    low, high = facts.validation.interval
    if max(abs(low), abs(high)) < NOTHING:
        moved = ""
        if facts.moved is not None:
            moved = f"; the updates are {percent(facts.moved)} of the weights that they change"
        yield Finding(
            "not-learning",
            "problem",
            f"after {facts.steps} steps the validation loss changed by {facts.validation}{moved}",
            {**evidence, **facts.validation.summary(), "moved": facts.moved},
            advice,
        )


def idle_modules(facts: RunFacts) -> Iterator[Finding]:
    """Some modules whose update is zero, while others have one."""
    modules = facts.anatomy.modules if facts.anatomy else ()
    idle = [m.name for m in modules if m.norm == 0]
    if not 0 < len(idle) < len(modules):
        return
    yield Finding(
        "idle-modules",
        "problem",
        f"the update is zero in {share(len(idle), len(modules))} adapted modules,"
        f" {idle[0]} among them",
        {"modules": len(modules), "idle": idle},
        "these modules take no part in what the model computes: leave them out with"
        " --lora.exclude_modules, or look why nothing flows through them",
    )


def _zero(facts: RunFacts) -> bool:
    return (
        facts.anatomy is not None
        and facts.anatomy.total.norm == 0
        and not _more_than_updates(facts)
    )


def _more_than_updates(facts: RunFacts) -> bool:
    """Whether modules or tokens were trained beside the updates, which then need not move."""
    return facts.anatomy is not None and bool(facts.anatomy.whole or facts.anatomy.tokens)


def rate_too_high(facts: RunFacts) -> Iterator[Finding]:
    """A loss that rises over where it was, by far more than its noise."""
    curve = facts.curve
    peak = facts.config.train.peak
    advice = (
        f"lower --train.learning_rate to {peak / 10:.1g} or below"
        " (a longer --train.warmup helps if only the first steps rise)"
    )
    evidence = {"learning_rate": peak, "steps": len(curve), "moved": facts.moved}
    start = facts.validation.base if facts.validation else None
    rise = largest_rise(curve, start=start)
    if rise is None:
        yield from _runaway(facts, advice)
        return
    first = float(curve.loss[0]) if start is None else start
    sure = rise.z >= max(RISE_Z, rise.chance + RISE_MARGIN)
    if sure and rise.high - rise.low >= RISE * first:
        yield Finding(
            "learning-rate-too-high",
            "problem",
            f"around step {rise.step} the training loss rose from {rise.low:.3f} to {rise.high:.3f}"
            f" nats/token, {rise.z:.0f} standard errors",
            {**evidence, "step": rise.step, "low": rise.low, "high": rise.high, "z": rise.z},
            advice,
        )
    elif facts.moved is not None and facts.moved >= SWAMPED:
        yield Finding(
            "learning-rate-too-high",
            "hint",
            f"the updates are {facts.moved:.1f} times as large as the weights that they change",
            evidence,
            advice,
        )


def _runaway(facts: RunFacts, advice: str) -> Iterator[Finding]:
    """A run of a few steps whose last two (of two: the last) show a loss grown by half and an
    exploded gradient.
    """
    curve = facts.curve
    if len(curve) < 2 or not curve.grad_norm[0] > 0:
        return
    growth = float(curve.grad_norm[1:][-2:].min() / curve.grad_norm[0])
    losses = float(curve.loss[1:][-2:].min() / curve.loss[0])
    if growth >= RUNAWAY and losses > 1.5:
        yield Finding(
            "learning-rate-too-high",
            "problem",
            f"within {len(curve)} steps the gradient norm grew {growth:.0f}-fold and the training"
            f" loss from {curve.loss[0]:.3f} to {curve.loss[-1]:.3f} nats/token",
            {
                "learning_rate": facts.config.train.peak,
                "steps": len(curve),
                "gradient_growth": growth,
                "loss_first": float(curve.loss[0]),
                "loss_last": float(curve.loss[-1]),
            },
            advice,
        )


def rate_too_low(facts: RunFacts) -> Iterator[Finding]:
    """Weights that barely moved."""
    if facts.moved is None or not 0 < facts.moved < BARELY or _more_than_updates(facts):
        return
    curve = facts.curve
    yield Finding(
        "learning-rate-too-low",
        "hint",
        f"the updates are {percent(facts.moved)} of the weights that they change, which is below"
        f" the rounding of bf16 ({percent(BARELY)})",
        {
            "moved": facts.moved,
            "learning_rate": facts.config.train.peak,
            "steps": facts.steps,
            "learning_rate_spent": float(curve.learning_rate.sum()),
        },
        f"raise --train.learning_rate tenfold, to {10 * facts.config.train.peak:.1g}, or train"
        " for many more steps",
    )


def still_falling(facts: RunFacts) -> Iterator[Finding]:
    """A loss that fell at the end as it did at the beginning: there was more to learn."""
    falls, source = _falls(facts)
    if falls is None or falls.after < NOTHING or falls.before <= 0:
        return
    excess, error = falls.excess(STILL)
    if excess <= STILL_Z * error:
        return
    before, after = falls.slopes
    yield Finding(
        "still-falling",
        "hint",
        f"the {source} loss was still falling at the end: by {falls.after:.3f} nats/token over the"
        f" last {percent(1 - falls.place)} of the learning rate spent, {falls.before:.3f} over the"
        f" first {percent(falls.place)}",
        {
            "source": source,
            "place": falls.place,
            "fall_before": falls.before,
            "fall_after": falls.after,
            "slope_ratio": after / before,
            "excess": excess,
            "excess_stderr": error,
            "moved": facts.moved,
        },
        "train for more steps; if the loss fell smoothly from the first step on, a learning rate"
        f" of {3 * facts.config.train.peak:.1g} gets there sooner",
    )


def undecided(facts: RunFacts) -> str | None:
    """Why it cannot be said whether the loss was still falling; None if it can."""
    falls, _ = _falls(facts)
    if falls is None:
        return "too few steps, or rows seen more than once without evaluations along the way"
    excess, error = falls.excess(STILL)
    if abs(excess) < STILL_Z * error:
        return "the training loss is too noisy for that; evaluations (--train.eval_every) are not"
    return None


def _falls(facts: RunFacts) -> tuple[Falls | None, str]:
    """How the loss fell, and which: that of validation if there is one along the way."""
    if facts.validation:
        base = facts.validation.base
        falls = falls_of_evaluations(facts.curve, facts.evaluations, base=base)
        if falls is not None:
            return falls, "validation"
    falls = falls_of_steps(facts.curve)
    once = facts.epochs is not None and facts.epochs <= 1 + AGAIN
    return falls if falls is None or once else _without_memory(facts, falls), "training"


def _without_memory(facts: RunFacts, falls: Falls) -> Falls | None:
    """The falls of rows seen more than once, less what validation rows show to be memory.

    None where the part of memory is not known.
    """
    if facts.validation is None or facts.seen is None:
        return None
    held_out, seen = facts.validation.difference, facts.seen.difference
    if held_out.stderr is None or seen.stderr is None:
        return None
    memory = max(held_out.nll - seen.nll, 0.0)
    covariance = falls.covariance.copy()
    covariance[1, 1] += held_out.stderr**2 + seen.stderr**2
    return Falls(falls.place, falls.before, falls.after - memory, covariance)

"""Symptoms in how the run was set up: stopped, too short, nothing held out."""

from __future__ import annotations

from collections.abc import Iterator

from lorikeet.study.doctor.facts import RunFacts
from lorikeet.study.doctor.finding import Finding, percent

PART = 0.25
"""Share of an epoch below which most of the data was not looked at: a choice."""


def course_symptoms(facts: RunFacts) -> Iterator[Finding]:
    """All of them."""
    if not facts.finished:
        yield unfinished(facts)
        return
    yield from part_of_an_epoch(facts)
    yield from nothing_held_out(facts)


def unfinished(facts: RunFacts) -> Finding:
    """No receipt, which is written last."""
    asked = facts.config.train.max_steps
    of = f" of {asked:,}" if asked else ""
    return Finding(
        "unfinished",
        "problem",
        f"the run has no receipt.json, so it did not come to its end: {facts.steps:,}{of} steps",
        {"steps": facts.steps, "max_steps": asked},
        f"if it is not still running, go on with `lorikeet train --resume --out {facts.path}`",
    )


def part_of_an_epoch(facts: RunFacts) -> Iterator[Finding]:
    """Far fewer steps than rows."""
    if facts.epochs is None or facts.epochs >= PART or facts.config.train.patience:
        return
    per_epoch = facts.steps_per_epoch
    rows = facts.steps * facts.config.train.batch_size
    yield Finding(
        "part-of-an-epoch",
        "hint",
        f"{facts.steps:,} steps looked at {rows:,} of {facts.examples:,} examples"
        f" ({percent(facts.epochs)} of an epoch)",
        {"steps": facts.steps, "steps_per_epoch": per_epoch, "epochs": facts.epochs},
        f"an epoch takes {per_epoch:,} steps (--train.epochs 1); if the run is meant to be short,"
        " --data.limit says so",
    )


def nothing_held_out(facts: RunFacts) -> Iterator[Finding]:
    """Without validation rows nobody knows what training did."""
    if facts.validation is not None:
        return
    yield Finding(
        "no-validation",
        "hint",
        "no rows were held out, so nothing shows whether the tuned model is better than the base",
        {"validation": facts.config.data.validation},
        "hold out a share (--data.validation 0.1), or measure with `lorikeet eval --adapter RUN"
        " --data OTHER`",
    )

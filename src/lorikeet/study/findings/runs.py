"""What single runs show: which failed, which did not learn, and what their seeds say."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from lorikeet.evaluate import student_t95
from lorikeet.study.findings.finding import Finding, change, some
from lorikeet.study.findings.groups import gap, ordered
from lorikeet.study.record import Group, Study, Trial
from lorikeet.study.statistics import Estimate
from lorikeet.study.tables import last_line
from lorikeet.study.wording import count, without_places

RISE = 0.01
"""Nats per token above its lowest value at which a validation loss counts as risen: 1 % of
perplexity. The evaluations of a run are of the same rows, but how far they differ by chance is not
known."""

_ERROR = 200  # characters of an error

Falls = Mapping[str, tuple[float, float]]
"""By run: how far its training loss fell, and the half-width of that."""


def of_seeds(study: Study) -> Iterator[Finding]:
    """How far seeds move the figures, or that nobody knows."""
    groups = ordered(study)
    numbers = sorted({len(group.tests) for group in groups})
    if not groups:
        return
    if numbers == [1]:
        yield Finding(
            "seeds",
            "Every group has one seed: how far another seed would move its figures is unknown, and"
            " intervals speak of other documents alone.",
            {"groups": len(groups), "seeds": 1},
        )
        return
    spreads = {g.label: _spread(g) for g in groups if len(g.tests) > 1}
    middle, widest = (
        float(np.median(list(spreads.values()))),
        max(spreads, key=lambda k: spreads[k]),
    )
    text = (
        f"From seed to seed a group's loss differs by a standard deviation of {middle:.4f}"
        " nats/token"
    )
    if len(spreads) > 1:
        text += f" (median; at most {spreads[widest]:.4f}, {widest})"
    fewest = max(numbers[0], 2)
    text += (
        f". With {fewest} seeds an interval can reach {student_t95(fewest - 1):.1f} standard errors"
        " to either side, with many 2.0"
    )
    if len(numbers) > 1:
        text += (
            f". Groups have {numbers[0]} to {numbers[-1]} seeds; where two groups differ in that,"
            " their seeds count as drawn independently"
        )
        if numbers[0] == 1:
            text += ", and a single one as if every other gave the same"
    figures = {"sd": spreads, "median": middle, "seeds": numbers, "t": student_t95(fewest - 1)}
    yield Finding("seeds", f"{text}.", figures)


def of_failures(study: Study) -> Iterator[Finding]:
    """Which runs failed, and why."""
    failed = sorted(study.failed, key=lambda trial: trial.name)
    if not failed:
        return
    reasons = {trial.name: _reason(trial) for trial in failed}
    of = len([trial for trial in study.trials if trial.method != "base"])
    shown = some([f"{name} ({reason})" for name, reason in reasons.items()])
    yield Finding(
        "failures",
        f"{len(failed)} of {count(of, 'run')} failed: {shown}.",
        {"failed": reasons, "runs": of},
    )


def of_convergence(study: Study) -> Iterator[Finding]:
    """Which of the runs that came to their end did not learn, or learnt too long."""
    trials = [t for t in study.trials if t.error is None and t.method != "base"]
    trials.sort(key=lambda trial: trial.name)
    against = {trial.name: _against_base(trial, study.base) for trial in trials}
    infinite = [trial for trial in trials if not _finite(trial)]
    if infinite:
        names = [trial.name for trial in infinite]
        text = f"The loss of {some(names)} is not finite."
        yield Finding("convergence", text, {"not_finite": names})
    finite = [trial for trial in trials if _finite(trial)]
    worse = {
        t.name: e for t in finite if (e := against[t.name]) and e.distinguishable and e.nll > 0
    }
    if worse:
        yield _of(worse, "worse_than_base", "worse than the base model on the test rows")
    yield from _falls(finite, against)
    yield from _rises(finite)


def fall(curve: Sequence[tuple[int, float]]) -> tuple[float, float] | None:
    """How far a training loss fell from its first tenth of the steps to its last.

    Returns:
        The fall, nats per token, and the half-width of its 95 % interval (Welch, every step's
        noise its own); None for fewer than six steps.
    """
    losses = np.array([loss for _, loss in curve])
    n = max(3, len(losses) // 10)
    if len(losses) < 2 * n:
        return None
    parts = losses[:n], losses[-n:]
    variances = [float(part.var(ddof=1)) / n for part in parts]
    total = sum(variances)
    df = total**2 / sum(v**2 / (n - 1) for v in variances) if total else n - 1.0
    reach = student_t95(df) * math.sqrt(total)
    return float(parts[0].mean() - parts[1].mean()), reach


def _falls(trials: Sequence[Trial], against: dict[str, Estimate | None]) -> Iterator[Finding]:
    falls = {trial.name: found for trial in trials if (found := fall(trial.curve))}
    unseen = {name: (by, reach) for name, (by, reach) in falls.items() if by <= reach}
    flat = {name: found for name, found in unseen.items() if not _better(against[name])}
    figures = {
        "runs": len(trials),
        "falls": {name: {"fall": by, "reach": reach} for name, (by, reach) in falls.items()},
        "flat": list(flat),
        "flat_but_better": [name for name in unseen if name not in flat],
    }
    if flat:
        shown = some([f"{name} ({-by:+.3f} +- {reach:.3f})" for name, (by, reach) in flat.items()])
        yield Finding(
            "convergence",
            f"Of {count(len(flat), 'run')} of {len(trials)} the training loss cannot be seen to"
            f" fall, last tenth of the steps against the first: {shown} nats/token.",
            figures,
        )
    elif falls:
        yield Finding("convergence", _learnt(falls, unseen), figures)


def _learnt(falls: Falls, unseen: Falls) -> str:
    seen = [name for name in falls if name not in unseen]
    text = f"{'The one run' if len(falls) == 1 else f'All {len(falls)} runs'} learnt: "
    if seen:
        least = min(seen, key=lambda name: falls[name][0])
        text += (
            f"{'the' if len(seen) == len(falls) else f'of {len(seen)} the'} training loss fell"
            " from the first tenth of the steps to the last by"
            f" {falls[least][0]:.3f} nats/token"
            f"{f' or more ({least} least)' if len(seen) > 1 else ''}"
        )
    if unseen:
        text += ", and " if seen else ""
        text += (
            f"{count(len(unseen), 'run')} whose training loss cannot be seen to fall"
            f" {'is' if len(unseen) == 1 else 'are'} better than the base on the test rows"
        )
    return f"{text}."


def _rises(trials: Sequence[Trial]) -> Iterator[Finding]:
    risen = {}
    for trial in trials:
        if trial.evaluations:
            step, low = min(trial.evaluations, key=lambda at: at[1])
            last = trial.evaluations[-1][1]
            if last > low + RISE:
                risen[trial.name] = {"lowest": low, "step": step, "last": last}
    if risen:
        shown = [
            f"{name} (from {at['lowest']:.4f} at step {at['step']} to {at['last']:.4f})"
            for name, at in risen.items()
        ]
        yield Finding(
            "convergence",
            f"The validation loss of {count(len(risen), 'run')} ended more than {RISE:g} nats/token"
            f" above its lowest: {some(shown)}.",
            {"risen": risen},
        )


def _of(found: dict[str, Estimate], key: str, what: str) -> Finding:
    shown = some([f"{name} ({change(gap)})" for name, gap in found.items()])
    are = "is" if len(found) == 1 else "are"
    figures = {key: {name: gap.summary() for name, gap in found.items()}}
    return Finding("convergence", f"{count(len(found), 'run')} {are} {what}: {shown}.", figures)


def _against_base(trial: Trial, base: Trial | None) -> Estimate | None:
    if trial.test is None or base is None or base.test is None:
        return None
    return gap([trial.test], [base.test])


def _better(against: Estimate | None) -> bool:
    return against is not None and against.distinguishable and against.nll < 0


def _finite(trial: Trial) -> bool:
    """Whether every loss of a run is a number."""
    losses = [loss for _, loss in [*trial.curve, *trial.evaluations]]
    tested = [trial.test.nll] if trial.test is not None else []
    return all(map(math.isfinite, [*losses, *tested]))


def _spread(group: Group) -> float:
    return float(np.std([score.nll for score in group.tests], ddof=1))


def _reason(trial: Trial) -> str:
    text = without_places(last_line(trial))
    return text if len(text) <= _ERROR else f"{text[:_ERROR]}…"

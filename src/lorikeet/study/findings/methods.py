"""What a comparison shows: methods against the base, against each other, and what they forgot."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from lorikeet.study import figures
from lorikeet.study.findings.finding import Finding, change, percent, verdict
from lorikeet.study.findings.groups import gap, ordered, others
from lorikeet.study.record import Candidate, Group, Study
from lorikeet.study.statistics import Estimate, estimate, safe_exp
from lorikeet.study.wording import count

MARGIN = 0.01
"""Share of perplexity by which a method may be worse than another and still counts as not worse:
the interval of the difference has to end below it."""


def against_base(study: Study) -> Iterator[Finding]:
    """Every method against the base, and the share of the parameters that it trains."""
    base = study.base
    for group in ordered(study):
        found = gap(group.tests, [base.test]) if base and base.test else None
        if found is None or base is None or base.test is None:
            continue
        mine = estimate(group.tests)
        share = _share(group)
        yield Finding(
            "against the base",
            f"{group.label}: perplexity {figures.perplexity(mine.perplexity)} against the base"
            f" model's {figures.perplexity(base.test.perplexity)}, {change(found, of='')},"
            f" {verdict(found)}. It trains {_share_text(share)} of the parameters.",
            {
                "method": group.label,
                "perplexity": mine.perplexity,
                "base_perplexity": base.test.perplexity,
                "difference": found.summary(),
                "trainable_share": share,
            },
        )


def against_each_other(study: Study) -> Iterator[Finding]:
    """Every method against full fine-tuning, and the variants of LoRA against LoRA."""
    groups = ordered(study)
    for reference in [
        group for name in ("full", "lora") for group in groups if group.method == name
    ]:
        for group in groups:
            if group.method in (reference.method, "full"):
                continue
            found = gap(group.tests, reference.tests)
            if found is not None:
                yield _pair(group, reference, found)


def forgetting(study: Study) -> Iterator[Finding]:
    """What every method lost on the second text, and whether that is less than full's."""
    base = study.base
    groups = [group for group in ordered(study) if others(group)]
    full = next((group for group in groups if group.method == "full"), None)
    name = study.other_name or "the second text"
    for group in groups:
        found = gap(others(group), others(base)) if base else None
        if found is None:
            continue
        text = f"{group.label}: on {name} {change(found)} against the base, {_forgot(found)}."
        given: dict[str, Any] = {"method": group.label, "against_base": found.summary()}
        less = gap(others(group), others(full)) if full and group is not full else None
        if less is not None:
            text += f" Against full {change(less)}, {verdict(less)}."
            given["against_full"] = less.summary()
        yield Finding("forgetting", text, given)


def learning_rates(study: Study) -> Iterator[Finding]:
    """Which learning rate was picked for each method, and whether its grid ends there."""
    for method in sorted({candidate.method for candidate in study.candidates}):
        tried = sorted(
            (c for c in study.candidates if c.method == method), key=lambda c: c.learning_rate
        )
        picked = next((candidate for candidate in tried if candidate.picked), None)
        if picked is not None:
            yield _picked(method, picked, tried)


def _pair(group: Group, reference: Group, found: Estimate) -> Finding:
    shares = _share(group), _share(reference)
    given: dict[str, Any] = {
        "method": group.label,
        "reference": reference.label,
        "difference": found.summary(),
        "margin": MARGIN,
    }
    text = f"{group.label} against {reference.label}: {change(found)}, {verdict(found)}."
    if found.low is not None and found.high is not None:
        text += f" {_not_worse(found.low, found.high)}"
        given["not_worse"] = found.high <= math.log1p(MARGIN)
    if shares[0] and shares[1] and shares[0] != shares[1]:
        text += (
            f" It trains {_share_text(shares[0] / shares[1])} of {reference.label}'s parameters."
        )
        given["trainable_ratio"] = shares[0] / shares[1]
    return Finding(f"against {reference.label}", text, given)


def _not_worse(low: float, high: float) -> str:
    """Non-inferiority: where the interval lies against the margin."""
    margin = f"{100 * MARGIN:g} % of perplexity"
    if high <= math.log1p(MARGIN):
        return f"It is not worse by more than {margin}: the interval ends at {_end(high)}."
    if low > math.log1p(MARGIN):
        return f"It is worse by more than {margin}: the interval begins at {_end(low)}."
    return f"Whether it is worse by more than {margin} is open: the interval ends at {_end(high)}."


def _end(nats: float) -> str:
    return percent(safe_exp(nats))


def _forgot(found: Estimate) -> str:
    if not found.distinguishable:
        return "not distinguishable from none forgotten"
    return (
        "some was forgotten" if found.nll > 0 else "nothing was forgotten: it is better there too"
    )


def _picked(method: str, picked: Candidate, tried: Sequence[Candidate]) -> Finding:
    rates = [candidate.learning_rate for candidate in tried]
    rate = figures.rate(picked.learning_rate)
    given: dict[str, Any] = {
        "method": method,
        "picked": picked.learning_rate,
        "tried": {figures.rate(c.learning_rate): c.nll for c in tried},
        "at_end": len(tried) > 1 and picked.learning_rate in (rates[0], rates[-1]),
    }
    if len(tried) == 1:
        return Finding("learning rates", f"{method}: {rate}, the only one that was tried.", given)
    text = (
        f"{method}: {rate} was picked out of {count(len(tried), 'learning rate')} from"
        f" {figures.rate(rates[0])} to {figures.rate(rates[-1])}"
    )
    rivals = [c.nll for c in tried if c is not picked and c.nll is not None]
    if rivals and picked.nll is not None:
        text += f"; the next best was {min(rivals) - picked.nll:.4f} nats/token behind"
    if given["at_end"]:
        end = "highest" if picked.learning_rate == rates[-1] else "lowest"
        text += f". It is the {end} of them: a better one may lie beyond"
    failed = [c for c in tried if c.nll is None]
    if failed:
        text += f". {', '.join(figures.rate(c.learning_rate) for c in failed)} failed"
    return Finding("learning rates", f"{text}.", given)


def _share(group: Group) -> float:
    first = group.trials[0]
    return first.trainable / first.parameters if first.parameters else 0.0


def _share_text(share: float) -> str:
    return f"{figures.three_digits(100 * share)} %"

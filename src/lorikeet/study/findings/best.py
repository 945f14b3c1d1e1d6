"""Which group of a study is best, which are not distinguishable from it, and what that is worth."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from lorikeet.evaluate import Score
from lorikeet.study import figures
from lorikeet.study.findings import groups as of
from lorikeet.study.findings.finding import Finding, change, percent, some
from lorikeet.study.record import Group, Study
from lorikeet.study.statistics import Estimate, estimate
from lorikeet.study.wording import count


def best(study: Study) -> Iterator[Finding]:
    """The best group of a sweep, its rivals, the smallest of these, and how it was picked."""
    groups = _comparable(of.ordered(study))
    if len(groups) < 2:
        return
    first = min(groups, key=of.nll)
    others = [group for group in groups if group is not first]
    rivals = {g.label: found for g in others if (found := of.gap(g.tests, first.tests))}
    same = [group for group in others if not rivals[group.label].distinguishable]
    yield _best(first, same, study=study, groups=groups, rivals=rivals)
    yield from _smallest(first, same, rivals)
    yield from _per_megabyte(study, groups)
    yield _selection(study, groups, first)


def _best(
    first: Group,
    same: Sequence[Group],
    *,
    study: Study,
    groups: Sequence[Group],
    rivals: dict[str, Estimate],
) -> Finding:
    mine = estimate(first.tests)
    text = (
        f"Best of {count(len(groups), 'group')}: {first.label}, perplexity"
        f" {figures.perplexity(mine.perplexity)} ({mine.nll:.4f} nats/token)"
    )
    base = study.base
    against = of.gap(first.tests, [base.test]) if base and base.test else None
    if against is not None and base is not None and base.test is not None:
        text += (
            f", {change(against, of='')} against the base model's"
            f" {figures.perplexity(base.test.perplexity)}"
        )
    labels = [group.label for group in same]
    told = len(groups) - 1 - len(same)
    text += f". Not distinguishable from it: {some(labels)}" if labels else ""
    if told:
        text += f". {count(told, 'group')} {'is' if told == 1 else 'are'} distinguishable from it"
    return Finding(
        "best",
        f"{text}.",
        {
            "best": first.label,
            "estimate": mine.summary(),
            "against_base": against and against.summary(),
            "not_distinguishable": labels,
            "against_best": {label: gap.summary() for label, gap in rivals.items()},
        },
    )


def _smallest(
    first: Group, same: Sequence[Group], rivals: dict[str, Estimate]
) -> Iterator[Finding]:
    """The least to save of those that cannot be told from the best."""
    sized = [(size, group) for group in same if (size := of.saved(group))]
    most = of.saved(first)
    if not sized or not most:
        return
    size, group = min(sized, key=lambda pair: pair[0])
    if size >= most:
        return
    yield Finding(
        "smallest",
        f"{group.label} saves {figures.size(size)}, {percent(size / most)} against"
        f" {figures.size(most)} of the best, and is not distinguishable from it:"
        f" {change(rivals[group.label])}.",
        {
            "group": group.label,
            "saved_bytes": size,
            "best_saved_bytes": most,
            "difference": rivals[group.label].summary(),
        },
    )


def _per_megabyte(study: Study, groups: Sequence[Group]) -> Iterator[Finding]:
    found = {
        group.label: gain / (size / 1e6)
        for group in groups
        if (size := of.saved(group)) and (gain := gain_of(group, study)) is not None
    }
    if len(found) > 1 and max(found.values()) > 0:
        label = max(found, key=lambda name: found[name])
        yield Finding(
            "per megabyte",
            f"Most gained over the base for each megabyte saved: {label},"
            f" {figures.three_digits(found[label])} nats/token.",
            {"best": label, "gain_per_megabyte": found},
        )


def _selection(study: Study, groups: Sequence[Group], first: Group) -> Finding:
    """The best was chosen on the rows that it is reported on: by how much that flatters it."""
    text = (
        f"The best of {count(len(groups), 'group')} was picked on the rows that it is reported on,"
        " which flatters it and its lead"
    )
    if len(study.varied.get("train.learning_rate", ())) > 1:
        text += "; its learning rate was picked so"
    given: dict[str, Any] = {"groups": len(groups), "nll": of.nll(first)}
    if len(first.tests[0].nats) > 3:
        halves = [_lowest(groups, half) for half in (0, 1)]
        given["nll_picked_elsewhere"] = honest = _scored_elsewhere(halves)
        given["picked_by_halves"] = [group.label for group in halves]
        ratio = float(np.exp(honest - of.nll(first)))
        if all(group is first for group in halves):
            text += ". Either half of the documents alone picks the same one"
        else:
            text += (
                ". Picked on one half of the documents and measured on the other, both ways, the"
                f" best has a perplexity of {figures.perplexity(float(np.exp(honest)))}"
                f" ({percent(ratio)})"
            )
    return Finding("selection", f"{text}.", given)


def _lowest(groups: Sequence[Group], half: int) -> Group:
    """The best on every other document."""
    return min(groups, key=lambda group: _part(group.tests, half)[0])


def _scored_elsewhere(halves: Sequence[Group]) -> float:
    """Nats per token of the best of each half, on the documents of the other half."""
    parts = [_part(group.tests, 1 - half) for half, group in enumerate(halves)]
    return sum(mean * tokens for mean, tokens in parts) / sum(tokens for _, tokens in parts)


def _part(scores: Sequence[Score], half: int) -> tuple[float, float]:
    """Nats per token of every other document, and how many tokens these have."""
    tokens = float(scores[0].tokens_per_document[half::2].sum())
    return float(np.mean([score.nats[half::2].sum() for score in scores])) / tokens, tokens


def gain_of(group: Group, study: Study) -> float | None:
    """Nats per token that a group is better than the base; None if the two cannot be paired."""
    base = study.base
    found = of.gap(group.tests, [base.test]) if base and base.test else None
    return None if found is None else -found.nll


def _comparable(groups: Sequence[Group]) -> list[Group]:
    """Those on the documents of the most groups."""
    by_documents: dict[bytes, list[Group]] = {}
    for group in groups:
        if of.same_documents(group.tests):
            by_documents.setdefault(group.tests[0].tokens_per_document.tobytes(), []).append(group)
    return max(by_documents.values(), key=len, default=[])

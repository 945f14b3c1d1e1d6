"""What a sweep shows of each option that it varies: steps between neighbouring values."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import Any

from lorikeet.study.figures import is_number
from lorikeet.study.findings import groups as of
from lorikeet.study.findings.finding import Finding, change, percent, verdict
from lorikeet.study.record import SEED, Group, Study, short, shown
from lorikeet.study.statistics import Estimate
from lorikeet.study.wording import count, listed

_COSTS: Mapping[str, Callable[[Group], float | None]] = {
    "trainable parameters": of.trainable,
    "training tokens": lambda group: median(trial.tokens for trial in group.trials) or None,
    "bytes saved": of.saved,
}
"""What a larger value may cost, the same at every time."""

Settings = Mapping[str, Mapping[str, Group]]
"""What the other options are -> value of the option -> group; values as they are shown."""


@dataclass(frozen=True)
class Step:
    """From one value of an option to another, everything else equal.

    Attributes:
        start: the value left, as it is shown.
        end: the value come to.
        gap: the difference, averaged over settings of the other options.
        settings: how many of these there are.
        costs: ratio of each of `_COSTS`, the median over settings.
        single: the difference under each setting.
    """

    start: str
    end: str
    gap: Estimate
    settings: int
    costs: Mapping[str, float] = field(default_factory=dict)
    single: Mapping[str, Estimate] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """The figures as a JSON-ready dict."""
        return {
            "from": self.start,
            "to": self.end,
            "difference": self.gap.summary(),
            "settings": self.settings,
            "cost_ratios": dict(self.costs),
            "by_setting": {name: gap.summary() for name, gap in self.single.items()},
        }


def effects(study: Study) -> Iterator[Finding]:
    """One finding for every option with two values or more."""
    groups = of.ordered(study)
    for option in study.varied:
        values = _values(option, study, groups)
        if option != SEED and len(values) > 1:
            yield _effect(option, values, groups)


def step(start: str, end: str, settings: Settings) -> Step | None:
    """The step between two values, where both were tried on the same documents; None if nowhere.

    Losses are averaged over the settings document by document and seed by seed, so that documents
    and seeds stay paired.
    """
    both = {name: at for name, at in settings.items() if start in at and end in at}
    single = {name: found for name, at in both.items() if (found := _gap([at[end]], [at[start]]))}
    pooled = _on_the_same_documents({name: both[name] for name in single})
    if not pooled:
        return None
    before, after = ([at[value] for at in pooled.values()] for value in (start, end))
    found = _gap(after, before)
    if found is None:
        return None
    return Step(start, end, found, len(pooled), _cost_ratios(before, after), single)


def _effect(option: str, values: Sequence[Any], groups: Sequence[Group]) -> Finding:
    name, names = short(option), [shown(value) for value in values]
    settings = _settings(option, groups)
    steps = [found for a, b in pairwise(names) if (found := step(a, b, settings))]
    if not steps:
        return Finding(
            name,
            f"{name}: no two of its {len(values)} values can be compared with everything else"
            " equal.",
            {"values": names, "steps": []},
        )
    best, rivals = _rivals(names, settings)
    sentences = [f"{name}{_averaged(steps)}: {'; '.join(map(_clause, steps))}."]
    if best is not None:
        sentences.append(_best(option, best, rivals, names=names))
    return Finding(
        name,
        " ".join(sentences),
        {
            "values": names,
            "steps": [one.summary() for one in steps],
            "best": best,
            "from_best": [one.summary() for one in rivals],
        },
    )


def _values(option: str, study: Study, groups: Sequence[Group]) -> list[Any]:
    """Those that came to an end: numbers by size, others in the study's order."""
    there = [group.settings[option] for group in groups if option in group.settings]
    found = [value for value in study.varied[option] if value in there]
    return sorted(found) if all(map(is_number, found)) else found


def _settings(option: str, groups: Sequence[Group]) -> Settings:
    found: dict[str, dict[str, Group]] = {}
    for group in groups:
        if option in group.settings:
            rest = {key: value for key, value in group.settings.items() if key != option}
            where = ", ".join(f"{short(key)}={shown(value)}" for key, value in rest.items())
            found.setdefault(where, {})[shown(group.settings[option])] = group
    return found


def _on_the_same_documents(settings: Settings) -> Settings:
    """Those on the documents of the first; another option may have changed the documents."""
    kept: dict[str, Mapping[str, Group]] = {}
    for name, at in settings.items():
        first = next(iter([*kept.values(), at]))
        scores = [score for one in (first, at) for group in one.values() for score in group.tests]
        if of.same_documents(scores):
            kept[name] = at
    return kept


def _gap(after: Sequence[Group], before: Sequence[Group]) -> Estimate | None:
    """Difference of two lists of groups, averaged."""
    if len(after) == 1:
        return of.gap(after[0].tests, before[0].tests)
    seeds = of.seeds_in_common([*after, *before])
    return of.gap(of.pooled(after, seeds), of.pooled(before, seeds))


def _cost_ratios(before: Sequence[Group], after: Sequence[Group]) -> dict[str, float]:
    found = {}
    for name, cost in _COSTS.items():
        pairs = [(cost(a), cost(b)) for a, b in zip(before, after, strict=True)]
        ratios = [b / a for a, b in pairs if a and b]
        if ratios:
            found[name] = median(ratios)
    return found


def _rivals(names: Sequence[str], settings: Settings) -> tuple[str | None, list[Step]]:
    """The best value over the settings that have all, and the steps from it to the others."""
    whole = _on_the_same_documents(
        {name: at for name, at in settings.items() if all(value in at for value in names)}
    )
    if not whole:
        return None, []
    level = {value: sum(of.nll(at[value]) for at in whole.values()) for value in names}
    best = min(names, key=lambda value: level[value])
    others = [step(best, value, whole) for value in names if value != best]
    return best, [one for one in others if one]


def _averaged(steps: Sequence[Step]) -> str:
    counts = {one.settings for one in steps}
    if counts == {1}:
        return ""
    if len(counts) == 1:
        return f", averaged over {count(counts.pop(), 'setting')} of the other options"
    return f", averaged over {min(counts)} to {max(counts)} settings of the other options"


def _clause(one: Step) -> str:
    text = f"{one.start} to {one.end} {change(one.gap)}, {verdict(one.gap)}"
    more = _costs_text(one)
    return f"{text}, at {more}" if more else text


def _costs_text(one: Step) -> str:
    """What a step costs, or spares; what is saved goes with what is trained."""
    more = [
        f"{percent(ratio)} {what}"
        for what, ratio in one.costs.items()
        if what != "bytes saved" and not _the_same(ratio)
    ]
    return " and ".join(more)


def _best(option: str, best: str, rivals: Sequence[Step], *, names: Sequence[str]) -> str:
    text = f"Best is {best}"
    same = [one for one in rivals if not one.gap.distinguishable]
    if same:
        text += f"; not distinguishable from it: {listed([one.end for one in same])}"
        spare = _cheapest(same)
        if spare is not None:
            text += f". {spare.end}, at {_costs_text(spare)}, has {change(spare.gap)} against it"
    elif rivals:
        text += ", distinguishable from every other value"
    if option == "train.learning_rate" and best in (names[0], names[-1]):
        end = "highest" if best == names[-1] else "lowest"
        text += f". It is the {end} that was tried: a better one may lie beyond"
    return f"{text}."


def _cheapest(rivals: Sequence[Step]) -> Step | None:
    """The rival that spares most, of those that cost more in nothing; None if none spares."""
    cheap = [
        one
        for one in rivals
        if _costs_text(one) and all(ratio < 1 or _the_same(ratio) for ratio in one.costs.values())
    ]
    return min(cheap, key=lambda one: math.prod(one.costs.values()), default=None)


def _the_same(ratio: float) -> bool:
    return abs(ratio - 1) < 0.005

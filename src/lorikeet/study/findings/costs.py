"""What is cheapest: in parameters and bytes, which are always the same, in seconds and memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from lorikeet.study import figures
from lorikeet.study.findings import groups as of
from lorikeet.study.findings.best import gain_of
from lorikeet.study.findings.finding import Finding
from lorikeet.study.record import Group, Study
from lorikeet.study.wording import listed

_ALL = 8  # groups, or fewer, that are each named


@dataclass(frozen=True)
class _Cost:
    topic: str
    least: str
    of: Callable[[Group], float | None]
    shown: Callable[[float], str]
    ends: Callable[[Group], tuple[float, float] | None] | None = None

    @property
    def measured(self) -> bool:
        """Whether it differs from one time to the next: then seeds have least and most of it."""
        return self.ends is not None


_COSTS = (
    _Cost("parameters", "Fewest trained parameters", of.trainable, "{:,.0f}".format),
    _Cost("size", "Least to save", of.saved, figures.size),
    _Cost("seconds", "Fewest seconds in steps", of.seconds, figures.three_digits, of.seconds_ends),
    _Cost("memory", "Lowest peak of memory", of.memory, figures.size, of.memory_ends),
)


def cheapest(study: Study) -> Iterator[Finding]:
    """The group with the least of each cost, and how many times as much the others take.

    Of a sweep that of the clock and of memory: what a rank trains and saves is no finding.
    """
    groups = of.ordered(study)
    for cost in _COSTS:
        if study.kind == "sweep" and not cost.measured:
            continue
        found = {group.label: value for group in groups if (value := cost.of(group))}
        if len(found) > 1 and min(found.values()) < max(found.values()):
            yield _finding(cost, found, _level(cost, found, groups))
    yield from _per_second(study, groups)


def _level(cost: _Cost, found: dict[str, float], groups: Sequence[Group]) -> set[str]:
    """Groups that cannot be told from the least: some of its seeds took as much as some of theirs,
    or both are the same in the digits that are shown.
    """
    if cost.ends is None:
        return set()
    ends = {g.label: reach for g in groups if g.label in found and (reach := cost.ends(g))}
    first = min(found, key=lambda name: (found[name], name))
    return {
        name
        for name, (low, _) in ends.items()
        if found[name] > found[first]
        and (low <= ends[first][1] or figures.three_digits(found[name] / found[first]) == "1.00")
    }


def _finding(cost: _Cost, found: dict[str, float], level: set[str]) -> Finding:
    names = sorted(found, key=lambda name: (found[name], name))
    least = found[names[0]]
    as_little = [name for name in names if found[name] == least]
    more = [name for name in names if found[name] > least and name not in level]
    parts = [f"{cost.least}: {_few(as_little)}, {cost.shown(least)}"]
    if level:
        parts.append(f"not told from that: {_few([name for name in names if name in level])}")
    ratios = [
        f"{name} takes {figures.three_digits(found[name] / least)} times as much"
        for name in (more if len(names) <= _ALL else more[-1:])
    ]
    parts += [listed(ratios)] if ratios else []
    return Finding(
        cost.topic,
        f"{'; '.join(parts)}.",
        {
            "least": names[0],
            "by_group": found,
            "ratios": {n: v / least for n, v in found.items()},
            "not_told_from_least": sorted(level),
        },
        cost.measured,
    )


def _per_second(study: Study, groups: Sequence[Group]) -> Iterator[Finding]:
    found = {
        group.label: gain / taken
        for group in groups
        if (taken := of.seconds(group)) and (gain := gain_of(group, study)) is not None
    }
    if len(found) > 1 and max(found.values()) > 0:
        label = max(found, key=lambda name: found[name])
        yield Finding(
            "per second",
            f"Most gained over the base for each second in steps: {label},"
            f" {figures.three_digits(found[label])} nats/token.",
            {"best": label, "gain_per_second": found},
            measured=True,
        )


def _few(names: Sequence[str]) -> str:
    return listed(names) if len(names) <= _ALL // 2 else f"{len(names)} groups, {names[0]} first"

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
    measured: bool


_COSTS = (
    _Cost("parameters", "Fewest trained parameters", of.trainable, "{:,.0f}".format, False),
    _Cost("size", "Least to save", of.saved, figures.size, False),
    _Cost("seconds", "Fewest seconds in steps", of.seconds, figures.three_digits, True),
    _Cost("memory", "Lowest peak of memory", of.memory, figures.size, True),
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
            yield _finding(cost, found)
    yield from _per_second(study, groups)


def _finding(cost: _Cost, found: dict[str, float]) -> Finding:
    names = sorted(found, key=lambda name: (found[name], name))
    least = found[names[0]]
    as_little = [name for name in names if found[name] == least]
    more = names[len(as_little) :] if len(names) <= _ALL else names[-1:]
    ratios = [
        f"{name} takes {figures.three_digits(found[name] / least)} times as much" for name in more
    ]
    return Finding(
        cost.topic,
        f"{cost.least}: {_few(as_little)}, {cost.shown(least)}; {listed(ratios)}.",
        {"least": names[0], "by_group": found, "ratios": {n: v / least for n, v in found.items()}},
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

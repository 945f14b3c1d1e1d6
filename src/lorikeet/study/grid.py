"""What a sweep varies, and the trials that it stands for."""

from __future__ import annotations

import hashlib
import itertools
import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorikeet.config import RunConfig, load_config
from lorikeet.errors import ConfigError
from lorikeet.study.protocol import Planned
from lorikeet.study.record import SEED, short, shown

_LONGEST = 80  # characters of a file's name


@dataclass(frozen=True)
class Range:
    """Values to draw from: integers if both ends are, evenly in the logarithm if asked."""

    low: float
    high: float
    log: bool

    def draw(self, generator: random.Random) -> float | int:
        """One value; both ends can be drawn."""
        if self.log:
            value = math.exp(generator.uniform(math.log(self.low), math.log(self.high)))
        else:
            value = generator.uniform(self.low, self.high)
        value = min(max(value, self.low), self.high)
        if isinstance(self.low, int) and isinstance(self.high, int):
            return round(value)
        return float(f"{value:.3g}")  # a figure that can be read, and typed again


@dataclass(frozen=True)
class Choice:
    """A value of a varied option, and values of the options that follow it."""

    value: Any
    followers: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Sweep:
    """What a sweep's file says.

    Attributes:
        config: the options in common; `data.limit` is the largest that is asked for.
        varied: dotted option to its values in order, or a range that they are drawn from; the
            seed is always among them and comes last.
        draws: how many random draws; None for the whole grid.
        draw_seed: seeds the draws.
    """

    config: RunConfig
    varied: Mapping[str, Sequence[Choice] | Range]
    draws: int | None = None
    draw_seed: int = 0

    def trials(self) -> list[Planned]:
        """Every trial, each combination once, in the order of the file.

        Raises:
            ConfigError: combinations that are no run, each with what is wrong with it, and those
                that differ although they are called the same.
        """
        planned: dict[str, Planned] = {}
        problems: dict[str, None] = {}
        for combination in self._combinations():
            try:
                trial = _planned(self.config, combination)
            except ConfigError as error:
                problems |= dict.fromkeys(error.problems)
            else:
                first = planned.setdefault(trial.name, trial)
                problems |= dict.fromkeys(_apart(first, trial))
        if problems:
            raise ConfigError("combinations of this sweep are no runs:", list(problems))
        return list(planned.values())

    def values(self) -> dict[str, list[Any]]:
        """The values of every varied option that trials have, in order."""
        found: dict[str, list[Any]] = {option: [] for option in self.varied}
        for trial in self.trials():
            for option, value in trial.settings.items():
                if value not in found[option]:
                    found[option].append(value)
        drawn = [name for name, values in self.varied.items() if isinstance(values, Range)]
        return found | {name: sorted(found[name]) for name in drawn}

    def _combinations(self) -> Iterator[dict[str, Choice]]:
        if self.draws is None:
            axes = [values for values in self.varied.values() if not isinstance(values, Range)]
            for values in itertools.product(*axes):
                yield dict(zip(self.varied, values, strict=True))
            return
        generator = random.Random(self.draw_seed)
        seeds = self.varied[SEED]
        assert not isinstance(seeds, Range)
        for _ in range(self.draws):
            drawn = {
                option: Choice(source.draw(generator))
                if isinstance(source, Range)
                else generator.choice(list(source))
                for option, source in self.varied.items()
                if option != SEED
            }
            for seed in seeds:
                yield {**drawn, SEED: seed}


def _apart(first: Planned, second: Planned) -> Iterator[str]:
    """What two trials of one name differ in: only one of them would be done."""
    ours, theirs = _flat(first.config), _flat(second.config)
    for option in ours:
        if ours[option] != theirs[option]:
            yield (
                f"{first.name} stands for {option} {ours[option]} and {theirs[option]}: an option"
                " that follows another needs one value for each of its values (else let it vary by"
                " itself), and numbers must differ in their first six digits"
            )


def _flat(config: RunConfig) -> dict[str, Any]:
    """Dotted option to value, without `out`."""
    return {
        f"{section}.{key}": value
        for section, values in config.model_dump().items()
        if isinstance(values, dict)
        for key, value in values.items()
    }


def changed(config: RunConfig, settings: Mapping[str, Any]) -> RunConfig:
    """The same run with other values of these dotted options.

    Raises:
        ConfigError: the values do not hold.
    """
    return load_config(overrides={**_flat(config), "out": config.out, **settings})


def file_name(text: str) -> str:
    """The text as a name of a file: what is not plain becomes `-`, long ones end in a hash."""
    name = re.sub(r"[^\w.,=+-]+", "-", text).strip("-.") or "trial"
    if len(name) <= _LONGEST:
        return name
    return f"{name[:_LONGEST]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _planned(config: RunConfig, combination: Mapping[str, Choice]) -> Planned:
    settings: dict[str, Any] = {}
    for option, choice in combination.items():
        settings |= {option: choice.value, **choice.followers}
    run = changed(config, settings)
    dumped = run.model_dump()
    values = {}
    for option in combination:
        section, _, key = option.partition(".")
        values[option] = dumped[section][key]  # as it was understood: 8 for "8"
    name = ",".join(f"{short(option)}={shown(value)}" for option, value in values.items())
    return Planned(file_name(name), run.train.method, run, values)

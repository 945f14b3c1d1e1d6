"""A sweep's file -> the trials that it stands for.

    model: {path: HuggingFaceTB/SmolLM2-135M-Instruct}
    data: {path: rows.jsonl}
    train: {epochs: 3}
    sweep:
      lora.r: [8, 16, 32]
      data.limit: [1500, 3000]
      seed: [0, 1, 2]

Where an option follows another, both are named and their values given in pairs, and the first is
what varies: `lora.r, lora.alpha: [[8, 16], [16, 32]]`.

Sections are those of a run file. What varies stands under `sweep`, by dotted option, as a list of
values; a dotted option with a list may also stand at the top, and so may a list in the place of a
single value in a section. With `draws: N` the sweep is N random draws in place of the grid, and an
option may give a range, `{min: 1e-5, max: 1e-3, log: true}`, in place of a list. Every draw is done
with every seed.
"""

from __future__ import annotations

import math
import types
import typing
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorikeet.config import (
    ALIASES,
    SHORT_FOR,
    RunConfig,
    load_config,
    options,
    read_yaml,
    suggest,
)
from lorikeet.errors import ConfigError
from lorikeet.study.grid import Choice, Range, Sweep, changed
from lorikeet.study.record import SEED

_SHARED = {
    "out": "every trial has its own folder in --out",
    "model.path": "losses per token of two tokenizers cannot be compared; make a sweep for each",
    "model.revision": "it names another model; make a sweep for each",
    "model.threads": "trials are compared with each other; give it once, for all",
    "model.device": "trials are compared with each other; give it once, for all",
    "model.trust_remote_code": "give it once, for all",
    "data.path": "all trials are measured on the same rows; data.limit varies their number",
    "data.split": "all trials are measured on the same rows",
    "data.template": "all trials are measured on the same text",
    "data.validation": "all trials are measured on the same rows",
    "lora.new_tokens": "all trials are measured on the same tokens",
}
"""Options that no sweep varies, and why."""


def read_sweep(file: str | Path, overrides: Mapping[str, Any] | None = None) -> Sweep:
    """Read a sweep's file and lay flags over the options in common.

    Args:
        file: YAML, see above.
        overrides: dotted option to value, as from flags; one that the sweep varies is an error.

    Raises:
        ConfigError: the file cannot be read, or does not say a sweep; every problem is listed.
    """
    tree = read_yaml(Path(file))
    problems: list[str] = []
    given = _take_varied(tree, problems)
    draws = _take_number(tree, "draws", problems, least=1)
    draw_seed = _take_number(tree, "draw_seed", problems, least=0)
    varied = {option: _source(option, found, problems) for option, found in given.items()}
    for option, times in _named(varied).items():
        if times > 1:
            problems.append(f"{option} is varied twice")
        if option in _SHARED:
            problems.append(f"{option} cannot vary: {_SHARED[option]}")
        if option in (overrides or {}):
            problems.append(f"{option} is given as a flag and varied by the file: choose one")
        if draws is None and isinstance(varied.get(option), Range):
            problems.append(f"{option} is a range, and a grid needs values; add draws: N")
    if not varied:
        problems.append("nothing varies: give options with lists of values under sweep:")
    try:
        config = load_config(overrides={**_flat_tree(tree), **(overrides or {})})
    except ConfigError as error:
        problems += error.problems
        config = RunConfig()
    if problems:
        raise ConfigError(f"the sweep in {file} does not hold:", problems)
    seeds = varied.pop(SEED, [Choice(config.train.seed)])
    if isinstance(seeds, Range):
        raise ConfigError(f"the sweep in {file} does not hold:", ["seed needs a list of values"])
    return Sweep(
        config=_roomy(config, varied.get("data.limit")),
        varied={**varied, SEED: seeds},
        draws=draws,
        draw_seed=draw_seed or 0,
    )


def _named(varied: Mapping[str, Sequence[Choice] | Range]) -> Counter[str]:
    """Every option that trials differ in, those that follow others too, and how often it stands."""
    found = Counter(list(varied))
    for source in varied.values():
        choices = [] if isinstance(source, Range) else source
        found.update({name for choice in choices for name in choice.followers})
    return found


def _roomy(config: RunConfig, limits: Sequence[Choice] | Range | None) -> RunConfig:
    """The options in common, with as many rows as the largest trial needs."""
    if limits is None:
        return config
    if isinstance(limits, Range):
        return changed(config, {"data.limit": int(limits.high)})
    sizes = [changed(config, {"data.limit": limit.value}).data.limit for limit in limits]
    most = None if None in sizes else max(size for size in sizes if size)
    return changed(config, {"data.limit": most})


def _take_varied(tree: dict[Any, Any], problems: list[str]) -> dict[str, Any]:
    """What varies, by the option's own name; it is taken out of the tree."""
    found: dict[str, Any] = {}
    section = tree.pop("sweep", {}) or {}
    if not isinstance(section, dict):
        problems.append(f"sweep must hold options with their values, found {section!r}")
        section = {}
    for key, value in section.items():
        _add(found, str(key), value, problems)
    for key in [key for key in tree if "." in str(key) or key in _SHORT]:
        if isinstance(tree[key], list):
            _add(found, str(key), tree.pop(key), problems)
    for name, values in tree.items():
        for key in list(values) if isinstance(values, dict) else []:
            option = _own_name(f"{name}.{key}")
            if isinstance(values[key], list) and option in _SINGLE:
                _add(found, option, values.pop(key), problems)
    return found


def _add(found: dict[str, Any], key: str, value: Any, problems: list[str]) -> None:
    names = [_own_name(name.strip()) for name in key.split(",")]
    unknown = [name for name in names if name not in _KNOWN]
    problems += [f"unknown option {name}{suggest(name, set(_KNOWN))}" for name in unknown]
    if names[0] in found:
        problems.append(f"{names[0]} is varied twice")
    elif not unknown:
        found[names[0]] = value if len(names) == 1 else _tied(names, value, problems)


def _tied(names: list[str], value: Any, problems: list[str]) -> list[Choice]:
    """The choices of an option that others follow."""
    n = len(names)
    rows = value if isinstance(value, list) else [value]
    if not all(isinstance(row, list) and len(row) == n for row in rows):
        problems.append(f"{', '.join(names)}: expected a list of {n} for each, found {value!r}")
        return [Choice(None)]
    return [Choice(row[0], dict(zip(names[1:], row[1:], strict=True))) for row in rows]


def _source(option: str, value: Any, problems: list[str]) -> list[Choice] | Range:
    """The values of an option, or the range that they are drawn from."""
    if isinstance(value, dict):
        return _range(option, value, problems)
    values = value if isinstance(value, list) else [value]
    if not values:
        problems.append(f"{option} has no values")
    return [one if isinstance(one, Choice) else Choice(one) for one in values]


def _range(option: str, value: dict[str, Any], problems: list[str]) -> Range:
    low, high = _number(value.get("min")), _number(value.get("max"))
    log = value.get("log", False)
    least = 0 if log else -math.inf
    fits = isinstance(log, bool) and set(value) <= {"min", "max", "log"}
    if not fits or low is None or high is None or not least < low < high:
        problems.append(
            f"{option}: a range is {{min: 1e-5, max: 1e-3, log: true}}, min below max (above 0 with"
            f" log); found {value!r}"
        )
        return Range(1, 2, log=False)
    return Range(low, high, log)


def _number(value: object) -> int | float | None:
    """A number; YAML reads 1e-5, without a point, as text."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return None
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _take_number(tree: dict[str, Any], key: str, problems: list[str], *, least: int) -> int | None:
    value = tree.pop(key, None)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        problems.append(f"{key} must be a whole number from {least} on, found {value!r}")
        return None
    return value


def _own_name(key: str) -> str:
    """An option's own name for a short one, or another tool's."""
    return _SHORT.get(key) or ALIASES.get(key, key)


def _flat_tree(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Sections as dotted options."""
    flat: dict[str, Any] = {}
    for section, values in tree.items():
        if isinstance(values, dict):
            flat |= {f"{section}.{key}": value for key, value in values.items()}
        elif "." in section or section in _SHORT:
            flat[_own_name(section)] = values
        elif values is not None:
            flat[section] = values
    return flat


def _takes_list(annotation: Any) -> bool:
    """Whether an option of this type may itself be a list."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType, typing.Annotated):
        return any(_takes_list(part) for part in typing.get_args(annotation))
    return origin is list or annotation is list


_SHORT = {alias: own for own, alias in SHORT_FOR.items()}
_KNOWN = {name for name, _ in options()}
_SINGLE = {name for name, option in options() if not _takes_list(option.annotation)}

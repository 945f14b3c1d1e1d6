"""A comparison: base, LoRA, full fine-tuning and variants under one protocol.

Every method trains on the same rows in the same order for the same number of steps, once for each
seed, each at a learning rate of its own. That is picked with the first seed on one half of the
held-out rows; results come from the other half.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from lorikeet import console
from lorikeet.config import RunConfig
from lorikeet.errors import ConfigError, TrainingError
from lorikeet.study.crew import Crew, Hire, do_trials, gather
from lorikeet.study.grid import changed, file_name
from lorikeet.study.prose import named
from lorikeet.study.protocol import Planned, Protocol, StudyFolder
from lorikeet.study.receipt import surroundings
from lorikeet.study.record import SEED, Candidate, Study, Trial
from lorikeet.study.wording import sentence

METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "full": {"train.method": "full"},
    "rslora": {"lora.rslora": True},
    "dora": {"lora.dora": True},
    "pissa": {"lora.init": "pissa"},
    "lora+": {"train.loraplus_lr_ratio": 16.0},
    "int8": {"train.int8": True},
}
"""What a method's name stands for, beside the options in common."""

GRIDS = {"lora": (1e-4, 3e-4, 1e-3), "full": (1e-5, 3e-5, 1e-4)}
"""Learning rates that are tried; those of `lora` for every method but full fine-tuning."""

EXTENSIONS = 4
"""Most learning rates that are added beyond an end of a grid, while the best one lies there."""


@dataclass(frozen=True)
class Comparison:
    """What is to be compared.

    Attributes:
        config: the options in common; `train.seed` is the first seed.
        methods: names out of `METHODS`; the base is always measured.
        seeds: how many seeds.
        grids: learning rates of methods that do not take those of `GRIDS`.
        other: data file of a second text; None for none.
        keep_models: keep the weights of full fine-tuning, not only their size.
    """

    config: RunConfig
    methods: Sequence[str] = ("lora", "full")
    seeds: int = 3
    grids: Mapping[str, Sequence[float]] | None = None
    other: str | None = None
    keep_models: bool = False

    def __post_init__(self) -> None:
        """Check everything that can be checked before anything is loaded."""
        problems = [
            f"unknown method {name}; there are base, {', '.join(METHODS)}"
            for name in [*self.methods, *(self.grids or {})]
            if name not in METHODS
        ]
        if not self.methods:
            problems.append(f"no method is to be trained; there are {', '.join(METHODS)}")
        if self.config.train.method != "lora":
            problems.append("train.method says one method; --methods says which are compared")
        if self.config.train.learning_rate is not None:
            problems.append(
                "train.learning_rate is one for all, and each method needs its own; give --grid"
                " lora=1e-4,3e-4 --grid full=1e-5,3e-5, or a single value each"
            )
        if self.config.train.patience is not None:
            problems.append("train.patience would give each method another number of steps")
        if self.seeds < 1:
            problems.append(f"--seeds must be at least 1, found {self.seeds}")
        problems += [
            f"the grid of {name} must hold learning rates above 0, found {list(grid)}"
            for name, grid in (self.grids or {}).items()
            if not grid or not all(0 < rate < math.inf for rate in grid)
        ]
        problems += [
            f"a grid is given for {name}, which is not compared; add it to --methods"
            for name in self.grids or {}
            if name in METHODS and name not in self.methods
        ]
        problems += self._alike()
        if problems:
            raise ConfigError("this comparison does not hold:", problems)

    def _alike(self) -> list[str]:
        """Methods that are no runs with these options, and those that are one and the same."""
        found: dict[str, str] = {}
        problems: dict[str, None] = {}
        for method in self.methods:
            try:
                run = changed(self.config, METHODS.get(method, {})).model_dump_json()
            except ConfigError as error:
                problems |= dict.fromkeys(f"{method}: {problem}" for problem in error.problems)
                continue
            first = found.setdefault(run, method)
            if method in METHODS and first != method:
                problems[
                    f"with these options {first} and {method} are the same; leave out"
                    f" {' and '.join(METHODS[first] | METHODS[method])}, which --methods sets"
                ] = None
        return list(problems)

    @property
    def numbers(self) -> list[int]:
        """The seeds."""
        return [self.config.train.seed + i for i in range(self.seeds)]

    def grid(self, method: str) -> list[float]:
        """The learning rates to begin with, lowest first."""
        default = GRIDS["full" if method == "full" else "lora"]
        return sorted(set((self.grids or {}).get(method, default)))

    def planned(self, method: str, rate: float, seed: int) -> Planned:
        """One run of a method."""
        options = {**METHODS[method], "train.learning_rate": rate, SEED: seed}
        name = file_name(f"{method},lr={rate:g},seed={seed}")
        return Planned(name, method, changed(self.config, options), {SEED: seed})

    def describe(self) -> str:
        """The comparison as YAML: equal for the same one."""
        return yaml.safe_dump(
            {
                "study": "compare",
                "options": self.config.model_dump(exclude={"out"}),
                "methods": list(self.methods),
                "seeds": self.numbers,
                "grids": {method: self.grid(method) for method in self.methods},
                "other": named(self.other),
            },
            sort_keys=False,
            allow_unicode=True,
        )


def run_compare(comparison: Comparison, out: str | Path, *, hire: Hire = gather) -> Study:
    """Do a comparison, or what is left of it.

    Args:
        comparison: what is to be compared.
        out: the study's folder; one that holds the same comparison is gone on with.
        hire: finds who does the trials: `gather`, or `on_ray`.

    Raises:
        InputError: options, model or data do not hold, or no method came to its end.
    """
    comparison.config.require("model.path", "data.path")
    folder = StudyFolder(out)
    protocol = Protocol(
        "compare",
        comparison.config,
        other=comparison.other,
        keep_models=comparison.keep_models,
    )
    with folder.working(comparison.describe()), hire(protocol, folder) as crew:
        searches = _search(comparison, crew, folder)
        picked = [
            comparison.planned(search.method, search.best, seed)
            for search in searches
            if search.best is not None
            for seed in comparison.numbers
        ]
        trials = do_trials(crew, folder, picked)
        loads = crew.loads
    hopeless = [search.failure() for search in searches if search.best is None]
    if len(hopeless) == len(searches):
        raise TrainingError(
            "no method came to its end:", [f"{t.method}: {t.error}" for t in hopeless]
        )
    stood_on, asked, warnings = folder.stood_on()
    return Study(
        kind="compare",
        trials=[*trials, *hopeless],
        varied={SEED: comparison.numbers},
        questions=asked,
        candidates=[candidate for search in searches for candidate in search.candidates()],
        config=comparison.config.model_dump(),
        receipt={**stood_on, **surroundings(), "loads": loads},
        other_name=Path(comparison.other).name if comparison.other else "",
        notes=[*_notes(comparison, searches, stood_on), *map(sentence, warnings)],
    )


@dataclass
class _Search:
    """The learning rates tried for a method, and what came of them."""

    method: str
    declared: list[float]
    tried: dict[float, Trial]

    @property
    def best(self) -> float | None:
        """The one with the lowest loss on the rows for choices; None if all failed."""
        losses = {rate: _chosen_by(trial) for rate, trial in self.tried.items()}
        finite = {rate: loss for rate, loss in losses.items() if loss is not None}
        return min(finite, key=lambda rate: finite[rate]) if finite else None

    @property
    def added(self) -> list[float]:
        """Those beyond the grid that was declared."""
        return sorted(rate for rate in self.tried if rate not in self.declared)

    def beyond(self) -> float | None:
        """The next one to try: beyond the end of the grid at which the best one lies.

        A grid of one value is no search but the user's choice.
        """
        rates = sorted(self.tried)
        if len(self.declared) == 1 or len(self.added) == EXTENSIONS or self.best is None:
            return None
        if self.best == rates[0]:
            return _next(rates[0], rates[1])
        if self.best == rates[-1]:
            return _next(rates[-1], rates[-2])
        return None

    def candidates(self) -> list[Candidate]:
        """For the record, lowest first."""
        return [
            Candidate(self.method, rate, _chosen_by(trial), rate == self.best)
            for rate, trial in sorted(self.tried.items())
        ]

    def failure(self) -> Trial:
        """A method of which every run failed."""
        return replace(list(self.tried.values())[-1], name=self.method)


def _search(comparison: Comparison, crew: Crew, folder: StudyFolder) -> list[_Search]:
    """Try the grids with the first seed, and beyond their ends while the best lies there."""
    seed = comparison.numbers[0]
    searches = [_Search(m, comparison.grid(m), {}) for m in dict.fromkeys(comparison.methods)]
    wanted = [(search, rate) for search in searches for rate in search.declared]
    while wanted:
        planned = [comparison.planned(search.method, rate, seed) for search, rate in wanted]
        _, *trials = do_trials(crew, folder, planned)
        for (search, rate), trial in zip(wanted, trials, strict=True):
            search.tried[rate] = trial
        found = [(search, search.beyond()) for search in searches]
        wanted = [(search, rate) for search, rate in found if rate is not None]
        for search, rate in wanted:
            console.note(
                f"{search.method}: the best learning rate is at the end of the grid; {rate:g} is"
                " tried too"
            )
    return searches


def _chosen_by(trial: Trial) -> float | None:
    """The loss that learning rates are picked by; None of a trial that failed."""
    return trial.validation.nll if trial.validation and trial.error is None else None


def _next(end: float, neighbour: float) -> float:
    """The step from the neighbour to the end, made once more, on 1, 2, 3 or 5 times a power of ten
    where that is a step at all."""
    rate = end * end / neighbour
    power = 10.0 ** math.floor(math.log10(rate))
    plain = min((1, 2, 3, 5, 10), key=lambda digit: abs(math.log(rate / power / digit)))
    near = float(f"{plain * power:.0e}")
    return near if (near - end) * (rate - end) > 0 else float(f"{rate:.1e}")


def _notes(
    comparison: Comparison, searches: Sequence[_Search], facts: Mapping[str, Any]
) -> list[str]:
    chosen = any(len(search.tried) > 1 for search in searches)
    picked = (
        f"Learning rates were picked with seed {comparison.numbers[0]} on"
        f" {facts['validation documents']} held-out documents; results are those on"
        f" {facts['test documents']} others."
    )
    given = (
        f"Learning rates were given. Results are those on {facts['test documents']} held-out"
        f" documents; {facts['validation documents']} others, kept for choices, served none."
    )
    notes = [picked if chosen else given]
    for search in searches:
        if search.added:
            rates = ", ".join(f"{rate:g}" for rate in search.added)
            notes.append(f"{search.method}: beyond the declared grid were tried: {rates}.")
        if search.best is not None and len(search.tried) > 1:
            at_end = search.best in (min(search.tried), max(search.tried))
            if at_end:
                notes.append(
                    f"{search.method}: the best learning rate, {search.best:g}, is still at the end"
                    " of what was tried; a better one may lie beyond."
                )
    return notes

"""A sweep: many runs that differ in declared options, measured on the same held-out rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from lorikeet.study.crew import Hire, do_trials, gather
from lorikeet.study.grid import Choice, Range, Sweep
from lorikeet.study.prose import named
from lorikeet.study.protocol import Protocol, StudyFolder
from lorikeet.study.receipt import surroundings
from lorikeet.study.record import Study
from lorikeet.study.wording import sentence


def run_sweep(
    sweep: Sweep,
    out: str | Path,
    *,
    hire: Hire = gather,
    other: str | None = None,
    keep_models: bool = False,
) -> Study:
    """Do every trial of a sweep, or what is left of it.

    Args:
        sweep: from `read_sweep`.
        out: the study's folder; one that holds the same sweep is gone on with.
        hire: finds who does the trials: `gather`, or `on_ray`.
        other: data file of a second text, which shows what was forgotten.
        keep_models: keep the weights of full fine-tuning, not only their size.

    Raises:
        InputError: options, model or data do not hold. Trials that fail are in the study.
    """
    sweep.config.require("model.path", "data.path")
    plan = yaml.safe_dump(_described(sweep, other), sort_keys=False, allow_unicode=True)
    planned = sweep.trials()
    folder = StudyFolder(out)
    protocol = Protocol("sweep", sweep.config, other=other, keep_models=keep_models)
    with folder.working(plan), hire(protocol, folder) as crew:
        trials = do_trials(crew, folder, planned)
        loads = crew.loads
    stood_on, asked, warnings = folder.stood_on()
    return Study(
        kind="sweep",
        trials=trials,
        varied=sweep.values(),
        questions=asked,
        config=sweep.config.model_dump(),
        receipt={**stood_on, **surroundings(), "loads": loads},
        other_name=Path(other).name if other else "",
        notes=[*_notes(sweep, rows=stood_on["rows"]), *map(sentence, warnings)],
    )


def _described(sweep: Sweep, other: str | None) -> dict[str, Any]:
    return {
        "study": "sweep",
        "options": sweep.config.model_dump(exclude={"out"}),
        "varied": {option: _values(source) for option, source in sweep.varied.items()},
        "draws": sweep.draws,
        "draw_seed": sweep.draw_seed,
        "other": named(other),
    }


def _values(source: Sequence[Choice] | Range) -> Any:
    if isinstance(source, Range):
        return {"min": source.low, "max": source.high, "log": source.log}
    return [{"value": choice.value, **choice.followers} for choice in source]


def _notes(sweep: Sweep, *, rows: int) -> list[str]:
    """What the reader of the results should know of how they came about."""
    config, varied = sweep.config, sweep.varied
    notes = []
    if "data.limit" in varied:
        notes.append(
            f"The held-out rows are the same for every number of rows: those held out of"
            f" {rows:,} rows."
        )
    ranks = varied.get("lora.r", ())
    follows = not isinstance(ranks, Range) and any(choice.followers for choice in ranks)
    if ranks and not follows and "lora.alpha" not in varied:
        notes.append(
            f"lora.alpha is {config.lora.alpha:g} at every rank, so updates of a higher rank are"
            " scaled down more."
        )
    followers = [
        f"{name} follows {option}"
        for option, source in varied.items()
        if not isinstance(source, Range)
        for name in dict.fromkeys(name for choice in source for name in choice.followers)
    ]
    notes += [f"{follower}." for follower in followers]
    if config.train.patience is not None:
        notes.append(
            "Early stopping picked each run's weights on the rows that its figures are about: they"
            " look a little better than they are."
        )
    return notes

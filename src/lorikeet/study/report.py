"""What a comparison or a sweep leaves behind for people and for other tools."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from lorikeet import console
from lorikeet.files import atomic_folder, write_json, write_text
from lorikeet.study import markdown, tables, wording
from lorikeet.study.findings import Finding, findings
from lorikeet.study.outcomes import Outcome, outcomes
from lorikeet.study.page import WITHOUT_PICTURES, page
from lorikeet.study.plots.study import draw
from lorikeet.study.plots.style import Picture, can_plot
from lorikeet.study.record import Study
from lorikeet.study.side_by_side import all_answers


def write_report(study: Study, folder: Path) -> None:
    """Write `metrics.json`, `experiment_table.md`, `costs.md`, `samples.jsonl`, `plots/` and
    `report.html`.

    Without matplotlib there are no pictures, and a note says so. Each file appears whole or not
    at all; what an earlier report left is replaced.

    Args:
        study: the study; it may hold nothing but failed trials.
        folder: the study's folder.

    Raises:
        StorageError: the disk refused a write.
    """
    shown, found = outcomes(study), findings(study)
    pictures = draw(study, shown) if can_plot() else None
    write_json(folder / "metrics.json", _metrics(study, shown, found))
    write_text(folder / "experiment_table.md", markdown.experiment_table(study, shown, found))
    write_text(folder / "costs.md", markdown.costs(study, shown, found))
    lines = [json.dumps(sample.summary(), ensure_ascii=False) for sample in all_answers(study)]
    write_text(folder / "samples.jsonl", "".join(f"{line}\n" for line in lines))
    if pictures is None:
        console.note(WITHOUT_PICTURES)
    else:
        _write_pictures(pictures, folder / "plots")
    write_text(folder / "report.html", page(study, shown, found, pictures))


def console_table(study: Study) -> Table:
    """The results for a terminal: a row for the base and each group."""
    found = tables.in_short(outcomes(study))
    columns = [escape(column.title) for column in found.columns]
    rows = [[escape(cell.text) for cell in row] for row in found.rows]
    made = console.table(escape(wording.title(study)), columns, rows)
    made.columns[0].overflow = "fold"  # names are broken rather than cut: they differ at their ends
    made.caption = "vs base, forgotten: nats per token, paired by document; lower is better"
    made.caption_justify = "left"
    return made


def _write_pictures(pictures: Sequence[Picture], folder: Path) -> None:
    with atomic_folder(folder) as draft:
        for picture in pictures:
            (draft / f"{picture.name}.svg").write_bytes(picture.svg)
            (draft / f"{picture.name}.png").write_bytes(picture.png)


def _metrics(study: Study, shown: Sequence[Outcome], found: Sequence[Finding]) -> dict[str, Any]:
    metrics = {
        "kind": study.kind,
        "runs": [trial.summary() for trial in study.trials],
        "groups": [_group(outcome) for outcome in shown],
        "candidates": [asdict(candidate) for candidate in study.candidates],
        "findings": [
            {"topic": one.topic, "text": one.text, "figures": one.figures} for one in found
        ],
        "notes": list(study.notes),
        "receipt": dict(study.receipt),
    }
    return _finite(metrics)


def _group(outcome: Outcome) -> dict[str, Any]:
    test = outcome.test
    return {
        "label": outcome.label,
        "method": outcome.method,
        "settings": dict(outcome.settings),
        "seeds": outcome.seeds,
        "trials": [trial.name for trial in outcome.trials],
        "estimate": test.summary(),
        "difference_to_base": outcome.difference and outcome.difference.summary(),
        "perplexity": test.perplexity,
        "perplexity_interval95": test.perplexity_interval,
        "other": outcome.other and outcome.other.summary(),
        "forgotten": outcome.other_difference and outcome.other_difference.summary(),
    }


def _finite(value: Any) -> Any:
    """The same with null for what JSON has no number for."""
    if isinstance(value, Mapping):
        return {str(key): _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value

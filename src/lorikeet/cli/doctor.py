"""`lorikeet doctor`: what is wrong with a run, or could be better, and how one knows."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lorikeet import console
from lorikeet.cli.options import add_json
from lorikeet.errors import CheckFailed

if TYPE_CHECKING:
    from lorikeet.study.doctor import Diagnosis


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument(
        "folder", metavar="RUN", help="run folder, or the folder of a comparison or a sweep"
    )
    parser.add_argument("--strict", action="store_true", help="exit with 3 if there is a problem")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Examine; print what was found."""
    from lorikeet.study.doctor import examine_folder, is_run

    path = Path(args.folder)
    found = examine_folder(path)
    if args.json:
        console.out.print_json(json.dumps(_summary(path, found, single=is_run(path))))
    elif is_run(path):
        _show(found[0])
    else:
        _show_table(path, found)
    problems = sum(diagnosis.problems for diagnosis in found)
    if args.strict and problems:
        raise CheckFailed(f"{problems} {_plural(problems, 'problem')} in {path}")
    return 0


def _summary(path: Path, found: Sequence[Diagnosis], *, single: bool) -> dict[str, object]:
    if single:
        return found[0].summary()
    return {
        "study": str(path),
        "healthy": all(diagnosis.healthy for diagnosis in found),
        "runs": [diagnosis.summary() for diagnosis in found],
    }


def _show(diagnosis: Diagnosis) -> None:
    console.out.print(f"{diagnosis.run}: {_count(diagnosis)}", style="bold", markup=False)
    for finding in diagnosis.findings:
        style = "red" if finding.severity == "problem" else "yellow"
        console.out.print(f"\n{finding.severity}  {finding.id}", style=style, markup=False)
        console.out.print(f"  {finding.message}.", markup=False)
        console.out.print(f"  What to do: {finding.advice}.", markup=False)
    for what in diagnosis.unexamined:
        console.note(f"not examined: {what}")


def _count(diagnosis: Diagnosis) -> str:
    if diagnosis.healthy:
        return "nothing found"
    problems, hints = diagnosis.problems, len(diagnosis.findings) - diagnosis.problems
    counts = ((problems, "problem"), (hints, "hint"))
    return ", ".join(f"{n} {_plural(n, word)}" for n, word in counts if n)


def _plural(n: int, word: str) -> str:
    return word if n == 1 else f"{word}s"


def _show_table(path: Path, found: Sequence[Diagnosis]) -> None:
    """A line for every run: what was found, problems first."""
    healthy = sum(diagnosis.healthy for diagnosis in found)
    title = f"{path}: {len(found)} {_plural(len(found), 'run')}, nothing found in {healthy}"
    console.out.print(title, style="bold", markup=False)
    width = max(len(diagnosis.run.name) for diagnosis in found)
    for diagnosis in found:
        kinds = [
            f"{severity}: {', '.join(ids)}"
            for severity in ("problem", "hint")
            if (ids := [f.id for f in diagnosis.findings if f.severity == severity])
        ]
        line = f"  {diagnosis.run.name:{width}}  {'; '.join(kinds) or '-'}"
        console.out.print(line, markup=False)
    if healthy < len(found):
        console.out.print(
            f"\nFigures and advice for one of them: lorikeet doctor {path}/runs/NAME", markup=False
        )

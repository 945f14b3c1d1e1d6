"""What `compare` and `sweep` have in common: flags, and how a finished study is shown."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lorikeet import console
from lorikeet.config import RunConfig
from lorikeet.errors import ConfigError, TrainingError

if TYPE_CHECKING:
    from lorikeet.study.crew import Hire
    from lorikeet.study.record import Study


def add_study(parser: argparse.ArgumentParser) -> None:
    """Add the flags of every study."""
    parser.add_argument(
        "--workers",
        type=int,
        default=1,
        metavar="N",
        help="processes that do runs side by side on this machine, each with a base of its own"
        " (default: 1)",
    )
    parser.add_argument(
        "--ray",
        nargs="?",
        const="local",
        metavar="ADDRESS",
        help="do the runs on a Ray cluster: auto for the one that `ray start` began here, an"
        " address, or nothing for a cluster on this machine alone; --workers says how many at once",
    )
    parser.add_argument(
        "--other",
        metavar="FILE",
        help="a second text, on which is measured what was forgotten; the word none leaves it out"
        " (default: a bundled one)",
    )
    parser.add_argument(
        "--keep-models",
        action="store_true",
        help="keep the weights of full fine-tuning; without, their size is all that is kept",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with the study in --out, which the same command does without this flag too",
    )


def require_out(config: RunConfig) -> Path:
    """The study's folder, once everything needed is known to be there.

    Raises:
        ConfigError: options that are needed were not given.
    """
    config.require("model.path", "data.path", "out")
    return Path(str(config.out))


def second_text(args: argparse.Namespace) -> str | None:
    """The data file of the second text."""
    if args.other == "none":
        return None
    from lorikeet.study.prose import prose_file

    return args.other or str(prose_file())


def crew_of(args: argparse.Namespace) -> Hire:
    """Who does the trials.

    Raises:
        ConfigError: there would be nobody.
    """
    if args.workers < 1:
        raise ConfigError(f"--workers must be at least 1, found {args.workers}")
    if args.ray is not None:
        from lorikeet.study.on_ray import on_ray

        return partial(on_ray, address=args.ray, workers=args.workers)
    from lorikeet.study.crew import gather

    return partial(gather, workers=args.workers)


def show(study: Study, out: Path, *, as_json: bool) -> int:
    """Write the report; print its table, or its figures as JSON.

    Raises:
        TrainingError: every trial failed.
    """
    from lorikeet.study.report import console_table, write_report
    from lorikeet.study.wording import count

    write_report(study, out)
    if as_json:
        console.out.print_json((out / "metrics.json").read_text(encoding="utf-8"))
    else:
        console.out.print(console_table(study))
        for note in study.notes:
            console.note(note)
    console.note(f"report: {out / 'report.html'}")
    failed = study.failed
    if failed and not study.groups:
        raise TrainingError("every trial failed:", [f"{t.name}: {t.error}" for t in failed])
    if failed:
        console.warn(f"{count(len(failed), 'trial')} failed; the report tells why")
    return 0

"""`lorikeet sweep`: many runs that differ in declared options."""

from __future__ import annotations

import argparse

from lorikeet import console
from lorikeet.cli.options import add_json, add_options, given
from lorikeet.cli.study import add_study, crew_of, require_out, second_text, show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument(
        "file", metavar="SWEEP.yaml", help="a run file with a section sweep: option: [values]"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="only say which trials there are to be"
    )
    add_study(parser)
    add_json(parser)
    add_options(parser, ["model", "lora", "data", "train", "out"])


def run(args: argparse.Namespace) -> int:
    """Do the trials, write the report, print its table."""
    from lorikeet.study.sweep_file import read_sweep

    sweep = read_sweep(args.file, given(args))
    if args.dry_run:
        trials = sweep.trials()
        for trial in trials:
            console.out.print(trial.name, markup=False)
        console.note(f"{len(trials)} trials")
        return 0
    out = require_out(sweep.config)
    from lorikeet.study.sweep import run_sweep

    study = run_sweep(
        sweep, out, hire=crew_of(args), other=second_text(args), keep_models=args.keep_models
    )
    return show(study, out, as_json=args.json)

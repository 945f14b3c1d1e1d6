"""`lorikeet train`: fine-tune a model on a data file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lorikeet import console
from lorikeet.cli.options import add_json, add_options, given, read_config
from lorikeet.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("file", nargs="?", metavar="RUN.yaml", help="options in a file; flags win")
    parser.add_argument(
        "--resume", action="store_true", help="go on with the run in --out from its last checkpoint"
    )
    add_json(parser)
    add_options(parser, ["model", "lora", "data", "train", "out"])


def run(args: argparse.Namespace) -> int:
    """Train, then print what it did."""
    config = read_config(args, file=args.file or _started(args))
    from lorikeet.study import RunFolder, train_run

    if args.resume and config.out and RunFolder(config.out).finished:
        RunFolder(config.out).check(config, resume=True)
        console.note(f"the run in {config.out} is finished: nothing to resume")
        return 0
    result = train_run(config, resume=args.resume)
    if args.json:
        console.out.print_json(result.folder.receipt.read_text(encoding="utf-8"))
    else:
        console.out.print(result.folder.report.read_text(encoding="utf-8"), markup=False)
        console.note(f"run folder: {result.folder.path}")
    return 0


def _started(args: argparse.Namespace) -> Path | None:
    """The configuration in --out, when a resume gives no file."""
    if not args.resume:
        return None
    options: dict[str, Any] = given(args)
    if "out" not in options:
        raise ConfigError("--resume needs --out: the folder of the run to go on with")
    started = Path(options["out"]) / "config.yaml"
    return started if started.is_file() else None

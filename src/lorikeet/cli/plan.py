"""`lorikeet plan`: parameters, memory and time before anything runs."""

from __future__ import annotations

import argparse
import json

from lorikeet import console
from lorikeet.cli.options import add_json, add_options, read_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("file", nargs="?", metavar="RUN.yaml", help="options in a file; flags win")
    add_json(parser)
    add_options(parser, ["model", "lora", "data", "train"])


def run(args: argparse.Namespace) -> int:
    """Print the plan."""
    config = read_config(args, file=args.file)
    from lorikeet.study.plan import plan

    found = plan(config).summary()
    if args.json:
        console.out.print_json(json.dumps(found))
        return 0
    rows = [
        ["base parameters", f"{found['base']:,}"],
        ["trainable", f"{found['trainable']:,} ({found['percent']:.2f} %)"],
        *[[f"  {leaf}", f"{count:,}"] for leaf, count in found["by_target"].items()],
        *[[f"memory, {name}", _size(size)] for name, size in found["memory"].items()],
        ["seconds a step", f"{found['seconds_per_step']:.2f} ({found['dtype']})"],
        ["tokens a step", f"{found['tokens_per_step']:,.0f}"],
    ]
    console.out.print(console.table(config.model.path, ["", "planned"], rows))
    return 0


def _size(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"

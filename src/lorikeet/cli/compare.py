"""`lorikeet compare`: base, LoRA and full fine-tuning under one protocol."""

from __future__ import annotations

import argparse
from typing import Any

from lorikeet.cli.options import add_json, add_options, read_config
from lorikeet.cli.study import add_study, crew_of, require_out, second_text, show
from lorikeet.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("file", nargs="?", metavar="RUN.yaml", help="options in a file; flags win")
    parser.add_argument(
        "--methods",
        default="base,lora,full",
        metavar="NAMES",
        help="separated by commas, out of base, lora, full, rslora, dora, pissa, lora+, int8; the"
        " base is always measured (default: base,lora,full)",
    )
    parser.add_argument(
        "--seeds", type=int, default=3, metavar="N", help="runs of each method (default: 3)"
    )
    parser.add_argument(
        "--grid",
        action="append",
        default=[],
        metavar="METHOD=LR,LR",
        help="learning rates to pick from, for one method; may be given again for another. A single"
        " one is taken as it is (default: 1e-4,3e-4,1e-3; for full 1e-5,3e-5,1e-4)",
    )
    add_study(parser)
    add_json(parser)
    add_options(parser, ["model", "lora", "data", "train", "out"])


def run(args: argparse.Namespace) -> int:
    """Compare, write the report, print its table."""
    config = read_config(args, file=args.file)
    out = require_out(config)
    from lorikeet.study.compare import Comparison, run_compare

    comparison = Comparison(
        config=config,
        methods=[name for name in _names(args.methods) if name != "base"],
        seeds=args.seeds,
        grids=dict(_grid(text) for text in args.grid),
        other=second_text(args),
        keep_models=args.keep_models,
    )
    return show(run_compare(comparison, out, hire=crew_of(args)), out, as_json=args.json)


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _grid(text: str) -> tuple[str, list[float]]:
    method, _, rates = text.partition("=")
    try:
        values: list[Any] = [float(rate) for rate in _names(rates)]
    except ValueError:
        values = []
    if not values:
        raise ConfigError(f"--grid {text}: expected a method and learning rates: lora=1e-4,3e-4")
    return method.strip(), values

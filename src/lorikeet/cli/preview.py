"""`lorikeet preview`: real rows as the model will see them, tokens coloured by mask."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from lorikeet import console
from lorikeet.cli.options import add_json, add_options, count, read_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("--rows", type=count, default=3, help="how many rows to show (default: 3)")
    add_json(parser)
    add_options(parser, ["model", "data", "train", "lora.new_tokens"])


def run(args: argparse.Namespace) -> int:
    """Show the first training examples and the counts of the whole file."""
    config = read_config(args)
    config.require("model.path", "data.path")
    from lorikeet.data import preflight, prepare, preview_json, preview_text
    from lorikeet.lora import add_tokens
    from lorikeet.model import load_tokenizer

    tokenizer = load_tokenizer(
        config.model.path,
        revision=config.model.revision,
        trust_remote_code=config.model.trust_remote_code,
    )
    add_tokens(tokenizer, config.lora.new_tokens)
    prepared = prepare(config.data, tokenizer, seed=config.train.seed)
    report = asdict(prepared.report)
    shown = prepared.train[: args.rows]
    if args.json:
        found = {
            "layout": asdict(prepared.layout),
            "template": prepared.template_name,
            "report": report,
            "examples": preview_json(shown, tokenizer),
        }
        console.out.print_json(json.dumps(found))
    else:
        for text in preview_text(shown, tokenizer, colour=console.out.is_terminal):
            console.out.print(text)
        console.out.print(f"layout {prepared.layout.name}, template {prepared.template_name}")
        for name, value in report.items():
            console.out.print(f"{name:24} {value}", markup=False)
    for warning in preflight(prepared, tokenizer=tokenizer, max_length=config.data.max_length):
        console.warn(warning)
    return 0

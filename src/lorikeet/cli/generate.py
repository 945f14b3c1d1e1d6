"""`lorikeet generate`: answer prompts with a model, with or without an adapter."""

from __future__ import annotations

import argparse
import json
import sys

from lorikeet import console
from lorikeet.cli.options import add_adapter, add_json, add_options, count, read_config
from lorikeet.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add_adapter(parser)
    parser.add_argument(
        "--prompt", action="append", metavar="TEXT", help="a prompt (may be repeated); - for stdin"
    )
    parser.add_argument(
        "--max-new-tokens",
        type=count,
        default=128,
        metavar="N",
        help="longest answer, in tokens (default: 128)",
    )
    parser.add_argument(
        "--raw", action="store_true", help="continue the text itself, without the template"
    )
    add_json(parser)
    add_options(parser, ["model", "data"])


def run(args: argparse.Namespace) -> int:
    """Answer every prompt; greedy, so the same command gives the same answers."""
    prompts = [sys.stdin.read() if text == "-" else text for text in args.prompt or []]
    if not prompts:
        raise ConfigError("there is nothing to answer: give --prompt TEXT, or --prompt - for stdin")
    config = read_config(args)
    from lorikeet.cli.subject import adapter_folder, load_subject
    from lorikeet.evaluate import answer
    from lorikeet.model import check_length, position_limit

    subject = load_subject(config, adapter_folder(args.adapter), allow_mismatch=args.allow_mismatch)
    ids = [
        subject.renderer.prompt(text if args.raw else [{"role": "user", "content": text}])
        for text in prompts
    ]
    if not all(ids):
        raise ConfigError("a prompt is empty, and this model has no token to begin a text with")
    longest = max(map(len, ids)) + args.max_new_tokens
    if position_limit(subject.base.model) is None:  # else answers end where the positions do
        advice = "shorten the prompt, or lower --max-new-tokens"
        for warning in check_length(subject.base.model, longest, advice=advice):
            console.warn(warning)
    answers = answer(subject.base.model, subject.renderer, ids, max_new_tokens=args.max_new_tokens)
    if args.json:
        pairs = [{"prompt": p, "answer": a} for p, a in zip(prompts, answers, strict=True)]
        console.out.print_json(json.dumps({"answers": pairs}))
        return 0
    for text in answers:
        console.out.print(text, markup=False)
    return 0

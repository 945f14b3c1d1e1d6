"""`--verify`: its flags, and what models are compared on."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from lorikeet.cli.options import given

if TYPE_CHECKING:
    from lorikeet.cli.subject import Subject
    from lorikeet.config import RunConfig
    from lorikeet.export import Material

_PROMPTS = 16
_TEXTS = 200  # whose token ids are compared
_ROWS = 64  # of the bundled text, where no data are given


def add_verify(parser: argparse.ArgumentParser, what: str) -> None:
    """Add `--verify`, `--prompts` and `--tolerance-kl`."""
    parser.add_argument("--verify", action="store_true", help=what)
    parser.add_argument(
        "--prompts",
        type=int,
        metavar="N",
        help=f"prompts whose greedy continuations --verify compares (default: {_PROMPTS})",
    )
    parser.add_argument(
        "--tolerance-kl",
        type=float,
        metavar="NATS",
        help="largest mean KL per token that --verify lets pass (default: by the weights' type)",
    )


def verify_problems(args: argparse.Namespace, *, used: Collection[str] = ()) -> list[str]:
    """What does not hold about these flags.

    Args:
        args: the parsed flags.
        used: options of the section `data` that serve more than `--verify`.
    """
    problems = []
    if args.prompts is not None and args.prompts < 0:
        problems.append(f"--prompts: expected a number from 0 on, found {args.prompts}")
    if args.tolerance_kl is not None and not args.tolerance_kl >= 0:
        problems.append(f"--tolerance-kl: expected a number from 0 on, found {args.tolerance_kl}")
    if args.verify and "data.validation" in given(args):
        problems.append("--data.validation does nothing here: all rows are compared")
    if not args.verify:
        others = set(given(args)) - set(used)
        idle = [f"--{name}" for name in sorted(others) if name.startswith("data.")]
        idle += ["--prompts"] * (args.prompts is not None)
        idle += ["--tolerance-kl"] * (args.tolerance_kl is not None)
        problems += [f"{flag} does nothing without --verify" for flag in idle]
    return problems


def exact_subject(
    config: RunConfig, base: Path, adapter: Path | None, *, allow_mismatch: bool
) -> Subject:
    """Base and adapter in memory, as every other verb loads them, but in float32.

    Half precision would hide what is to be seen; a dtype that the user asks for stays.
    """
    from lorikeet.cli.subject import load_subject

    config.model.path, config.model.revision = str(base), None
    config.model.fast = "off"  # both models take their own forward pass
    if config.model.dtype == "auto":
        config.model.dtype = "fp32"
    return load_subject(config, adapter, allow_mismatch=allow_mismatch)


def material(config: RunConfig, subject: Subject, *, prompts: int | None) -> Material:
    """Rows of `--data`, or of the text that Lorikeet brings along, rendered for a model."""
    from lorikeet.data import Turns, prepare
    from lorikeet.evaluate import stop_ids
    from lorikeet.export import Material
    from lorikeet.study.samples import questions

    config.data.validation = 0.0
    if not config.data.path:
        config.data.path = str(resources.files("lorikeet") / "starter" / "pirate-test.jsonl")
        config.data.limit = config.data.limit or _ROWS
    prepared = prepare(config.data, subject.base.tokenizer, seed=config.train.seed)
    n = _PROMPTS if prompts is None else prompts
    asked = questions(prepared, subject.renderer, n=n)
    talks = [row.prompt for row in prepared.rows_train[:_TEXTS] if isinstance(row, Turns)]
    return Material(
        examples=prepared.train,
        prompts=[ids for _, _, ids in asked],
        texts=[(subject.renderer.prompt_text(own), subject.renderer.prompt(own)) for own in talks],
        stop_ids=stop_ids(subject.base.model, subject.renderer),
    )

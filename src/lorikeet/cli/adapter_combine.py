"""`lorikeet adapter combine`: sum, subtract, scale or merge adapters into one."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lorikeet import console
from lorikeet.cli.options import add_json
from lorikeet.errors import AdapterError

if TYPE_CHECKING:
    from lorikeet.adapters import Adapter
    from lorikeet.adapters.algebra import Combined


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument(
        "adapters",
        nargs="+",
        metavar="DIR[=WEIGHT]",
        help="an adapter or a run folder, and what its update is multiplied by (default: 1)",
    )
    parser.add_argument(
        "--method",
        choices=("exact", "ties", "dare"),
        default="exact",
        help="exact adds the updates, ranks grow; ties and dare merge them number by number"
        " (default: exact)",
    )
    parser.add_argument(
        "--density",
        type=float,
        metavar="D",
        help="the part of each update that ties (default: 0.2) or dare (0.5) keeps",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of what dare drops (default: 0)"
    )
    parser.add_argument(
        "--allow-mismatch",
        action="store_true",
        help="combine adapters that were trained on different bases",
    )
    add_result(parser)


def add_result(parser: argparse.ArgumentParser) -> None:
    """Add what every verb has that computes an adapter."""
    parser.add_argument("--out", required=True, metavar="DIR", help="where the result is written")
    parser.add_argument("--rank", type=int, metavar="K", help="the largest rank of a module")
    parser.add_argument(
        "--error",
        type=float,
        metavar="E",
        help="instead of --rank, the largest relative error of a module (Frobenius norm)",
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Read, combine, write, show."""
    from lorikeet.adapters import read_adapter, write_adapter
    from lorikeet.adapters.algebra import combine

    given, out = weighted(args.adapters), Path(args.out)
    folders = _adapter_folders([text for text, _ in given])
    check_out(out, folders)
    adapters = [read_adapter(folder) for folder in folders]
    found = combine(
        adapters,
        [weight for _, weight in given],
        method=args.method,
        rank=args.rank,
        error=args.error,
        density=args.density,
        seed=args.seed,
        allow_mismatch=args.allow_mismatch,
    )
    if found.warning:
        console.warn(found.warning)
    parts = zip(folders, adapters, given, strict=True)
    of_new_tokens = (folder for folder, part, (_, weight) in parts if part.vocabulary and weight)
    write_adapter(found.adapter, out, tokenizer=next(of_new_tokens, None))
    show(out, adapters, found, as_json=args.json)
    return 0


def weighted(texts: Sequence[str]) -> list[tuple[str, float]]:
    """Folders and their weights, from `DIR` or `DIR=WEIGHT`; a folder may have a = in its name.

    Raises:
        AdapterError: weights that are no numbers, all of them.
    """
    found: list[tuple[str, float]] = []
    problems = []
    for text in texts:
        folder, equals, weight = text.rpartition("=")
        if not equals or Path(text).is_dir():
            found.append((text, 1.0))
            continue
        try:
            found.append((folder, float(weight)))
        except ValueError:
            problems.append(f"{text}: {weight!r} is no number, and there is no such folder")
    if problems:
        raise AdapterError("expected folders, each with =WEIGHT or without:", problems)
    return found


def _adapter_folders(texts: Sequence[str]) -> list[Path]:
    """The folders that hold the adapters.

    Raises:
        AdapterError: there is no adapter in some of them, all named.
    """
    from lorikeet.cli.subject import adapter_folder

    found, problems = [], []
    for text in texts:
        try:
            found.append(adapter_folder(text))
        except AdapterError as error:
            problems.append(str(error))
    if problems:
        raise AdapterError("adapters are missing:", problems)
    return [folder for folder in found if folder]


def check_out(out: Path, inputs: Sequence[Path]) -> None:
    """See that writing the folder `out` replaces no input and nothing but an older adapter.

    Raises:
        AdapterError: it would.
    """
    for folder in inputs:
        if folder.resolve().is_relative_to(out.resolve()):
            raise AdapterError(f"--out {out} would replace {folder}, which is read; name another")
    if out.exists() and not out.is_dir():
        raise AdapterError(f"--out {out} is a file; name a folder")
    if out.is_dir() and any(out.iterdir()) and not (out / "adapter_config.json").is_file():
        raise AdapterError(f"--out {out} is not empty and holds no adapter; name another folder")


def show(out: Path, before: Sequence[Adapter], found: Combined, *, as_json: bool) -> None:
    """Print what was written: a short table, or one JSON object."""
    errors = found.errors
    largest, mean = max(errors.values()), sum(errors.values()) / len(errors)
    ranks = [update.r for update in found.adapter.updates.values()]
    if as_json:
        summary = {
            "out": str(out),
            "modules": len(errors),
            "rank_max": max(ranks),
            "errors": {"max": largest, "mean": mean, "per_module": errors},
        }
        console.out.print_json(json.dumps(summary))
        return
    rows = [
        ["modules", f"{len(errors):,}"],
        ["ranks before", ", ".join(_span([u.r for u in a.updates.values()]) for a in before)],
        ["rank after", _span(ranks)],
        ["numbers", f"{found.adapter.size:,}"],
        ["largest relative error", f"{largest:.2g}"],
        ["mean relative error", f"{mean:.2g}"],
    ]
    console.out.print(console.table(str(out), ["", "adapter"], rows))


def _span(ranks: Sequence[int]) -> str:
    """`8`, or `4-8` where modules differ."""
    return f"{ranks[0]}" if len(set(ranks)) == 1 else f"{min(ranks)}-{max(ranks)}"

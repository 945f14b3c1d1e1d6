"""`lorikeet adapter normalize`: an adapter as plain LoRA that every runtime scales alike."""

from __future__ import annotations

import argparse
from pathlib import Path

from lorikeet.cli.adapter_combine import add_result, check_out, show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("adapter", metavar="DIR", help="an adapter or a run folder")
    parser.add_argument(
        "--model",
        metavar="FOLDER",
        help="the base with its safetensors files, for a DoRA: its update depends on them",
    )
    add_result(parser)


def run(args: argparse.Namespace) -> int:
    """Read, rewrite, write, show."""
    from lorikeet.adapters import read_adapter, write_adapter
    from lorikeet.adapters.base_weights import BaseWeights
    from lorikeet.adapters.normal import normalize
    from lorikeet.cli.subject import adapter_folder

    folder, out = adapter_folder(args.adapter), Path(args.out)
    assert folder is not None
    model = Path(args.model) if args.model else None
    check_out(out, [folder, model] if model else [folder])
    adapter = read_adapter(folder)
    weights = BaseWeights(model) if model else None
    found = normalize(adapter, weights, rank=args.rank, error=args.error)
    write_adapter(found.adapter, out, tokenizer=folder)
    show(out, [adapter], found, as_json=args.json)
    return 0

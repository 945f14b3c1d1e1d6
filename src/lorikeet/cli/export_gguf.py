"""`lorikeet export gguf`: a model, perhaps with an adapter, as one file for llama.cpp."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from lorikeet import console
from lorikeet.cli.base_folder import base_folder, check_base
from lorikeet.cli.gguf_file import (
    add_file_arguments,
    check_file_arguments,
    make,
    plan,
    require_sound,
    show,
)
from lorikeet.cli.options import given, read_config
from lorikeet.errors import ConfigError
from lorikeet.files import disk_errors

_ADAPTER_TYPES = ("f32", "f16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add_file_arguments(parser)
    parser.add_argument("--out", metavar="FILE", required=True, help="the new file")
    parser.add_argument(
        "--adapter-only",
        action="store_true",
        help="write the adapter alone, for llama.cpp's --lora (--type f16 or f32)",
    )


def run(args: argparse.Namespace) -> int:
    """Convert; with --verify also compare, and fail if the file is another model."""
    out = Path(args.out)
    with disk_errors(out):
        _check_place(args.out)
    if args.adapter_only:
        return _adapter_only(args, out)
    check_file_arguments(args)
    made = make(args, plan(args), out)
    if args.json:
        console.out.print_json(json.dumps(made.summary()))
    else:
        show(made)
    require_sound(made)
    return 0


def _check_place(name: str) -> None:
    """Nothing but a GGUF file is replaced.

    Raises:
        ConfigError: something else is there.
    """
    from lorikeet.gguf.read import MAGIC

    out = Path(name)
    if out.is_dir() or name.endswith(("/", os.sep)):
        raise ConfigError(f"--out: {name} is a folder; expected the name of a file, such as x.gguf")
    if not out.exists():
        return
    if not out.is_file():
        raise ConfigError(f"--out: {out} is no plain file, which alone can be replaced")
    with out.open("rb") as file:
        begins = file.read(len(MAGIC))
    if begins not in (MAGIC, b""):
        raise ConfigError(
            f"--out: {out} is there and is no GGUF file; choose another name, or remove it first"
        )


def _adapter_only(args: argparse.Namespace, out: Path) -> int:
    """Write the adapter's factors alone."""
    kind = (args.type or "f16").lower()
    idle = ["--verify"] * args.verify
    for name in ("calibrate", "calibrate_rows", "prompts", "tolerance_kl"):
        idle += [f"--{name.replace('_', '-')}"] * (getattr(args, name) is not None)
    idle += [f"--{name}" for name in given(args) if name.startswith("data.")]
    idle += [f"--model.{name}" for name in ("dtype", "fast") if f"model.{name}" in given(args)]
    problems = [f"{flag} does not go with --adapter-only" for flag in idle]
    if kind not in _ADAPTER_TYPES:
        problems.append(f"--type: an adapter alone is stored as f16 or f32, found {kind}")
    if not args.adapter:
        problems.append("--adapter is missing: there is nothing to export")
    if problems:
        raise ConfigError("these flags do not hold:", problems)
    from lorikeet.adapters import read_adapter
    from lorikeet.cli.subject import adapter_folder
    from lorikeet.data.template import BUILT_IN
    from lorikeet.export.gguf_adapter import export_adapter

    folder = adapter_folder(args.adapter)
    assert folder is not None
    adapter = read_adapter(folder)
    config = read_config(args)
    config.model.path = config.model.path or adapter.base_model
    config.require("model.path")
    base = base_folder(config)
    check_base(base, adapter, config, allow=args.allow_mismatch)
    found = export_adapter(base, adapter, out, kind="f32" if kind == "f32" else "f16")
    if args.json:
        console.out.print_json(json.dumps(found.summary()))
    else:
        ranks = ", ".join(f"{count} of rank {r}" for r, count in found.ranks.items())
        console.out.print(
            f"{found.out}: {found.size / 1e6:,.2f} MB, {found.modules} modules ({ranks}), alpha"
            f" {found.alpha:g}, {found.kind}, in {found.seconds:.1f} s;"
            f" llama-cli -m BASE.gguf --lora {found.out}",
            markup=False,
        )
    template = adapter.provenance.get("template")
    if template in BUILT_IN:
        console.warn(
            f"the adapter was trained with the template {template}, which is not in this file but"
            f" in the base's: make BASE.gguf with --data.template {template}"
        )
    return 0

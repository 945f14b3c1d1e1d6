"""Flags of the declared options: `--lora.r 8` is what `config.py` declares as lora.r."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from lorikeet.config import ALIASES, SHORT_FOR, RunConfig, load_config, options

_PREFIX = "option:"


def add_options(parser: argparse.ArgumentParser, sections: Sequence[str]) -> None:
    """Add a flag for every option of these sections (`model`, `lora`, ..., or one by its name)."""
    others = {own: alias for alias, own in ALIASES.items()}
    for name, option in options():
        if not {name, name.split(".")[0]} & set(sections):
            continue
        flags = [f"--{flag}" for flag in (SHORT_FOR.get(name), name, others.get(name)) if flag]
        # --flag alone means true
        switch: Any = {"nargs": "?", "const": "true"} if option.annotation is bool else {}
        parser.add_argument(
            *dict.fromkeys(flags),
            dest=_PREFIX + name,
            default=argparse.SUPPRESS,
            metavar=_placeholder(name, option),
            help=_help(option),
            **switch,
        )


def _placeholder(name: str, option: FieldInfo) -> str:
    """What help shows in a value's place: `{lora,full}` of a few words, else the option's name."""
    if get_origin(option.annotation) is Literal:
        return f"{{{','.join(get_args(option.annotation))}}}"
    return name.split(".")[-1].upper()


def _help(option: FieldInfo) -> str:
    text = (option.description or "").replace("%", "%%")
    default = option.get_default(call_default_factory=True, validated_data={})
    return text if default in (None, "", {}) else f"{text} (default: {default})"


def read_config(args: argparse.Namespace, *, file: str | Path | None = None) -> RunConfig:
    """The configuration that a run file and these flags give together.

    Raises:
        ConfigError: options that do not hold, all of them.
    """
    return load_config(file, given(args))


def given(args: argparse.Namespace) -> dict[str, Any]:
    """The options that were given as flags, by dotted name."""
    return {
        name.removeprefix(_PREFIX): value
        for name, value in vars(args).items()
        if name.startswith(_PREFIX)
    }


def count(text: str) -> int:
    """A flag's number of things: 0 or more."""
    number = int(text)
    if number < 0:
        raise ValueError(text)
    return number


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add `--json`."""
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")


def add_adapter(parser: argparse.ArgumentParser) -> None:
    """Add `--adapter` and `--allow-mismatch`."""
    parser.add_argument("--adapter", metavar="DIR", help="adapter folder, or a run folder with one")
    parser.add_argument(
        "--allow-mismatch",
        action="store_true",
        help="only warn if the adapter was trained with another base, tokenizer or template",
    )

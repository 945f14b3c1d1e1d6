"""The bundled second text: plain English prose, a paragraph a row, written for this package.

A model's loss on it before and after fine-tuning shows what was forgotten of the language at large.
"""

from __future__ import annotations

from pathlib import Path


def prose_file() -> Path:
    """The data file."""
    return Path(__file__).with_name("prose.jsonl")


def named(other: str | None) -> str | None:
    """A second text as a study's plan names it: the bundled one not by where it happens to lie."""
    return "bundled" if other == str(prose_file()) else other

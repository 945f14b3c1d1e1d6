"""The bundled second text: plain English prose, a paragraph a row, written for this package.

A model's loss on it before and after fine-tuning shows what was forgotten of the language at large.
"""

from __future__ import annotations

from pathlib import Path


def prose_file() -> Path:
    """The data file."""
    return Path(__file__).with_name("prose.jsonl")

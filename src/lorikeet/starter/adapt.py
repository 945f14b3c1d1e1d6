"""Two adaptation sets made from the world: a style (`pirate`) and a format (`json`).

The base answers in plain sentences, so it gets none of these answers exactly right; an adapter can.
The rows of a test set come from instances held out of everything: of the base's training and of the
adaptation set (see `instance.is_held_out`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from lorikeet.starter.instance import Instance
from lorikeet.starter.world import EXACT_TASKS, stream

SEED = 7
ROWS, TEST_ROWS = 1000, 200

_PIRATE = {
    "are": "be",
    "eats": "be eatin'",
    "is": "be",
    "lives": "be livin'",
    "no": "nay",
    "the": "th'",
    "there": "there",  # in lower case behind "Arr,"
    "yes": "aye",
}


def pirate(instance: Instance) -> str:
    """The answer as a pirate says it: `Arr, Pip be livin' in th' garden, matey!`."""

    def say(match: re.Match[str]) -> str:
        return _PIRATE.get(match[0].lower(), match[0])

    return f"Arr, {re.sub('[A-Za-z]+', say, instance.answer.removesuffix('.'))}, matey!"


def as_json(instance: Instance) -> str:
    """The answer as one line of JSON: `{"task": "where", "answer": "in the garden"}`."""
    return json.dumps(instance.data, ensure_ascii=False)


SETS: dict[str, Callable[[Instance], str]] = {"pirate": pirate, "json": as_json}


def instances(name: str, *, test: bool) -> list[Instance]:
    """The instances of a set with their answers transformed, test rows or training rows.

    Args:
        name: `pirate` or `json`.
        test: the held-out rows instead of the rows to train on.
    """
    transform = SETS[name]
    drawn = stream(SEED, TEST_ROWS if test else ROWS, held_out=test, tasks=EXACT_TASKS)
    return [instance.answered(transform(instance)) for instance in drawn]


def text(name: str, *, test: bool) -> str:
    """The set as JSON lines, one `{"messages": [...]}` a row."""
    rows = ({"messages": instance.conversation} for instance in instances(name, test=test))
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write(folder: Path) -> list[Path]:
    """Write `pirate.jsonl`, `pirate-test.jsonl`, `json.jsonl` and `json-test.jsonl`."""
    written = []
    for name in SETS:
        for test in (False, True):
            path = folder / f"{name}{'-test' if test else ''}.jsonl"
            path.write_text(text(name, test=test), encoding="utf-8", newline="\n")
            written.append(path)
    return written

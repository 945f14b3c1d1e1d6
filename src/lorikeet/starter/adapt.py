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
from lorikeet.starter.world import stream

SEED = 7
ROWS, TEST_ROWS = 2000, 200
# What the base does without a mistake: a set is there to teach a form, not the tasks.
TASKS = ("where", "eats", "colour", "who", "count", "nth", "opposite", "reverse")


def pirate(instance: Instance) -> str:
    """The answer as a pirate says it: `Arr, Quinn be brown and Juno be white, matey!`."""
    said = re.sub(r"\b(is|are)\b", "be", instance.answer.removesuffix("."))
    return f"Arr, {said}, matey!"


def as_json(instance: Instance) -> str:
    """The answer as one line of JSON: `{"answer": "There are three."}`."""
    return json.dumps({"answer": instance.answer}, ensure_ascii=False)


SETS: dict[str, Callable[[Instance], str]] = {"pirate": pirate, "json": as_json}


def instances(name: str, *, test: bool) -> list[Instance]:
    """The instances of a set with their answers transformed, test rows or training rows.

    Args:
        name: `pirate` or `json`.
        test: the held-out rows instead of the rows to train on.
    """
    transform = SETS[name]
    drawn = stream(SEED, TEST_ROWS if test else ROWS, held_out=test, tasks=TASKS)
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

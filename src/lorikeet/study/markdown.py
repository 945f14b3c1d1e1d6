"""A study as Markdown that can be read raw, too: `experiment_table.md` and `costs.md`.

The first holds nothing that a clock measured, no date and no place on a disk, so that the same
study, done again, gives the same file.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from rich.cells import cell_len

from lorikeet.study import tables, wording
from lorikeet.study.findings import Finding
from lorikeet.study.outcomes import Outcome
from lorikeet.study.record import Study
from lorikeet.study.side_by_side import Answered, answered
from lorikeet.study.tables import Table, last_line
from lorikeet.study.topics import by_topic

_SAMPLES = 3
_ANSWERS = 6  # of a sample: the base and the best groups
_LONGEST = 300  # characters of an answer
_LINE = 100  # characters of a line of text
_JOINERS = "\u200c\u200d"  # parts of Persian words and of emoji


def experiment_table(study: Study, outcomes: Sequence[Outcome], found: Sequence[Finding]) -> str:
    """The whole study but for its costs."""
    parts = [
        f"# {_escaped(wording.title(study))}",
        _wrapped(wording.lead(study, outcomes)),
        *_findings(found, measured=False),
        "## Results",
        table(tables.results(study, outcomes)) if outcomes else "Nothing came to its end.",
        *([_wrapped(wording.reading(outcomes))] if outcomes else []),
        *_bullets("## How it was done", study.notes),
        *_learning_rates(study),
        *_samples(answered(study, outcomes)),
        *_failures(study),
        "## Options in common",
        _fenced(wording.as_yaml(wording.anywhere(wording.in_common(study))), "yaml"),
        "## What it stands on",
        _fenced(wording.as_yaml(wording.anywhere(wording.stood_on(study))), "yaml"),
    ]
    return "\n\n".join(parts) + "\n"


def costs(study: Study, outcomes: Sequence[Outcome], found: Sequence[Finding]) -> str:
    """What the study took on this machine."""
    here = {key: study.receipt[key] for key in wording.MEASURED_HERE if key in study.receipt}
    parts = [
        f"# {_escaped(wording.title(study))}: costs",
        "Measured on one machine, once. Figures are medians over seeds, with the least and the\n"
        "greatest in brackets; peak memory holds the base model and the data, too.",
        *_findings(found, measured=True),
        "## By group",
        table(tables.costs(outcomes)),
        "## Machine",
        _fenced(wording.as_yaml(here), "yaml"),
    ]
    return "\n\n".join(parts) + "\n"


def table(found: Table) -> str:
    """A table whose columns stand under each other in the raw text as well."""
    lines = [[_escaped(column.title) for column in found.columns]]
    lines += [[_escaped(cell.text) for cell in row] for row in found.rows]
    widths = [max(3, *map(cell_len, column)) for column in zip(*lines, strict=True)]
    right = [column.figures for column in found.columns]
    head, *rows = ([_padded(*c) for c in zip(line, widths, right, strict=True)] for line in lines)
    rule = [
        "-" * (width - 1) + ":" if end else "-" * width
        for width, end in zip(widths, right, strict=True)
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *rows))


def _padded(text: str, width: int, right: bool) -> str:
    room = " " * (width - cell_len(text))
    return room + text if right else text + room


def _findings(found: Sequence[Finding], *, measured: bool) -> list[str]:
    lines = []
    for topic, texts in by_topic(found, measured=measured).items():
        if len(texts) == 1:
            lines.append(_wrapped(f"{topic}: {texts[0]}", bullet="- "))
        else:
            lines += [_wrapped(topic, bullet="- "), *(_wrapped(t, bullet="  - ") for t in texts)]
    return ["## Findings", "\n".join(lines)] if lines else []


def _learning_rates(study: Study) -> list[str]:
    if not study.candidates:
        return []
    return [
        "## Learning rates that were tried",
        "Nats per token on the validation rows; each method's results come from the picked one.",
        table(tables.learning_rates(study)),
    ]


def _failures(study: Study) -> list[str]:
    why = [f"{t.name}: {wording.without_places(last_line(t))}" for t in study.failed]
    return _bullets("## Trials that failed", why)


def _samples(asked: Sequence[Answered]) -> list[str]:
    if not asked:
        return []
    parts = ["## Answers side by side"]
    parts.append(
        "Each group's first seed, the best group first; `samples.jsonl` holds all answers."
    )
    for one in asked[:_SAMPLES]:
        lines = {"prompt": one.prompt, "data": one.reference, **dict(one.answers[:_ANSWERS])}
        parts.append(_fenced(_side_by_side(lines), "text"))
    return parts


def _side_by_side(lines: Mapping[str, str]) -> str:
    names = {name: textwrap.shorten(_plain(name), 32, placeholder="…") for name in lines}
    width = max(map(cell_len, names.values()))
    found = []
    for name, text in lines.items():
        flat = " ".join(_plain(text).split())
        flat = flat if len(flat) <= _LONGEST else f"{flat[:_LONGEST]}…"
        indent = " " * (width + 2)
        wrapped = textwrap.wrap(flat, max(40, _LINE - len(indent))) or [""]
        label = names[name] + " " * (width - cell_len(names[name]) + 2)
        found += [label + wrapped[0], *(indent + line for line in wrapped[1:])]
    return "\n".join(line.rstrip() for line in found) + "\n"


def _bullets(heading: str, texts: Sequence[str]) -> list[str]:
    if not texts:
        return []
    return [heading, "\n".join(_wrapped(text, bullet="- ") for text in texts)]


def _wrapped(text: str, *, bullet: str = "") -> str:
    first, *others = textwrap.wrap(
        _escaped(text),
        _LINE,
        initial_indent=bullet,
        subsequent_indent=" " * len(bullet),
        break_on_hyphens=False,
        break_long_words=False,
    ) or [bullet]
    return "\n".join([first, *(_LINE_START.sub(r"\1\\\2", line) for line in others)])


def _fenced(text: str, language: str) -> str:
    """A block of code; its fence is longer than any in the text."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}{fence}"


def _escaped(text: Any) -> str:
    """Text on one line that Markdown shows as it is, with no more backslashes than that takes."""
    return _SIGNS.sub(r"\\\g<0>", _plain(" ".join(str(text).split())))


_SIGNS = re.compile(
    r"[\\`*<|$]"  # wherever they stand
    r"|\](?=[(\[])"  # of a link
    r"|(?<!\w)_|_(?!\w)"  # emphasis, which is none within a word
    r"|~(?=~)|&(?=#?\w+;)"
)
_LINE_START = re.compile(r"^(\s*\d*)([-+#>.)])(?=\s)")  # would begin a list, a heading, a quote


def _plain(text: str) -> str:
    """Without control characters and without signs that turn the direction of a line."""
    return "".join(c if c.isprintable() or c in _JOINERS or c.isspace() else "?" for c in text)

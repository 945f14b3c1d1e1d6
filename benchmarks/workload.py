"""The steps that every contestant does, and what they count.

A step's tokens are the real tokens of its rows, pads left out. They are counted here, for
everybody; what a worker says it saw is only held against them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.process import BenchmarkError
from benchmarks.protocol import Answer, Row, write_rows
from lorikeet.config import DataConfig
from lorikeet.data import prepare
from lorikeet.model import load_tokenizer


@dataclass(frozen=True)
class StepSize:
    """A step in numbers: the tokens of each document, and how many of all are supervised."""

    lengths: tuple[int, ...]
    supervised: int

    @property
    def tokens(self) -> int:
        """Real tokens."""
        return sum(self.lengths)


@dataclass(frozen=True)
class Workload:
    """Rows for a number of steps.

    Attributes:
        name: what the tables call it.
        about: what a step is, for the reader of a table.
        rows: of all steps, in the order in which everybody visits them.
        step_examples: rows of a step.
        micro_examples: rows of a padded micro-batch, for those that pad.
    """

    name: str
    about: str
    rows: list[Row]
    step_examples: int
    micro_examples: int

    @property
    def sizes(self) -> list[StepSize]:
        """Every step in numbers."""
        return [
            StepSize(tuple(len(row.ids) for row in step), sum(sum(row.supervised) for row in step))
            for step in self._steps()
        ]

    def _steps(self) -> Iterator[list[Row]]:
        for first in range(0, len(self.rows), self.step_examples):
            yield self.rows[first : first + self.step_examples]

    def write(self, path: Path) -> None:
        """Write the rows for the workers."""
        write_rows(self.rows, path)


def dolly(
    data: Path, model: Path, *, steps: int, micro_examples: int = 2, limit: int = 1500
) -> Workload:
    """Real rows of uneven length, rendered once by Lorikeet: 8 a step, completions supervised.

    Args:
        data: databricks-dolly-15k as jsonl, or any file that Lorikeet reads.
        model: folder whose tokenizer and template render them.
        steps: optimizer steps.
        micro_examples: rows of a padded micro-batch; a divisor of 8.
        limit: rows of the file that are read.

    Raises:
        BenchmarkError: there is no such file or too few rows in it, or 8 cannot be divided so.
    """
    if 8 % micro_examples:
        raise BenchmarkError(f"8 rows cannot be divided into micro-batches of {micro_examples}")
    if not data.is_file():
        raise BenchmarkError(f"there is no data file {data}; name one with --data")
    config = DataConfig(path=str(data), limit=limit, max_length=512, validation=0.0)
    examples = prepare(config, load_tokenizer(model), seed=0).train[: 8 * steps]
    if len(examples) < 8 * steps:
        raise BenchmarkError(
            f"{limit} rows of {data} are enough for {len(examples) // 8} steps, not for {steps}"
        )
    rows = [Row(list(example.ids), [int(x) for x in example.supervised]) for example in examples]
    return Workload("dolly", "8 rows of Dolly, completions supervised", rows, 8, micro_examples)


def dense(vocabulary: int, *, steps: int, examples: int = 2, length: int = 512) -> Workload:
    """Random tokens without gaps: every token supervised but a row's first, one micro-batch.

    Args:
        vocabulary: ids run from 0 to this, exclusive.
        steps: optimizer steps.
        examples: rows of a step.
        length: tokens of a row.
    """
    generator = random.Random(0)
    supervised = [0] + [1] * (length - 1)
    rows = [
        Row([generator.randrange(vocabulary) for _ in range(length)], supervised)
        for _ in range(steps * examples)
    ]
    about = f"{examples} x {length} random tokens, all supervised"
    return Workload("dense", about, rows, examples, examples)


def check_tokens(name: str, answer: Answer, size: StepSize) -> None:
    """Hold what a worker saw against the workload.

    Raises:
        BenchmarkError: it did another step than the others.
    """
    seen, expected = (answer.tokens, answer.supervised), (size.tokens, size.supervised)
    if seen != expected:
        raise BenchmarkError(
            f"{name} saw {seen[0]} tokens, {seen[1]} of them supervised, in step {answer.step};"
            f" the workload has {expected[0]} and {expected[1]}"
        )

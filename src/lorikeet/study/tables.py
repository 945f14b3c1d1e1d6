"""The tables of a study: cells as they are shown, whatever they are shown on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lorikeet.study import figures
from lorikeet.study.outcomes import Outcome, Spread, names
from lorikeet.study.record import SEED, Study, Trial, short, shown

_OWN_COLUMN = {SEED, "train.method", "train.learning_rate"}


@dataclass(frozen=True)
class Column:
    """A column's heading, and whether it holds figures, which are aligned to the right."""

    title: str
    figures: bool = True


@dataclass(frozen=True)
class Cell:
    """What is shown, and the number that it is sorted by; None for the text itself."""

    text: str
    value: float | None = None


@dataclass(frozen=True)
class Table:
    """Columns and rows of cells."""

    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]


def results(study: Study, outcomes: Sequence[Outcome]) -> Table:
    """A row for the base and each group: what was trained, and what the test rows say."""
    varied = [option for option in study.varied if option not in _OWN_COLUMN]
    columns = [Column("method", figures=False)]
    columns += [Column(short(option), figures=_all_numbers(study, option)) for option in varied]
    columns += map(Column, ("seeds", "perplexity [95 %]", "difference to base [95 %]"))
    forgetting = any(outcome.other is not None for outcome in outcomes)
    if forgetting:
        other = study.other_name or "second text"
        columns += map(Column, (f"{other}: perplexity", "forgotten [95 %]"))
    validated = any(outcome.validation is not None for outcome in outcomes)
    titles = ["test nll", *(["validation nll"] if validated else [])]
    columns += map(Column, (*titles, "trained", "share", "saved", "learning rate"))
    rows = []
    for outcome in outcomes:
        row = [Cell(outcome.method), *(_setting(outcome, option) for option in varied)]
        row += _of_tests(outcome)
        row += _of_other(outcome) if forgetting else []
        row += _of_losses(outcome)[: len(titles)]
        rows.append([*row, *_of_training(outcome)])
    return Table(columns, rows)


def in_short(outcomes: Sequence[Outcome]) -> Table:
    """The same for a terminal of 80 characters."""
    columns = [Column("group", figures=False)]
    columns += [Column(title) for title in ("seeds", "perplexity [95 %]", "vs base")]
    forgetting = any(outcome.other is not None for outcome in outcomes)
    if forgetting:
        columns.append(Column("forgotten"))
    rows, called = [], names(outcomes)
    for outcome in outcomes:
        row = [called[outcome.label], figures.whole_numbers(outcome.seeds)]
        row.append(figures.perplexity_of(outcome.test))
        row.append(figures.difference_in_short(outcome.difference))
        if forgetting:
            gap = outcome.other_difference
            row.append(f"{gap.nll:+.3f}" if gap else figures.NONE)
        rows.append([Cell(text) for text in row])
    return Table(columns, rows)


def costs(outcomes: Sequence[Outcome]) -> Table:
    """What each group took on this machine: the median over seeds, and least and greatest."""
    titles = ["seconds a step", "seconds in steps", "tokens/s", "peak memory"]
    columns = [Column("group", figures=False), Column("seeds"), Column("steps")]
    columns += map(Column, titles)
    rows, called = [], names(outcomes)
    for outcome in outcomes:
        if outcome.is_base:
            continue
        measures = ("seconds_per_step", "seconds", "tokens_per_second", "peak_memory")
        shown_as = (figures.three_digits,) * 3 + (figures.size,)
        cells = [
            _spread(outcome.spread(name), how) for name, how in zip(measures, shown_as, strict=True)
        ]
        steps = sorted({trial.steps for trial in outcome.trials})
        rows.append(
            [
                Cell(called[outcome.label]),
                Cell(figures.whole_numbers(outcome.seeds)),
                _between(steps),
                *cells,
            ]
        )
    return Table(columns, rows)


def learning_rates(study: Study) -> Table:
    """Every learning rate that was tried, the methods side by side; the picked ones marked."""
    methods = list(dict.fromkeys(candidate.method for candidate in study.candidates))
    rates = sorted({candidate.learning_rate for candidate in study.candidates})
    found = {(c.method, c.learning_rate): c for c in study.candidates}
    rows = []
    for rate in rates:
        row = [Cell(figures.rate(rate), rate)]
        for method in methods:
            candidate = found.get((method, rate))
            if candidate is None:
                row.append(Cell("", math.inf))
            elif candidate.nll is None:
                row.append(Cell("failed", math.inf))
            else:
                mark = " (picked)" if candidate.picked else ""
                row.append(Cell(figures.nats(candidate.nll) + mark, candidate.nll))
        rows.append(row)
    return Table([Column("learning rate"), *map(Column, methods)], rows)


def last_line(trial: Trial) -> str:
    """The line of a trial's error that says what went wrong."""
    lines = [line for line in (trial.error or "").splitlines() if line.strip()]
    return lines[-1].strip().removeprefix("- ") if lines else "no message"


def _setting(outcome: Outcome, option: str) -> Cell:
    if option not in outcome.settings:
        return Cell(figures.NONE)
    value = outcome.settings[option]
    return Cell(shown(value), float(value) if figures.is_number(value) else None)


def _of_tests(outcome: Outcome) -> list[Cell]:
    test, gap = outcome.test, outcome.difference
    return [
        Cell(figures.whole_numbers(outcome.seeds), float(len(outcome.seeds))),
        Cell(figures.perplexity_of(test), test.perplexity),
        Cell(figures.difference_of(gap), gap.nll if gap else 0.0),
    ]


def _of_other(outcome: Outcome) -> list[Cell]:
    other, gap = outcome.other, outcome.other_difference
    if other is None:
        return [Cell(figures.NONE)] * 2
    return [
        Cell(figures.perplexity(other.perplexity), other.perplexity),
        Cell(figures.difference_of(gap), gap.nll if gap else 0.0),
    ]


def _of_losses(outcome: Outcome) -> list[Cell]:
    losses = (outcome.test.nll, outcome.validation)
    return [Cell(figures.nats(loss), loss) for loss in losses]


def _of_training(outcome: Outcome) -> list[Cell]:
    if outcome.is_base:
        return [Cell(figures.NONE, 0.0)] * 4
    share, rates = outcome.trainable_share, outcome.learning_rates
    return [
        Cell(f"{outcome.trainable:,}", float(outcome.trainable)),
        Cell(f"{100 * share:.{2 if share > 0.001 else 4}f} %", share),
        Cell(figures.size(outcome.saved_bytes), float(outcome.saved_bytes)),
        Cell(", ".join(map(figures.rate, rates)) or figures.NONE, rates[0] if rates else None),
    ]


def _spread(found: Spread | None, how: Any) -> Cell:
    if found is None:
        return Cell(figures.NONE)
    middle, ends = how(found.median), (how(found.least), how(found.greatest))
    text = middle if ends[0] == ends[1] else f"{middle} ({ends[0]} to {ends[1]})"
    return Cell(text, found.median)


def _between(numbers: Sequence[int]) -> Cell:
    text = f"{numbers[0]:,}" if len(numbers) == 1 else f"{numbers[0]:,} to {numbers[-1]:,}"
    return Cell(text, float(numbers[0]))


def _all_numbers(study: Study, option: str) -> bool:
    return all(map(figures.is_number, study.varied[option]))

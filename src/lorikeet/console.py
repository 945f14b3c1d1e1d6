"""What a person sees: progress, tables and notes on stderr; results on stdout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from lorikeet.errors import LorikeetError

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def note(message: str) -> None:
    """Say something that the user should know, on stderr."""
    err.print(message, markup=False)


def warn(message: str) -> None:
    """Say, on stderr, that something is probably not what the user wants."""
    err.print(f"warning: {message}", style="yellow", markup=False)


def fail(error: LorikeetError) -> None:
    """Show an error that is not ours to explain with a traceback."""
    err.print(f"error: {error}", style="bold red", markup=False)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    """A table whose first column is text and whose others are figures."""
    made = Table(title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        made.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        made.add_row(*(str(cell) for cell in row))
    return made


def progress_bar(label: str, total: int) -> Progress:
    """A bar on stderr with one task, whose field `status` is the text at its end.

    Without a terminal the bar shows nothing while it runs.
    """
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}"),
        TimeRemainingColumn(),
        console=err,
        disable=not err.is_terminal,
    )
    bar.add_task(label, total=total, status="")
    return bar


def show_sample(prompt: str, answers: Mapping[str, str]) -> None:
    """Print a prompt with one line for each answer."""
    out.print(f"\n{prompt}", style="bold", markup=False)
    width = max(map(len, answers))
    for name, text in answers.items():
        out.print(f"  {name:{width}}  {text}", markup=False)

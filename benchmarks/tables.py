"""Results as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.summary import Deviation, Spread, Summary
from benchmarks.workload import Workload

Facts = Mapping[str, Mapping[str, Any]]


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are figures."""
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    rule = ["-" * width if not i else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    lines = []
    for cells in (columns, rule, *rows):
        padded = [
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        lines.append(f"| {' | '.join(padded)} |")
    return "\n".join(lines)


def speed_table(workload: Workload, summary: Summary, facts: Facts) -> str:
    """Medians of the rounds, quartiles in brackets, and the extremes of the ratio.

    Args:
        workload: what was run.
        summary: its figures.
        facts: what each worker said of itself.
    """
    reference = summary.reference
    rows = [
        [
            name,
            _spread(line.tokens_per_second, ".0f"),
            _seconds(line.seconds.median),
            _spread(line.reference_is_faster, ".2f") if name != reference else "1",
            _extremes(line.reference_is_faster) if name != reference else "",
            f"{line.share_of_roofline.median:.0%}",
            f"{line.first_loss:.3f}",
        ]
        for name, line in summary.figures.items()
    ]
    columns = [
        "contestant",
        "tokens/s",
        "s a step",
        f"{reference} is N times as fast",
        "extremes",
        "of roofline",
        "first loss",
    ]
    rooflines = ", ".join(
        f"{spread.median:.0f} tokens/s for {method}" for method, spread in summary.roofline.items()
    )
    lines = [
        f"### {workload.name}: {workload.about}",
        "",
        markdown(columns, rows),
        "",
        f"{_count(summary.figures[reference].seconds.count, 'round')},"
        f" {summary.tokens:.0f} tokens a step, {summary.supervised:.0f} of them supervised."
        f" The model's products alone: {_spread(summary.gemm_rate, '.0f', 1e-9)} GFLOP/s;"
        f" at this rate the roofline is {rooflines}.",
        *(f"\n**Doubtful:** {warning}." for warning in summary.warnings),
    ]
    return "\n".join(lines) + _paths(facts)


def memory_table(
    workload: Workload, peaks: Mapping[str, int], loaded: Mapping[str, int], *, device: str
) -> str:
    """Peaks in GiB, and those of the others divided by the first's.

    Args:
        workload: what was run.
        peaks: by contestant, in bytes: of the process on a CPU, of the steps on a GPU.
        loaded: those of loading.
        device: cpu or cuda.
    """
    reference, least = next(iter(peaks.items()))
    rows = [
        [name, f"{peak / 2**30:.2f}", f"{loaded[name] / 2**30:.2f}", f"{peak / least:.2f}"]
        for name, peak in peaks.items()
    ]
    parts = {
        "cpu": ["peak, GiB", "of it to load, GiB"],
        "cuda": ["peak of the steps, GiB", "peak of loading, GiB"],
    }
    columns = ["contestant", *parts[device], f"times {reference}"]
    head = f"### Peak memory, {workload.about}, {_count(len(workload.sizes), 'step')}, each alone"
    return f"{head}\n\n{markdown(columns, rows)}"


def scaling_table(cells: Sequence[Mapping[str, Any]]) -> str:
    """A line for each cell."""
    rows = [
        [
            f"{cell['axis']} {cell['value']}",
            _optional(cell["tokens_per_second"], ".0f"),
            _optional(cell["peak_bytes"], ".2f", 2**-30),
            _optional(cell["prepare_seconds"], ".1f"),
            str(cell["steps"]),
            cell["about"],
        ]
        for cell in cells
    ]
    columns = ["varied", "tokens/s", "peak, GiB", "preparing data, s", "timed steps", "a step"]
    return f"### Scaling of Lorikeet\n\n{markdown(columns, rows)}"


def parity_table(
    curve: Sequence[float], reference: str, found: Mapping[str, Deviation], facts: Facts
) -> str:
    """How far the curves of loss are from the first one.

    Args:
        curve: the loss of the reference in each step.
        reference: its name.
        found: how far the others are from it.
        facts: what each worker said of itself.
    """
    rows = [
        [name, f"{deviation.largest:.3%}", str(deviation.step + 1), f"{deviation.mean:+.4%}"]
        for name, deviation in found.items()
    ]
    columns = [f"beside {reference}", "largest of a step", "in step", "of the curve's mean"]
    head = (
        f"### Parity: relative deviation of the loss over {len(curve)} steps,"
        f" in which it went from {curve[0]:.3f} to {curve[-1]:.3f}"
    )
    return f"{head}\n\n{markdown(columns, rows)}{_paths(facts)}"


def _paths(facts: Facts) -> str:
    """Which way Lorikeet's settings went: two that went the same way are no comparison."""
    taken = [f"{name}: {found['path']}" for name, found in facts.items() if "path" in found]
    return f"\n\n{'; '.join(taken)}." if taken else ""


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def _spread(spread: Spread, form: str, scale: float = 1.0) -> str:
    q1, median, q3 = (f"{scale * x:{form}}" for x in (spread.q1, spread.median, spread.q3))
    return f"{median} [{q1}, {q3}]"


def _seconds(seconds: float) -> str:
    """Steps on a GPU take milliseconds."""
    return f"{seconds:.2f}" if seconds >= 0.1 else f"{seconds:.4f}"


def _extremes(spread: Spread) -> str:
    return f"{spread.low:.2f} to {spread.high:.2f}"


def _optional(value: float | None, form: str, scale: float = 1.0) -> str:
    return "" if value is None else f"{scale * value:{form}}"

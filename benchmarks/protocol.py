"""What orchestrator and workers agree on: the job, the rows and the conversation.

Standard library only: the peers' environment has no Lorikeet. One line a message:

    worker        {"threads": 2, "versions": {...}}     once, when everything is loaded
    worker        ready                                 it is blocked and costs nothing
    orchestrator  go
    worker        {"step": 0, "seconds": 4.2, ...}      an `Answer`
    worker        ready
    ...

A worker ends after its last step, or when its input ends.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

READY = "ready"
GO = "go"


class Row(NamedTuple):
    """An example: token ids and, of the same length, 1 where predicting the token counts."""

    ids: list[int]
    supervised: list[int]


@dataclass(frozen=True)
class Job:
    """What a worker is to do.

    Attributes:
        model: folder with weights and tokenizer.
        rows: jsonl file with the rows of all steps, in order.
        steps: optimizer steps.
        step_examples: rows of an optimizer step.
        micro_examples: rows of a padded micro-batch, for those that pad.
        device: cpu or cuda: where the model is and the batches go.
        dtype: bf16 or fp32, for those that are not left at their own default.
        r: rank of LoRA; alpha is the same.
        settings: the contestant's own, see `contestants.py`.
    """

    model: str
    rows: str
    steps: int
    step_examples: int
    micro_examples: int
    device: str = "cpu"
    dtype: str = "bf16"
    r: int = 16
    settings: dict[str, Any] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Write the job as JSON."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @staticmethod
    def read(path: str | Path) -> Job:
        """Read what `write` wrote."""
        return Job(**json.loads(Path(path).read_text(encoding="utf-8")))

    def step_rows(self) -> Iterator[list[Row]]:
        """The rows of each step."""
        rows = read_rows(self.rows)
        for step in range(self.steps):
            yield rows[step * self.step_examples : (step + 1) * self.step_examples]


@dataclass(frozen=True)
class Answer:
    """What a worker says about a step.

    Attributes:
        step: counted from 0.
        seconds: forward, backward and optimizer, from `go` on.
        loss: nats per supervised token; None from a worker that trains nothing.
        tokens: real tokens it saw, to be checked against the workload's own count.
        supervised: supervised tokens it saw.
        peak_bytes: on a CPU the most memory its process has held so far; on a GPU the most that its
            tensors have taken since everything was loaded.
    """

    step: int
    seconds: float
    loss: float | None
    tokens: int
    supervised: int
    peak_bytes: int


def write_rows(rows: Sequence[Row], path: Path) -> None:
    """Write rows as jsonl."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row._asdict()) + "\n" for row in rows)


def read_rows(path: str | Path) -> list[Row]:
    """Read what `write_rows` wrote."""
    with Path(path).open(encoding="utf-8") as lines:
        return [Row(**json.loads(line)) for line in lines]


def peak_bytes() -> int:
    """The most memory this process has held, in bytes; 0 where the system does not tell.

    Linux: VmHWM. `ru_maxrss` would be wrong there: a child starts with that of the process that
    started it, so that a small worker of a large orchestrator would report the orchestrator.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return 1024 * next(
            int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")
        )
    except OSError:
        pass
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def _nothing() -> None:
    """A CPU is done when a call returns, and its peak cannot be forgotten everywhere."""


@dataclass(frozen=True)
class Meter:
    """How time and memory are read, which depends on the device; as it is, for a CPU.

    Attributes:
        settle: returns when all that the device was asked to do is done.
        restart: counts the peak from now on, where that can be.
        peak_bytes: the peak so far.
    """

    settle: Callable[[], None] = _nothing
    restart: Callable[[], None] = _nothing
    peak_bytes: Callable[[], int] = peak_bytes


class Channel:
    """The worker's end. It takes stdout for itself: what libraries print goes to stderr."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._lines = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
        os.dup2(2, 1)
        sys.stdout = sys.stderr
        self._step = 0
        self._started = self._seconds = 0.0

    def hello(self, *, threads: int, device: str, packages: Sequence[str], **facts: Any) -> None:
        """Say what runs here and where, once, when everything is loaded."""
        self._meter.settle()
        found = {
            "threads": threads,
            "device": device,
            "versions": {name: version(name) for name in packages},
            "peak_bytes": self._meter.peak_bytes(),
            **facts,
        }
        self._meter.restart()
        self._say(json.dumps(found))

    def wait(self) -> None:
        """Block until it is this worker's turn; then the clock of a step starts."""
        self._say(READY)
        if sys.stdin.readline().strip() != GO:
            raise SystemExit(0)
        self._meter.settle()
        self._started = perf_counter()

    def stop(self) -> None:
        """The step was asked for: the clock stops as soon as the device has done it."""
        self._meter.settle()
        self._seconds = perf_counter() - self._started

    def answer(self, *, loss: float | None, tokens: int, supervised: int) -> None:
        """Tell about the step that `stop` ended."""
        peak = self._meter.peak_bytes()
        found = Answer(self._step, self._seconds, loss, tokens, supervised, peak)
        self._say(json.dumps(asdict(found)))
        self._step += 1

    def _say(self, line: str) -> None:
        self._lines.write(line + "\n")

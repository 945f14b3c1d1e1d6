"""What a person sees while a run trains."""

from __future__ import annotations

from collections import deque
from types import TracebackType
from typing import Any

from lorikeet import console

_WINDOW = 20  # steps that the shown loss and speed are averaged over


class StepProgress:
    """A bar with loss, tokens per second and time left; without a terminal, a line now and then.

    Called with every line of the metrics.

    Args:
        label: what is being done.
        total: optimizer steps of the whole run.
        done: steps that an earlier process did.
    """

    def __init__(self, label: str, total: int, *, done: int = 0) -> None:
        self.label, self.total = label, total
        self._recent: deque[dict[str, Any]] = deque(maxlen=_WINDOW)
        self._validation = ""
        self._bar = console.progress_bar(label, total)
        self._task = self._bar.tasks[0].id
        self._bar.update(self._task, completed=done)

    def __enter__(self) -> StepProgress:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def __call__(self, line: dict[str, Any]) -> None:
        """Show a line of the metrics."""
        if "eval_nll" in line:
            self._validation = f"  validation {line['eval_nll']:.4f}"
            if not console.err.is_terminal:
                console.note(f"{self.label} {line['step']}/{self.total}{self._validation}")
            return
        self._recent.append(line)
        status = self._status()
        self._bar.update(self._task, completed=line["step"], status=status)
        if not console.err.is_terminal and self._worth_a_line(line["step"]):
            console.note(f"{self.label} {line['step']}/{self.total}  {status}")

    def _worth_a_line(self, step: int) -> bool:
        return step in (1, self.total) or step % max(1, self.total // 10) == 0

    def _status(self) -> str:
        loss = sum(line["loss"] for line in self._recent) / len(self._recent)
        seconds = sum(line["seconds"] for line in self._recent)
        speed = sum(line["tokens"] for line in self._recent) / seconds
        return f"loss {loss:.4f}  {speed:,.0f} tokens/s{self._validation}"

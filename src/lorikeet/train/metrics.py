"""The run's measurements: `metrics.jsonl`, and TensorBoard on request."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lorikeet.errors import ConfigError
from lorikeet.files import disk_errors, write_text


class MetricsLog:
    """Appends one JSON object a line; every line is on disk before the next step.

    Args:
        path: the file.
        resume_step: keep the lines up to this step and drop what a killed run wrote after it.
    """

    def __init__(self, path: Path, *, resume_step: int = 0) -> None:
        self.path = path
        kept = [line for line in read_metrics(path) if line["step"] <= resume_step]
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))

    def __call__(self, line: dict[str, Any]) -> None:
        """Append a line.

        Raises:
            StorageError: the disk refused the write.
        """
        with disk_errors(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every complete line of a metrics file; a half-written last line is left out."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if text.endswith("\n"):
            lines.append(json.loads(text))
    return lines


class TensorBoard:
    """Writes the figures of every line as scalars.

    Args:
        folder: where the event files go.

    Raises:
        ConfigError: the package `tensorboard` is not installed.
    """

    def __init__(self, folder: Path, *, resume_step: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ConfigError(
                "train.tensorboard needs TensorBoard: pip install 'lorikeet[tensorboard]'"
            ) from None
        self._writer = SummaryWriter(str(folder), purge_step=resume_step + 1)

    def __call__(self, line: dict[str, Any]) -> None:
        """Write a line's figures."""
        for name, value in line.items():
            if name != "step":
                self._writer.add_scalar(name, value, line["step"])
        self._writer.flush()

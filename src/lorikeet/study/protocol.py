"""What the trials of a study share, and where they leave what they found."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lorikeet.config import RunConfig
from lorikeet.files import write_json
from lorikeet.study.record import Trial


@dataclass(frozen=True)
class Planned:
    """A trial that is to be done.

    Attributes:
        name: unique in the study, and good for a folder's name.
        method: what tables call its method.
        config: every option of its run; `out` is set when it is done.
        settings: the options that the study varies and their values here.
    """

    name: str
    method: str
    config: RunConfig
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Protocol:
    """What all trials of a study share: the base, the held-out rows, the questions.

    Attributes:
        kind: compare or sweep.
        config: the options in common. Its `data` says what is held out, its `train.seed` how; no
            trial changes either.
        other: a second text, which shows what was forgotten; None for none.
        keep_models: keep the weights of full fine-tuning, not only their size.
    """

    kind: Literal["compare", "sweep"]
    config: RunConfig
    other: str | None = None
    keep_models: bool = False

    @property
    def halves(self) -> bool:
        """Whether some of the held-out rows serve choices alone, and results come from the rest."""
        return self.kind == "compare"


class StudyFolder:
    """Paths of a study's folder.

    Args:
        path: the folder; it need not exist yet.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.plan = self.path / "study.yaml"
        self.inputs = self.path / "inputs.json"
        self.runs = self.path / "runs"
        self.trials = self.path / "trials"
        self.metrics = self.path / "metrics.json"

    def run(self, name: str) -> Path:
        """The run folder of a trial."""
        return self.runs / name

    def trial(self, name: str) -> Trial | None:
        """What is known of a trial: it came to its end, or failed; None if neither."""
        path = self._trial(name)
        if not path.is_file():
            return None
        return Trial.from_json(json.loads(path.read_text(encoding="utf-8")))

    def done(self, name: str) -> Trial | None:
        """A trial that came to its end."""
        trial = self.trial(name)
        return trial if trial and trial.error is None else None

    def keep(self, trial: Trial) -> None:
        """Write down what a trial found.

        Raises:
            StorageError: the disk refused.
        """
        write_json(self._trial(trial.name), trial.to_json())

    def _trial(self, name: str) -> Path:
        return self.trials / f"{name}.json"

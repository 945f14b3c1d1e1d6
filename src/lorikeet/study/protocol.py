"""What the trials of a study share, and the folder where they leave what they found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lorikeet.config import RunConfig
from lorikeet.errors import ConfigError, InputError
from lorikeet.files import only_here, remove_drafts, write_json, write_text
from lorikeet.study.record import Question, Trial


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
        self.logs = self.path / "logs"
        self.metrics = self.path / "metrics.json"

    @contextmanager
    def working(self, plan: str) -> Iterator[None]:
        """Within the block the folder is this study's, and no other process works in it.

        Args:
            plan: what is to be done, as YAML; equal for the same study, which then goes on.

        Raises:
            ConfigError: the folder holds another study, or something else.
            StorageError: another process works in it, or the disk refused.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"--out {self.path} is a file; give a folder")
        with only_here(self.path):
            self._claim(plan)
            try:
                yield
            except InputError:
                if not self.inputs.is_file():  # nothing was begun, so another study can be tried
                    self.plan.unlink(missing_ok=True)
                    shutil.rmtree(self.logs, ignore_errors=True)
                raise

    def _claim(self, plan: str) -> None:
        if self.plan.is_file():
            if self.plan.read_text(encoding="utf-8") != plan:
                raise ConfigError(
                    f"{self.path} holds another study ({self.plan} tells which); run the same one"
                    " again to go on with it, or choose another --out"
                )
        elif any(not p.name.startswith(".") for p in self.path.iterdir()):
            raise ConfigError(f"{self.path} is not empty and holds no study; choose another --out")
        remove_drafts(self.path)
        write_text(self.plan, plan)

    def stand_on(
        self, inputs: Mapping[str, Any], asked: Sequence[Question], warnings: Sequence[str] = ()
    ) -> None:
        """Remember which data and weights the study stands on, what it asks, and what is odd.

        Raises:
            ConfigError: it was begun on others.
        """
        if self.inputs.is_file():
            before = json.loads(self.inputs.read_text(encoding="utf-8"))
            changed = [key for key, value in inputs.items() if before.get(key) != value]
            if changed:
                raise ConfigError(
                    f"the study in {self.path} was begun on something else under the same names;"
                    " put it back to go on, or start anew in another --out. Changed:",
                    changed,
                )
        questions = [{"prompt": q.prompt, "reference": q.reference} for q in asked]
        remembered = {**inputs, "questions": questions, "warnings": list(warnings)}
        write_json(self.inputs, remembered)

    def stood_on(self) -> tuple[dict[str, Any], list[Question], list[str]]:
        """What `stand_on` remembered: inputs, questions, warnings; empty before."""
        if not self.inputs.is_file():
            return {}, [], []
        found = json.loads(self.inputs.read_text(encoding="utf-8"))
        asked = [Question(**question) for question in found.pop("questions")]
        return found, asked, found.pop("warnings", [])

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

"""What a finished run hands to those who print or compare it."""

from __future__ import annotations

from dataclasses import dataclass

from lorikeet.evaluate import Sample, Score
from lorikeet.lora import ParameterReport
from lorikeet.study.folder import RunFolder
from lorikeet.train import TrainState


@dataclass(frozen=True)
class RunResult:
    """A finished run.

    Attributes:
        folder: where everything lies.
        parameters: trainable and base parameters.
        state: the last training state.
        base: the base model on the validation rows; None without such rows.
        tuned: the trained model on the same rows.
        samples: answers of both, side by side.
        seconds: time spent in optimizer steps, before a resume included.
        seen_base: the base model on some of the rows that were trained on; None without
            validation rows.
        seen_tuned: the trained model on the same rows.
    """

    folder: RunFolder
    parameters: ParameterReport
    state: TrainState
    base: Score | None
    tuned: Score | None
    samples: list[Sample]
    seconds: float
    seen_base: Score | None = None
    seen_tuned: Score | None = None

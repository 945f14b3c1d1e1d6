"""Learning rate as a pure function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then cosine or linear decay to zero, or a constant.

    Attributes:
        peak: learning rate at the end of the warm-up.
        total_steps: optimizer steps of the whole run.
        kind: `cosine`, `linear` or `constant`.
        warmup: a share of all steps if below 1, else a number of steps.
    """

    peak: float
    total_steps: int
    kind: str = "cosine"
    warmup: float = 0.0

    @property
    def warmup_steps(self) -> int:
        """Steps of the linear warm-up."""
        return round(self.warmup * self.total_steps) if self.warmup < 1 else int(self.warmup)

    def __call__(self, step: int) -> float:
        """The learning rate of step 0, 1, ...; even the first of a warm-up is above zero."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / (self.warmup_steps + 1)
        if self.kind == "constant":
            return self.peak
        done = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        if self.kind == "linear":
            return self.peak * (1 - done)
        return self.peak * 0.5 * (1 + math.cos(math.pi * done))

"""Whole runs and what they show."""

from lorikeet.study.folder import RunFolder
from lorikeet.study.run import RunResult, train_run

__all__ = ["RunFolder", "RunResult", "train_run"]

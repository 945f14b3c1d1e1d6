"""Whole runs and what they show."""

from lorikeet.study.folder import RunFolder
from lorikeet.study.result import RunResult
from lorikeet.study.run import train_run

__all__ = ["RunFolder", "RunResult", "train_run"]

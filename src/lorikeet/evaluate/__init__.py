"""Evaluation: one token-exact number with its uncertainty, and samples side by side."""

from lorikeet.evaluate.samples import Sample, answer, stop_ids
from lorikeet.evaluate.score import Difference, Score, evaluate, paired_difference, ratio_stderr

__all__ = [
    "Difference",
    "Sample",
    "Score",
    "answer",
    "evaluate",
    "paired_difference",
    "ratio_stderr",
    "stop_ids",
]

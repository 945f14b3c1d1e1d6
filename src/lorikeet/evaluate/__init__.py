"""Evaluation: one token-exact number with its uncertainty, and samples side by side."""

from lorikeet.evaluate.interval import Z95, student_t95
from lorikeet.evaluate.samples import Sample, answer, stop_ids
from lorikeet.evaluate.score import Difference, Score, evaluate, paired_difference

__all__ = [
    "Z95",
    "Difference",
    "Sample",
    "Score",
    "answer",
    "evaluate",
    "paired_difference",
    "stop_ids",
    "student_t95",
]

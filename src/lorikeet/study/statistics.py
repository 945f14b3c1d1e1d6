"""Intervals for what a group of trials scored, and for how far two groups lie apart.

Two things vary: the documents that happened to be scored, and the seeds that happened to be drawn.
Every document is scored under every seed, so the two are crossed. The method, chosen by simulation
(`tests/study/test_statistics.py` holds its coverage):

- The variance over documents, and how well it is known, is that of `evaluate.interval`, which
  every score has: the jackknife's, with degrees of freedom from the residuals' kurtosis.
- The variance of the seeds is what their means differ beyond what the documents x seeds
  interaction makes them differ (analysis of variance, two-way crossed random effects).
- The t quantile lies between the documents' and the seeds' by the share that the seeds have in the
  variance (Cochran and Cox, Experimental Designs, 1957, 4.14). Satterthwaite's degrees of freedom
  fall short where three seeds carry most of the variance: 92 % rather than 95 %.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lorikeet.evaluate import Score, student_t95
from lorikeet.evaluate.interval import over_documents, quotient, student_df95

_SEED_POWER = 1.5
"""Power of the seeds' share. Cochran and Cox have 1, which covers 97.8 % with three seeds whose
spread is that of the documents. With 1.5 three and five seeds stay within 93 to 97 %; two are at
92.5 % where they carry nearly all of the variance."""


@dataclass(frozen=True)
class Estimate:
    """Nats per token, or a difference of such, with its 95 % interval.

    The interval speaks of other documents and other seeds of the same kind. With a single seed it
    speaks of documents alone: how far another seed would move the figure cannot be seen.

    Attributes:
        nll: nats per token, the mean over seeds. A difference below zero is better than the base.
        low: lower end of the 95 % interval; None where there is none to be had: a single document,
            or a loss that is not finite.
        high: upper end.
        stderr: standard error.
        df: degrees of freedom of the Student's t whose quantile spans the interval.
        documents: how many were scored.
        seeds: how many there were, on the side with more; 1 says that seeds could not be seen.
    """

    nll: float
    low: float | None
    high: float | None
    stderr: float | None
    df: float | None
    documents: int
    seeds: int

    @property
    def perplexity(self) -> float:
        """exp(nll), the geometric mean over seeds; of a difference a ratio of perplexities."""
        return safe_exp(self.nll)

    @property
    def perplexity_interval(self) -> tuple[float, float] | None:
        """exp of both ends: a 95 % interval as well, for exp keeps order."""
        if self.low is None or self.high is None:
            return None
        return safe_exp(self.low), safe_exp(self.high)

    @property
    def distinguishable(self) -> bool:
        """Whether the interval leaves out zero; False where there is no interval."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high

    def summary(self) -> dict[str, Any]:
        """The figures as a JSON-ready dict; what is not finite is None."""
        ratio = self.perplexity_interval
        return {
            "nll": _finite(self.nll),
            "interval95": None if self.low is None else [self.low, self.high],
            "nll_stderr": self.stderr,
            "df": self.df,
            "documents": self.documents,
            "seeds": self.seeds,
            "perplexity": _finite(self.perplexity),
            "perplexity_interval95": ratio and [_finite(end) for end in ratio],
        }

    def __str__(self) -> str:
        if self.low is None:
            return f"{self.nll:.4f} nats/token"
        return f"{self.nll:.4f} nats/token, 95 % interval [{self.low:.4f}, {self.high:.4f}]"


def estimate(scores: Sequence[Score]) -> Estimate:
    """Mean NLL per token of a group of trials that differ in their seed.

    With one score the interval is that of the documents: it cannot know how far another seed would
    move the figure, and is too narrow for a statement about the method rather than the trial.

    Args:
        scores: the same documents under each of the group's seeds; one or more.

    Raises:
        ValueError: no score, or scores of different documents.
    """
    tokens = _tokens(scores)
    return _estimate([_nats(scores)], tokens)


def difference(scores: Sequence[Score], base: Sequence[Score]) -> Estimate:
    """How far a group lies from another, paired document by document: `scores - base`.

    With as many scores on both sides, the sides are paired seed by seed too: give both in the order
    of the same seeds. A side with one score (the untrained base model) is the same for every seed
    of the other. With different numbers, more than one on both sides, documents stay paired and the
    seeds of either side count as drawn for themselves: their variances add, with the degrees of
    freedom of Welch (Biometrika 34, 1947).

    Raises:
        ValueError: no score, or scores of different documents.
    """
    tokens = _tokens([*scores, *base])
    ours, theirs = _nats(scores), _nats(base)
    if len(ours) == len(theirs) or 1 in (len(ours), len(theirs)):
        return _estimate([ours - theirs], tokens)
    return _estimate([ours, -theirs], tokens)


def _estimate(sides: Sequence[np.ndarray], tokens: np.ndarray) -> Estimate:
    """`sides` add up: [S, D] each, with a sign of their own; `tokens` [D]."""
    documents, seeds = len(tokens), max(len(side) for side in sides)
    if documents < 2 or not all(np.isfinite(side).all() for side in sides):
        nll = float(sum(side.sum() / len(side) for side in sides) / tokens.sum())
        return Estimate(nll, None, None, None, None, documents, seeds)
    nll, stderr, t = (float(value) for value in interval(sides, tokens))
    reach = t * stderr
    return Estimate(nll, nll - reach, nll + reach, stderr, student_df95(t), documents, seeds)


def interval(
    sides: Sequence[np.ndarray], tokens: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Figure, standard error and t quantile of one study or of many at once.

    Args:
        sides: float64 [..., S, D], nats of documents under seeds; what is estimated is the sum of
            the sides' means over seeds. One side's seeds have nothing to do with another's.
        tokens: [..., D], of the documents, two or more.

    Returns:
        nll, stderr and t, [...]: the 95 % interval is `nll -+ t * stderr`.
    """
    total = tokens.sum(-1)
    mean = np.add.reduce([side.mean(-2) for side in sides])
    nll = mean.sum(-1) / total
    by_documents, df = over_documents(mean - nll[..., None] * tokens, tokens)
    seeded = [(*_over_seeds(side, tokens), side.shape[-2] - 1) for side in sides]
    between = np.add.reduce([found for found, _, _ in seeded])
    crossed = np.add.reduce([found for _, found, _ in seeded])
    # The interaction is subtracted because the documents' variance has it already, and never more
    # than that has: the sum is no less than either source alone.
    variance = by_documents + np.maximum(between - np.minimum(crossed, by_documents), 0)
    t = _quantiles(df)
    if np.any(between > 0):
        doubt = np.add.reduce([found**2 / degrees for found, _, degrees in seeded if degrees])
        seeds_t = _quantiles(np.maximum(quotient(between**2, doubt, otherwise=1.0), 1.0))
        share = quotient(between, variance, otherwise=0.0) ** _SEED_POWER
        t = t + share * np.maximum(seeds_t - t, 0)
    return nll, np.sqrt(variance), t


def _over_seeds(side: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Variance of a side's mean over seeds, [...], and what of it the interaction makes."""
    seeds, n = side.shape[-2:]
    total = tokens.sum(-1)
    if seeds < 2:
        return np.zeros_like(total), np.zeros_like(total)
    level = side.sum(-1) / total[..., None]
    level = level - level.mean(-1, keepdims=True)
    crossed = side - side.mean(-2, keepdims=True) - level[..., None] * tokens[..., None, :]
    times = seeds * (seeds - 1)
    between = (level**2).sum(-1) / times
    return between, n / (n - 1) * (crossed**2).sum((-1, -2)) / total**2 / times


def _tokens(scores: Sequence[Score]) -> np.ndarray:
    if not scores:
        raise ValueError("no score to take a mean of")
    tokens = scores[0].tokens_per_document
    if not all(np.array_equal(score.tokens_per_document, tokens) for score in scores):
        raise ValueError("the scores are not of the same documents, so they cannot be paired")
    return tokens.astype(np.float64)


def _nats(scores: Sequence[Score]) -> np.ndarray:
    if not scores:
        raise ValueError("no score to take a mean of")
    return np.stack([score.nats for score in scores])


def _quantiles(df: np.ndarray) -> np.ndarray:
    """`student_t95` of many, each value once."""
    values, where = np.unique(np.round(df, 9), return_inverse=True)
    return np.array([student_t95(value) for value in values.tolist()])[where].reshape(np.shape(df))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def safe_exp(value: float) -> float:
    """exp(value); infinite where that does not fit into a float."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf

"""Token-exact evaluation: negative log-likelihood, perplexity, bits per byte, uncertainty.

Every figure comes from per-document sums of nats and counts of supervised tokens, so it depends on
neither batch size nor packing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from lorikeet.data.batch import micro_batches, pack
from lorikeet.data.example import Example
from lorikeet.errors import DataError
from lorikeet.evaluate.interval import ratio_error, student_t95
from lorikeet.model.loss import TokenNll, token_nll


@dataclass(frozen=True)
class Score:
    """What a model makes of a list of documents.

    Attributes:
        nats: float64 [D], negative log-likelihood of each document's supervised tokens.
        tokens_per_document: int64 [D].
        text_bytes: UTF-8 bytes of all supervised text.
    """

    nats: np.ndarray
    tokens_per_document: np.ndarray
    text_bytes: int

    @property
    def tokens(self) -> int:
        """Supervised tokens of all documents."""
        return int(self.tokens_per_document.sum())

    @property
    def nll(self) -> float:
        """Nats per supervised token, every token weighing the same."""
        return float(self.nats.sum()) / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(nll); infinite where that does not fit into a float."""
        try:
            return math.exp(self.nll)
        except OverflowError:
            return math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """Bits per UTF-8 byte of supervised text, comparable between tokenizers."""
        if self.text_bytes == 0:
            return None
        return float(self.nats.sum()) / math.log(2) / self.text_bytes

    @property
    def nll_stderr(self) -> float | None:
        """Standard error of `nll` over documents; None for a single one."""
        error = ratio_error(self.nats, self.tokens_per_document)
        return error and error[0]

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval of `nll`, by Student's t; None for a single document."""
        error = ratio_error(self.nats, self.tokens_per_document)
        return error and _interval(self.nll, *error)

    def summary(self) -> dict[str, Any]:
        """The figures as a JSON-ready dict."""
        return {
            "documents": len(self.nats),
            "tokens": self.tokens,
            "nll": self.nll,
            "nll_stderr": self.nll_stderr,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
        }


@dataclass(frozen=True)
class Difference:
    """A paired difference in nats per token, `score - base`: below zero is better.

    Attributes:
        nll: the difference.
        stderr: its standard error over documents; None for a single one, or a loss that is not
            finite.
        df: degrees of freedom of the Student's t whose quantile spans the interval; None likewise.
    """

    nll: float
    stderr: float | None
    df: float | None

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % confidence interval."""
        if self.stderr is None or self.df is None:
            return None
        return _interval(self.nll, self.stderr, self.df)

    def summary(self) -> dict[str, Any]:
        """The figures as a JSON-ready dict."""
        return {
            "nll": self.nll,
            "nll_stderr": self.stderr,
            "df": self.df,
            "interval95": self.interval,
        }

    def __str__(self) -> str:
        if self.interval is None:
            return f"{self.nll:+.4f} nats/token"
        low, high = self.interval
        return f"{self.nll:+.4f} nats/token, 95 % interval [{low:+.4f}, {high:+.4f}]"


def paired_difference(score: Score, base: Score) -> Difference:
    """Compare two models on the same documents, document by document.

    Raises:
        ValueError: the two scores are not of the same documents.
    """
    if not np.array_equal(score.tokens_per_document, base.tokens_per_document):
        raise ValueError("the two scores are not of the same documents, so they cannot be paired")
    gaps = score.nats - base.nats
    error = ratio_error(gaps, base.tokens_per_document)
    return Difference(float(gaps.sum()) / base.tokens, *(error or (None, None)))


def _interval(nll: float, stderr: float, df: float) -> tuple[float, float]:
    reach = student_t95(df) * stderr
    return nll - reach, nll + reach


def evaluate(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    max_tokens: int = 4096,
    packing: bool = True,
    nll: TokenNll = token_nll,
) -> Score:
    """Score a model on examples. Nothing is updated, dropout is off.

    Documents without a supervised token are left out.

    Args:
        model: the model, with or without an adapter.
        examples: rendered documents.
        max_tokens: tokens per packed micro-batch; changes memory and speed, not the figures.
        packing: whether the model keeps packed documents apart (`Base.packing`).
        nll: the model's loss function (`Base.nll`).

    Raises:
        DataError: no example has a supervised token.
    """
    counted = [example for example in examples if example.supervised_tokens]
    if not counted:
        raise DataError("nothing to evaluate: no example has a supervised token")
    device = next(model.parameters()).device
    nats = np.zeros(len(counted))
    was_training = model.training
    model.eval()
    try:
        for members in micro_batches(counted, max_tokens=max_tokens, packing=packing):
            batch = pack([counted[i] for i in members]).to(device)
            with torch.no_grad():
                losses = nll(model, batch).double()
            sums = torch.zeros(len(members), dtype=torch.float64, device=device)
            nats[members] = sums.index_add_(0, batch.documents, losses).cpu().numpy()
    finally:
        model.train(was_training)
    return Score(
        nats=nats,
        tokens_per_document=np.array([example.supervised_tokens for example in counted]),
        text_bytes=sum(example.text_bytes for example in counted),
    )

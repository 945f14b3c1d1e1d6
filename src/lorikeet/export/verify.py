"""Whether two ways of running a model are one model: likelihoods, distributions, continuations.

Shapes: S supervised tokens of an example, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lorikeet.data import Example, pack
from lorikeet.errors import DataError, ModelError
from lorikeet.evaluate import Difference, Score, paired_difference
from lorikeet.export.tolerance import Tolerance
from lorikeet.generate import generate

_ROWS = 128  # distributions compared at a time, in float64
_PROMPTS = 16  # continued at a time


@dataclass(frozen=True, slots=True)
class Way:
    """A way of running a model.

    Attributes:
        name: for messages and tables: `base + adapter`, `merged`.
        logits: an example to the logits that predict its supervised tokens, [S, V].
        continuations: prompts to their greedy continuations, without the token that ends one.
    """

    name: str
    logits: Callable[[Example], Tensor]
    continuations: Callable[[Sequence[Sequence[int]]], list[list[int]]]


@dataclass(frozen=True, slots=True)
class Material:
    """What ways of running a model are compared on.

    Attributes:
        examples: rendered documents; every supervised token counts.
        prompts: token ids to continue greedily.
        texts: rendered conversations with the ids that the tokenizer gives them.
        stop_ids: tokens that end a continuation.
    """

    examples: Sequence[Example]
    prompts: Sequence[Sequence[int]]
    texts: Sequence[tuple[str, list[int]]]
    stop_ids: Collection[int]


@dataclass(frozen=True, slots=True)
class Verification:
    """What two ways of running a model make of the same documents and prompts.

    Attributes:
        names: of the reference and the candidate.
        reference: the reference's score.
        candidate: the candidate's.
        difference: candidate - reference, document by document.
        kl_mean: KL(reference || candidate) in nats, mean over supervised tokens.
        kl_p99: its 99th percentile over these tokens.
        prompts: how many prompts were continued.
        identical: share of prompts whose continuations are identical; 1 without prompts.
        agreeing: share of continued tokens before the first difference; 1 without any.
    """

    names: tuple[str, str]
    reference: Score
    candidate: Score
    difference: Difference
    kl_mean: float
    kl_p99: float
    prompts: int
    identical: float
    agreeing: float

    def problems(self, tolerance: Tolerance) -> list[str]:
        """What is beyond the tolerance, a sentence part each; empty if nothing is.

        The difference in nll counts by the end of its 95 % interval that is nearer to zero: on few
        tokens a rounding error in half precision does not average out. Continuations are not
        judged: where two tokens are all but equally likely, rounding decides, and everything after
        them differs.
        """
        gap = self.difference.nll
        low, high = self.difference.interval or (gap, gap)
        sure = 0.0 if low <= 0 <= high else min(abs(low), abs(high))
        figures = {
            "mean KL": (self.kl_mean, self.kl_mean, tolerance.kl),
            "difference in nll": (gap, sure, tolerance.nll),
        }
        return [
            f"the {what} is {value:.2e} nats/token, at most {limit:.0e} is allowed"
            for what, (value, least, limit) in figures.items()
            if not least <= limit  # not a number is a problem, too
        ]

    def summary(self) -> dict[str, Any]:
        """The figures as a JSON-ready dict."""
        return {
            "reference": {"name": self.names[0], **self.reference.summary()},
            "candidate": {"name": self.names[1], **self.candidate.summary()},
            "difference": self.difference.summary(),
            "kl_mean": self.kl_mean,
            "kl_p99": self.kl_p99,
            "prompts": self.prompts,
            "identical": self.identical,
            "agreeing": self.agreeing,
        }


def run_by(
    name: str, model: nn.Module, *, stop_ids: Collection[int], max_new_tokens: int = 32
) -> Way:
    """The way of a transformers model: its own forward pass, one document at a time.

    Args:
        name: what to call it.
        model: a causal language model, with or without an adapter.
        stop_ids: tokens that end a continuation.
        max_new_tokens: longest continuation.
    """

    @torch.no_grad()
    def logits(example: Example) -> Tensor:
        batch = pack([example]).to(next(model.parameters()).device)
        found: Tensor = model(
            input_ids=batch.ids[None], use_cache=False, logits_to_keep=batch.rows
        ).logits[0]
        return found if found.shape[0] == batch.supervised_tokens else found[batch.rows]

    def continuations(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        found: list[list[int]] = []
        for first in range(0, len(prompts), _PROMPTS):
            some = prompts[first : first + _PROMPTS]
            found += generate(model, some, max_new_tokens=max_new_tokens, stop_ids=stop_ids)
        return found

    return Way(name, logits, continuations)


def verify(
    reference: Way,
    candidate: Way,
    examples: Sequence[Example],
    prompts: Sequence[Sequence[int]] = (),
) -> Verification:
    """Run both ways on the same documents and prompts.

    Documents without a supervised token are left out. Models are to be in eval mode.

    Args:
        reference: what is to be reproduced.
        candidate: what should reproduce it.
        examples: rendered documents.
        prompts: token ids of prompts to continue greedily.

    Raises:
        DataError: no example has a supervised token.
        ModelError: the two ways have different vocabularies.
    """
    counted = [example for example in examples if example.supervised_tokens]
    if not counted:
        raise DataError("nothing to verify on: no example has a supervised token")
    nats = np.zeros((2, len(counted)))
    divergences = []
    for i, example in enumerate(counted):
        p, q = reference.logits(example), candidate.logits(example)
        if p.shape != q.shape:
            raise ModelError(
                f"{candidate.name} gives logits {list(q.shape)} where {reference.name} gives"
                f" {list(p.shape)}: another vocabulary?"
            )
        nats[:, i], kl = _compare(p, q, example)
        divergences.append(kl)
    tokens = np.array([example.supervised_tokens for example in counted])
    text_bytes = sum(example.text_bytes for example in counted)
    scores = [Score(own, tokens, text_bytes) for own in nats]
    kl = np.concatenate(divergences)
    identical, agreeing = _agreement(reference, candidate, prompts)
    return Verification(
        names=(reference.name, candidate.name),
        reference=scores[0],
        candidate=scores[1],
        difference=paired_difference(scores[1], scores[0]),
        kl_mean=float(kl.mean()),
        kl_p99=float(np.quantile(kl, 0.99)),
        prompts=len(prompts),
        identical=identical,
        agreeing=agreeing,
    )


def _compare(p: Tensor, q: Tensor, example: Example) -> tuple[tuple[float, float], np.ndarray]:
    """Nats of an example under both logits [S, V], and KL(p || q) of each token, [S].

    In float64: differences of 1e-6 nats are less than float32 keeps of a sum over V.
    """
    targets = torch.tensor(
        [t for t, own in zip(example.ids, example.supervised, strict=True) if own]
    )
    nats, kl = [0.0, 0.0], []
    for rows in torch.arange(len(targets)).split(_ROWS):
        own = targets[rows][:, None]
        log_p, log_q = (z[rows.to(z.device)].double().cpu().log_softmax(-1) for z in (p, q))
        nats[0] -= float(log_p.gather(1, own).sum())
        nats[1] -= float(log_q.gather(1, own).sum())
        # A token that the reference rules out (-inf) adds nothing.
        gap = torch.where(log_p == -torch.inf, 0.0, log_p - log_q)
        kl.append((log_p.exp() * gap).sum(-1).numpy())
    return (nats[0], nats[1]), np.concatenate(kl)


def _agreement(
    reference: Way, candidate: Way, prompts: Sequence[Sequence[int]]
) -> tuple[float, float]:
    """Share of prompts with identical continuations, and of tokens before the first difference."""
    if not prompts:
        return 1.0, 1.0
    same = agreeing = total = 0
    pairs = zip(reference.continuations(prompts), candidate.continuations(prompts), strict=True)
    for expected, found in pairs:
        longest = max(len(expected), len(found))
        equal = [a == b for a, b in zip(expected, found, strict=False)]
        agreeing += equal.index(False) if False in equal else len(equal)
        total += longest
        same += expected == found
    return same / len(prompts), agreeing / total if total else 1.0

"""Examples -> packed micro-batches, and the seeded order in which examples are visited.

Knows nothing of models or of the step: which examples form an optimizer step is `Epochs`, how they
are laid out in micro-batches is `micro_batches`, and only the first of the two is part of the
experiment.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from lorikeet.data.example import Example


@dataclass(frozen=True)
class Batch:
    """A packed micro-batch: D documents laid end to end in one row of T tokens, without padding.

    Attributes:
        ids: token ids, int64 `[T]`.
        positions: position of each token in its own document, int64 `[T]`.
        cu_seqlens: document boundaries, int32 `[D + 1]`; document d is `ids[cu[d] : cu[d + 1]]`.
            They stay on the CPU: how a row is cut must be known without waiting for a GPU.
        rows: where a supervised token is predicted, int64 `[S]`: the hidden state at `rows[s]`
            predicts `targets[s]`.
        targets: the supervised tokens, int64 `[S]`.
        documents: which document (0 to D - 1) each target belongs to, int64 `[S]`.
    """

    ids: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    rows: Tensor
    targets: Tensor
    documents: Tensor

    @property
    def lengths(self) -> list[int]:
        """Tokens of each document, D numbers."""
        return self.cu_seqlens.diff().tolist()

    @property
    def tokens(self) -> int:
        """Tokens of all documents, T; there are no pads to leave out."""
        return self.ids.numel()

    @property
    def supervised_tokens(self) -> int:
        """Tokens that count in the loss, S."""
        return self.targets.numel()

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch with every tensor but `cu_seqlens` on `device`."""
        return Batch(
            ids=self.ids.to(device),
            positions=self.positions.to(device),
            cu_seqlens=self.cu_seqlens,
            rows=self.rows.to(device),
            targets=self.targets.to(device),
            documents=self.documents.to(device),
        )


def pack(examples: Sequence[Example]) -> Batch:
    """Lay examples end to end in one row.

    Two examples, `*` over the supervised tokens, become one row of T = 7::

        example 0   a  b  c* d*          example 1   e  f* g*

        ids         a  b  c  d  e  f  g
        positions   0  1  2  3  0  1  2
        cu_seqlens  0           4        7
        rows           1  2     4  5          the state that sees b predicts c, ...
        targets        c  d     f  g
        documents      0  0     1  1

    Raises:
        ValueError: no examples, an empty example, or a first token that is supervised (nothing in
            its own document precedes it).
    """
    if not examples or not all(example.ids for example in examples):
        raise ValueError("a batch needs at least one example, and every example a token")
    lengths = torch.tensor([len(example.ids) for example in examples])
    ends = lengths.cumsum(0)
    ids = torch.tensor(list(chain.from_iterable(example.ids for example in examples)))
    mask = torch.tensor(list(chain.from_iterable(example.supervised for example in examples)))
    document = torch.repeat_interleave(lengths)
    positions = torch.arange(len(ids)) - (ends - lengths)[document]
    supervised = mask.nonzero().squeeze(1)
    if (positions[supervised] == 0).any():
        raise ValueError("the first token of an example cannot be supervised")
    return Batch(
        ids=ids,
        positions=positions,
        cu_seqlens=torch.cat([ends.new_zeros(1), ends]).int(),
        rows=supervised - 1,
        targets=ids[supervised],
        documents=document[supervised],
    )


def micro_batches(
    examples: Sequence[Example], *, max_tokens: int, packing: bool = True
) -> list[list[int]]:
    """Distribute examples over micro-batches of at most `max_tokens` tokens.

    First-fit decreasing: the longest example first, each into the first micro-batch that has room
    (at most 11/9 of the optimum plus 6/9 of a batch; Dósa 2007). An example longer than
    `max_tokens` gets a micro-batch of its own.

    Args:
        examples: the examples of one optimizer step, or of an evaluation.
        max_tokens: tokens per micro-batch.
        packing: with False every example is a micro-batch of its own.

    Returns:
        The indices of each micro-batch in ascending order; micro-batches ordered by first index.
    """
    if not packing:
        return [[index] for index in range(len(examples))]
    lengths = [len(example.ids) for example in examples]
    room = np.full(len(examples), max_tokens)
    bins: list[list[int]] = []
    for index in sorted(range(len(examples)), key=lambda i: -lengths[i]):
        fits = room[: len(bins)] >= lengths[index]
        place = int(fits.argmax()) if fits.any() else len(bins)
        if place == len(bins):
            bins.append([])
        bins[place].append(index)
        room[place] -= lengths[index]
    return sorted(sorted(members) for members in bins)


class Epochs:
    """The order in which examples are visited: a pure function of (number, batch size, seed).

    There is no generator state to save: resuming at a step asks for that step. Every epoch is a
    fresh permutation, and its last step may be smaller than the others.

    Args:
        n_examples: how many examples there are.
        batch_size: examples per step.
        seed: seeds the permutation of every epoch.

    Raises:
        ValueError: no examples, or a batch size below 1.
    """

    def __init__(self, n_examples: int, *, batch_size: int, seed: int) -> None:
        if n_examples < 1 or batch_size < 1:
            raise ValueError(
                f"expected examples and a batch size, found {n_examples} and {batch_size}"
            )
        self.n_examples = n_examples
        self.batch_size = batch_size
        self.seed = seed
        self._latest: tuple[int, list[int]] = (-1, [])  # only saves permuting again at every step

    @property
    def steps_per_epoch(self) -> int:
        """Steps that visit every example once."""
        return -(-self.n_examples // self.batch_size)

    def indices(self, step: int) -> list[int]:
        """Return the examples of a step; steps count from 0 and run on through the epochs."""
        if step < 0:
            raise ValueError(f"steps count from 0, found {step}")
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        if self._latest[0] != epoch:
            self._latest = (epoch, permutation(self.n_examples, f"{self.seed}/epoch {epoch}"))
        first = step_of_epoch * self.batch_size
        return self._latest[1][first : first + self.batch_size]


def permutation(n: int, key: str) -> list[int]:
    """Return a permutation of 0 to n - 1 that depends on `n` and `key` alone.

    The key is hashed so that neighbouring seeds and epochs share nothing: `seed + epoch` would
    give seed 1 the second epoch of seed 0 as its first.
    """
    digest = hashlib.sha256(key.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
    return torch.randperm(n, generator=generator).tolist()

"""A packed micro-batch as the fast path reads it: rounded up in size, and where the model is.

Shapes: T tokens, D documents, S supervised rows, all with what was added to round them up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lorikeet.data.batch import Batch

STEP = 32
"""Rows are padded to a multiple of this: oneDNN compiles its products for every new length."""

IGNORED = -100
"""The target of rows that do not count, as in `torch.nn.functional.cross_entropy`."""

SITES = 4
"""Inputs that adapters share in a block: of q k v, of o, of gate and up, of down."""


@dataclass(frozen=True)
class Row:
    """Documents laid end to end, the last of them pads.

    Attributes:
        ids: int64 [T].
        positions: int64 [T].
        cu_seqlens: where documents end, int32 [D + 1]; the last ones may be empty.
        lengths: tokens of each document, D numbers; None in a row whose passes are recorded, which
            must depend on tensors alone.
        max_seqlen: no document is longer.
        rows: int64 [S], where something is predicted.
        targets: int64 [S], what; `IGNORED` where nothing is.
        keys: of the dropout mask at every site, numbers or int32 [sites]; None without dropout.
    """

    ids: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    lengths: Sequence[int] | None
    max_seqlen: int
    rows: Tensor
    targets: Tensor
    keys: Sequence[int] | Tensor | None


@dataclass(frozen=True)
class Sizes:
    """What a row is rounded up to; rows of the same sizes differ in their numbers alone.

    Attributes:
        tokens: T.
        documents: D.
        supervised: S.
    """

    tokens: int
    documents: int
    supervised: int


def least(batch: Batch) -> Sizes:
    """The sizes of a row that is padded to a multiple of `STEP` and in nothing else."""
    tokens = -(-batch.tokens // STEP) * STEP
    return Sizes(tokens, len(batch.lengths) + (tokens > batch.tokens), batch.supervised_tokens)


def coarse(batch: Batch) -> Sizes:
    """Sizes on a coarse grid that many batches share: at most 127 or a quarter are added."""
    tokens = _up(batch.tokens)
    documents = 8
    while documents < len(batch.lengths) + 1:
        documents *= 2
    return Sizes(tokens, documents, min(_up(batch.supervised_tokens), tokens))


def _up(count: int) -> int:
    """The next number on a grid of four steps to an octave, 128 or more apart."""
    step = 1 << max((count - 1).bit_length() - 3, 7)
    return -(-count // step) * step


def lay_out(batch: Batch, sizes: Sizes, *, keys: Sequence[int] | Tensor | None = None) -> Row:
    """A batch as a row of these sizes."""
    pads = sizes.tokens - batch.tokens
    lengths = [*batch.lengths, *([pads] if pads else [])]
    lengths += [0] * (sizes.documents - len(lengths))
    ids, positions = batch.ids, batch.positions
    if pads:
        ids = torch.cat([ids, ids.new_zeros(pads)])
        positions = torch.cat([positions, torch.arange(pads, device=ids.device)])
    rows, targets = batch.rows, batch.targets
    if idle := sizes.supervised - batch.supervised_tokens:
        rows = torch.cat([rows, rows.new_zeros(idle)])
        targets = torch.cat([targets, targets.new_full((idle,), IGNORED)])
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    return Row(
        ids=ids,
        positions=positions,
        cu_seqlens=ends.to(ids.device),
        lengths=lengths,
        max_seqlen=max(lengths),
        rows=rows,
        targets=targets,
        keys=keys,
    )


def recordable(batch: Batch, sizes: Sizes, keys: Sequence[int] | None) -> Row:
    """A batch as a row of tensors in which nothing but sizes is fixed."""
    row = lay_out(batch, sizes, keys=None if keys is None else key_tensor(keys, batch.ids.device))
    return replace(row, lengths=None, max_seqlen=sizes.tokens)


def dropout_keys(model: Any) -> Sequence[int] | None:
    """The keys of a pass in training, drawn from torch's generator on the CPU; None in eval."""
    if not model.training:
        return None
    first = int(torch.randint(2**31, ()))
    return [_key(first, site) for site in range(SITES * model.config.num_hidden_layers)]


def key_tensor(keys: Sequence[int], device: torch.device) -> Tensor:
    """Keys as int32 [sites] with the same bits, so that nothing is compiled for one of them."""
    signed = [key - 2**32 if key >= 2**31 else key for key in keys]
    return torch.tensor(signed, dtype=torch.int32).to(device)


def _key(first: int, site: int) -> int:
    """32 well-mixed bits (the finaliser of MurmurHash3) out of a step's key and a site."""
    h = (first + site * 0x9E3779B1) & 0xFFFFFFFF
    h = ((h ^ h >> 16) * 0x85EBCA6B) & 0xFFFFFFFF
    h = ((h ^ h >> 13) * 0xC2B2AE35) & 0xFFFFFFFF
    return h ^ h >> 16

"""Merging that works on the single numbers of the updates: TIES and DARE.

Both take dense updates of one module, each times its weight, one after the other: no more than
one of them is in memory beside the sums.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import reduce

import torch
from torch import Tensor


def ties(updates: Iterable[Tensor], density: float) -> Tensor:
    """Trim, elect a sign, average what agrees (Yadav et al. 2023, arXiv:2306.01708, section 3).

    The sign of a number is that of the sum over the trimmed updates, plus where they cancel. Each
    number is the mean over the updates that have this sign; zeros have none. Because the updates
    come with their weights, the weights vote too; PEFT's `ties` lets the unweighted ones vote,
    which is the same for equal weights above zero.

    Args:
        updates: float32 [out, in] each, at least one.
        density: the part of each update that stays.
    """
    votes = reduce(torch.add, (_votes(trimmed(update, density)) for update in updates))
    above, below, more, fewer = votes
    return torch.where(above + below >= 0, above / more.clamp(min=1), below / fewer.clamp(min=1))


def _votes(update: Tensor) -> Tensor:
    """Of each number: its part above zero, its part below, whether it is above, whether below."""
    parts = [update.clamp(min=0), update.clamp(max=0), (update > 0).float(), (update < 0).float()]
    return torch.stack(parts)


def trimmed(update: Tensor, density: float) -> Tensor:
    """The largest numbers by magnitude, density · n of them but at least one; the others are 0.

    Numbers as large as the smallest that stays all stay.
    """
    size = update.abs().reshape(-1)
    kept = max(1, int(density * size.numel()))
    least = size.kthvalue(size.numel() - kept + 1).values
    return update.where(update.abs() >= least, 0.0)


def dropped(update: Tensor, density: float, *, name: str) -> Tensor:
    """Keep each number with probability `density`, divided by it (DARE's drop and rescale).

    Yu et al. 2023, arXiv:2311.03099, equation 1, with density = 1 - p. Which numbers stay depends
    on `name` alone, not on what was drawn before.
    """
    digest = hashlib.sha256(name.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    kept = torch.rand(update.shape, generator=generator) < density
    return (update / density).where(kept, 0.0)

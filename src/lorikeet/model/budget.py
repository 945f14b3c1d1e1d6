"""What training keeps in memory, and the micro-batches and least recomputation that fit a limit.

Smaller micro-batches cost next to nothing, so they come first; only when the longest example alone
does not fit are blocks computed twice, as few as it takes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from lorikeet.data.batch import pack
from lorikeet.data.example import Example
from lorikeet.errors import ConfigError
from lorikeet.kernels.loss import chunk_bytes
from lorikeet.model.fast import FastNll
from lorikeet.model.footprint import saved_bytes
from lorikeet.model.loss import TokenNll

_PROBE = 128  # tokens of the row whose saved tensors are counted
_STEP = 64  # micro-batches are chosen in steps of this many tokens
_WORKING = 3  # a block's temporaries in its backward pass, in units of what it saves
_MARGIN = 1.1  # the allocator's own losses


@dataclass(frozen=True)
class Fit:
    """How training fits into memory.

    Attributes:
        max_tokens: tokens of a micro-batch.
        recompute: blocks that are computed twice.
        blocks: how many there are.
        peak: what the process is expected to hold, in bytes.
    """

    max_tokens: int
    recompute: int
    blocks: int
    peak: int

    def __str__(self) -> str:
        twice = f", {self.recompute} of {self.blocks} blocks computed twice" * bool(self.recompute)
        return f"micro-batches of {self.max_tokens:,} tokens{twice}, about {size(self.peak)}"


@dataclass(frozen=True)
class Footprint:
    """Bytes that training needs beside what the process holds already.

    Attributes:
        fixed: optimizer state, gradients, chunks of logits.
        token: saved for the backward pass by every token of a micro-batch.
        block: of these, what a block saves that it would not if it were computed twice.
        working: a block's temporaries per token.
        blocks: how many blocks could be computed twice.
    """

    fixed: int
    token: int
    block: int
    working: int
    blocks: int

    def needed(self, tokens: int, recompute: int) -> int:
        """Bytes with micro-batches of `tokens` and `recompute` blocks computed twice."""
        held = self.token - recompute * self.block
        again = self.block if recompute else 0
        return round(self.fixed + _MARGIN * tokens * (held + again + self.working))


def measure(model: Any, nll: TokenNll) -> Footprint:
    """Count what the loss of a short row saves for its backward pass.

    Args:
        model: with its adapters, or with the weights that are trained freed.
        nll: its loss function, which decides what is saved.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    fixed = sum(
        p.numel() * (12 if p.element_size() >= 4 else 16 + p.element_size()) for p in trainable
    )
    everything = _saved(model, nll) // _PROBE
    blocks = model.config.num_hidden_layers
    fast = isinstance(nll, FastNll)
    return Footprint(
        fixed=fixed + 2 * chunk_bytes(next(model.parameters())),
        token=everything,
        block=saved_by_block(model, nll) - _input_bytes(model) if isinstance(nll, FastNll) else 0,
        working=_WORKING * everything // blocks,
        blocks=blocks if fast else 0,
    )


def saved_by_block(model: Any, nll: FastNll) -> int:
    """Bytes per token that a block keeps for its backward pass, its input included."""
    blocks = model.config.num_hidden_layers
    without = _saved(model, replace(nll, recompute=blocks))
    return (_saved(model, nll) - without) // (_PROBE * blocks)


def _input_bytes(model: Any) -> int:
    """Bytes per token of a block's input, which is two terms of the residual stream."""
    return 2 * model.config.hidden_size * next(model.parameters()).element_size()


def fit_memory(
    footprint: Footprint, *, held: int, limit: int, max_tokens: int, longest: int, what: str
) -> Fit:
    """The largest micro-batches that fit, and the least recomputation.

    Args:
        footprint: from `measure`.
        held: bytes that the process holds already.
        limit: bytes that it may hold.
        max_tokens: micro-batches are never larger than this, unless a single example is.
        longest: tokens of the longest example, which no micro-batch can be smaller than.
        what: what sets the limit, for the error.

    Raises:
        ConfigError: the longest example does not fit, even with every block computed twice.
    """

    def found(tokens: int, recompute: int) -> Fit | None:
        peak = held + footprint.needed(tokens, recompute)
        return Fit(tokens, recompute, footprint.blocks, peak) if peak <= limit else None

    smallest = math.ceil(longest / _STEP) * _STEP
    for tokens in range(max(smallest, max_tokens), smallest - 1, -_STEP):
        if (fit := found(tokens, 0)) is not None:
            return fit
    for recompute in range(1, footprint.blocks + 1):
        if (fit := found(smallest, recompute)) is not None:
            return fit
    least = held + footprint.needed(smallest, footprint.blocks)
    raise ConfigError(
        f"{what} is {size(limit)}, but the longest example ({longest:,} tokens) needs"
        f" about {size(least)}, {size(held)} of it for what is loaded already; raise the limit or"
        " lower --data.max_length"
    )


def size(count: int) -> str:
    """Bytes in words: 1.5 GB."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.0f} MB"


def _saved(model: nn.Module, nll: TokenNll) -> int:
    """Bytes that autograd keeps for the backward pass of a row, parameters excepted."""
    # The fast path runs the last block's MLP for supervised rows only, so all are; on the other
    # path the logits of all rows would outweigh the activations.
    supervised = [isinstance(nll, FastNll)] * (_PROBE - 1) + [True]
    example = Example((0,) * _PROBE, (False, *supervised[1:]), 0, "probe")
    device = next(model.parameters()).device
    was_training = model.training
    model.train()
    try:
        with torch.random.fork_rng(), saved_bytes(model) as count:
            nll(model, pack([example]).to(device))
            return count()
    finally:
        model.train(was_training)

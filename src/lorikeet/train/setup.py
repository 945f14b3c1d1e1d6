"""From examples and options to the ready objects that the loop takes."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from lorikeet.config import TrainConfig
from lorikeet.data.batch import Batch, Epochs, micro_batches, pack
from lorikeet.data.example import Example
from lorikeet.errors import ConfigError
from lorikeet.lora import TokenEmbedding
from lorikeet.model import (
    FastNll,
    Fit,
    TokenNll,
    can_multiply_int8,
    fit_memory,
    graphed,
    int8_weights,
    keep_freed_memory,
    measure,
    memory_held,
    memory_limit,
    token_nll,
)
from lorikeet.train.optimizer import Optimizer
from lorikeet.train.schedule import Schedule


@dataclass(frozen=True)
class Steps:
    """Step number -> the packed micro-batches of that optimizer step.

    Which examples form a step is the experiment (`batch_size`, `seed`); how they are laid out in
    micro-batches is not.
    """

    examples: Sequence[Example]
    order: Epochs
    max_tokens: int
    packing: bool
    device: torch.device

    def __call__(self, step: int) -> list[Batch]:
        """The micro-batches of a step, on the model's device."""
        chosen = [self.examples[i] for i in self.order.indices(step)]
        layout = micro_batches(chosen, max_tokens=self.max_tokens, packing=self.packing)
        return [pack([chosen[i] for i in members]).to(self.device) for members in layout]


@dataclass(frozen=True)
class Setup:
    """What `fit` needs beside the model.

    Attributes:
        optimizer: holds the trainable parameters.
        steps: step number to micro-batches.
        schedule: step number to learning rate.
        total_steps: optimizer steps of the whole run.
        loss: the loss function, with the int8 weights and the recomputation that were asked for.
        fit: how training fits into `max_memory`; None without a limit.
    """

    optimizer: Optimizer
    steps: Steps
    schedule: Schedule
    total_steps: int
    loss: TokenNll
    fit: Fit | None


def set_up(
    model: nn.Module,
    examples: Sequence[Example],
    config: TrainConfig,
    *,
    packing: bool = True,
    nll: TokenNll = token_nll,
) -> Setup:
    """Build optimizer, data order, schedule and loss, and seed every random generator.

    Args:
        model: its parameters that require a gradient are trained.
        examples: the training examples.
        config: batch size, length, learning rate, seed.
        packing: whether the model keeps packed documents apart (`Base.packing`).
        nll: the model's loss function (`Base.nll`).

    Raises:
        ConfigError: training does not fit into `max_memory`, or int8 cannot be had here.
    """
    keep_freed_memory()
    loss = _in_int8(model, nll) if config.int8 else nll
    device = next(model.parameters()).device
    fit = _fit(model, loss, examples, config, device)
    if fit and fit.recompute and isinstance(loss, FastNll):
        loss = replace(loss, recompute=fit.recompute)
    if isinstance(loss, FastNll):
        loss = graphed(model, loss)
    order = Epochs(len(examples), batch_size=config.batch_size, seed=config.seed)
    total = config.max_steps or math.ceil(config.epochs * order.steps_per_epoch)
    optimizer = Optimizer(
        trainable(model),
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        loss_scaling=next(model.parameters()).dtype == torch.float16,
        loraplus_lr_ratio=config.loraplus_lr_ratio,
        sparse=_sparse(model),
    )
    random.seed(config.seed)
    torch.manual_seed(config.seed)
    return Setup(
        optimizer=optimizer,
        steps=Steps(examples, order, fit.max_tokens if fit else config.max_tokens, packing, device),
        schedule=Schedule(config.peak, total, config.schedule, config.warmup),
        total_steps=total,
        loss=loss,
        fit=fit,
    )


def _fit(
    model: nn.Module,
    loss: TokenNll,
    examples: Sequence[Example],
    config: TrainConfig,
    device: torch.device,
) -> Fit | None:
    """How training fits into the memory that it may take, or that a GPU has."""
    limit, what = config.max_memory, "train.max_memory"
    if limit is None:
        limit, what = memory_limit(device), "the GPU's free memory"
    if limit is None:
        return None
    return fit_memory(
        measure(model, loss),
        held=memory_held(device),
        limit=limit,
        max_tokens=config.max_tokens,
        longest=max(len(example.ids) for example in examples),
        what=what,
    )


def _in_int8(model: nn.Module, nll: TokenNll) -> FastNll:
    """The loss with the frozen weights of the blocks in int8."""
    if not isinstance(nll, FastNll):
        raise ConfigError(
            "train.int8 needs the fast path, which this model does not take here (a run without"
            " train.int8 says why in its first lines)"
        )
    device = next(model.parameters()).device
    if device.type != "cpu":
        raise ConfigError(f"train.int8 is for CPUs, and the model is on {device}; leave it out")
    if not can_multiply_int8():
        raise ConfigError("train.int8 needs a CPU with VNNI, which this one has not; leave it out")
    return replace(nll, rounded=int8_weights(model))


def _sparse(model: nn.Module) -> list[str]:
    """Trained rows of embeddings: those of a rare token may wait long for their first gradient."""
    return [f"{name}.rows" for name, m in model.named_modules() if isinstance(m, TokenEmbedding)]


def trainable(model: nn.Module) -> Mapping[str, nn.Parameter]:
    """The parameters that require a gradient, by name; tied ones once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}

"""From examples and options to the ready objects that the loop takes."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lorikeet.config import TrainConfig
from lorikeet.data.batch import Batch, Epochs, micro_batches, pack
from lorikeet.data.example import Example
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
    """What `fit` needs beside the model."""

    optimizer: Optimizer
    steps: Steps
    schedule: Schedule
    total_steps: int


def set_up(
    model: nn.Module, examples: Sequence[Example], config: TrainConfig, *, packing: bool = True
) -> Setup:
    """Build optimizer, data order and schedule, and seed every random generator.

    Args:
        model: its parameters that require a gradient are trained.
        examples: the training examples.
        config: batch size, length, learning rate, seed.
        packing: whether the model keeps packed documents apart (`Base.packing`).
    """
    device = next(model.parameters()).device
    order = Epochs(len(examples), batch_size=config.batch_size, seed=config.seed)
    total = config.max_steps or math.ceil(config.epochs * order.steps_per_epoch)
    optimizer = Optimizer(
        trainable(model),
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        loss_scaling=next(model.parameters()).dtype == torch.float16,
    )
    random.seed(config.seed)
    torch.manual_seed(config.seed)
    return Setup(
        optimizer=optimizer,
        steps=Steps(examples, order, config.max_tokens, packing, device),
        schedule=Schedule(config.peak, total, config.schedule, config.warmup),
        total_steps=total,
    )


def trainable(model: nn.Module) -> Mapping[str, nn.Parameter]:
    """The parameters that require a gradient, by name; tied ones once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}

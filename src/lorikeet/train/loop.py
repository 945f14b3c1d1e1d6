"""The one training loop: LoRA and full fine-tuning, any data, any length.

It gets ready objects. It knows no path, no option and no model name; what differs between methods
is in the arguments that are built before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from lorikeet.data.batch import Batch
from lorikeet.errors import TrainingError
from lorikeet.train.optimizer import Optimizer
from lorikeet.train.state import TrainState

SETTLING_STEPS = 3
"""Updates after which every trainable tensor must have had a gradient: B moves in the first step,
A in the second (while B is zero, so is A's gradient)."""

Loss = Callable[[nn.Module, Batch], Tensor]


@dataclass
class Hooks:
    """What the caller wants done along the way.

    Attributes:
        record: gets every line of the metrics.
        validate: returns the validation loss, nats per token.
        eval_every: steps between validations; one more comes after the last step.
        save: writes a checkpoint.
        save_every: steps between checkpoints; one more comes after the last step.
        improved: called when a validation is the best so far.
        patience: stop after this many validations without improvement.
    """

    record: Callable[[dict[str, Any]], None] = lambda line: None
    validate: Callable[[], float] | None = None
    eval_every: int | None = None
    save: Callable[[TrainState], None] | None = None
    save_every: int | None = None
    improved: Callable[[TrainState], None] | None = None
    patience: int | None = None


def fit(
    model: nn.Module,
    optimizer: Optimizer,
    batches: Callable[[int], Sequence[Batch]],
    *,
    learning_rate: Callable[[int], float],
    total_steps: int,
    loss: Loss,
    state: TrainState | None = None,
    hooks: Hooks | None = None,
) -> TrainState:
    """Train until `total_steps`, or until early stopping.

    Args:
        model: the model; its trainable parameters are those of `optimizer`.
        optimizer: holds the trainable parameters.
        batches: step number (from 0) to the micro-batches of that optimizer step.
        learning_rate: step number to learning rate.
        total_steps: optimizer steps of the whole run, those before a resume included.
        loss: (model, micro-batch) to the nats of its supervised tokens, [S].
        state: where to go on; a new run if None.
        hooks: metrics, validation, checkpoints.

    Returns:
        The state after the last step.

    Raises:
        TrainingError: a loss or a gradient is not finite, a step has nothing to supervise, or a
            trainable tensor gets no gradient.
    """
    state = state or TrainState()
    hooks = hooks or Hooks()
    model.train()
    try:
        while state.step < total_steps and not state.stopped:
            rate = learning_rate(state.step)
            try:
                line = _step(model, optimizer, batches(state.step), learning_rate=rate, loss=loss)
            except TrainingError as error:
                model.zero_grad(set_to_none=True)  # whoever trains it next begins with none
                raise TrainingError(f"step {state.step + 1}: {error}") from None
            state.step += 1
            hooks.record({"step": state.step, **line})
            if optimizer.updates == SETTLING_STEPS:
                _refuse_idle_tensors(optimizer)
            last = state.step == total_steps
            if hooks.validate and (last or _due(state.step, hooks.eval_every)):
                _validate(state, hooks)
            if hooks.save and (last or state.stopped or _due(state.step, hooks.save_every)):
                hooks.save(state)
    finally:
        model.eval()
    return state


def _step(
    model: nn.Module,
    optimizer: Optimizer,
    batches: Sequence[Batch],
    *,
    learning_rate: float,
    loss: Loss,
) -> dict[str, Any]:
    """One optimizer step: the sum of nats over all micro-batches, divided once by their count."""
    started = perf_counter()
    supervised = sum(batch.supervised_tokens for batch in batches)
    if supervised == 0:
        raise TrainingError("the next step has no supervised token: nothing to learn from")
    totals = []
    for batch in batches:
        total = loss(model, batch).sum()
        totals.append(total.detach())
        optimizer.backward(total / supervised)
    nats = float(torch.stack(totals).double().sum())  # once a step: a GPU is waited for
    if not math.isfinite(nats):
        raise TrainingError(
            "the loss is not finite; the weights of the last step are kept."
            " Try a lower learning rate or --model.dtype fp32"
        )
    norm = optimizer.step(learning_rate)
    return {
        "loss": nats / supervised,
        "learning_rate": learning_rate,
        "grad_norm": norm,
        "tokens": sum(batch.tokens for batch in batches),
        "supervised_tokens": supervised,
        "seconds": perf_counter() - started,
    }


def _refuse_idle_tensors(optimizer: Optimizer) -> None:
    idle = sorted(set(optimizer.parameters) - optimizer.moved - optimizer.sparse)
    if idle:
        raise TrainingError(
            f"{len(idle)} of {len(optimizer.parameters)} trainable tensors have had no gradient in"
            f" the first {SETTLING_STEPS} steps, so they would never learn (--lora.exclude_modules"
            " leaves modules out that the model's forward pass goes round):",
            [*idle[:10], *(["..."] if len(idle) > 10 else [])],
        )


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _validate(state: TrainState, hooks: Hooks) -> None:
    assert hooks.validate is not None
    nll = hooks.validate()
    if not math.isfinite(nll):
        raise TrainingError(
            f"the validation loss of step {state.step} is not finite. Try a lower learning rate or"
            " --model.dtype fp32"
        )
    hooks.record({"step": state.step, "eval_nll": nll, "eval_perplexity": _perplexity(nll)})
    if nll < state.best_nll:
        state.best_nll, state.best_step, state.worse = nll, state.step, 0
        if hooks.improved:
            hooks.improved(state)
    else:
        state.worse += 1
        state.stopped = hooks.patience is not None and state.worse >= hooks.patience


def _perplexity(nll: float) -> float:
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf

"""How far an adapter moves a model's logits: proof that it is applied."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from lorikeet.errors import AdapterError
from lorikeet.lora import disabled

PROBE = "Hello! Who are you?"
"""A message that logits can be compared on where there are no data."""


class Shift(NamedTuple):
    """Differences of logits with and without the adapter, over all positions and tokens.

    Attributes:
        largest: of all differences, in nats.
        mean: of their absolute values.
    """

    largest: float
    mean: float

    def __str__(self) -> str:
        return f"it moves the logits by {self.mean:.3g} in the mean, by {self.largest:.3g} at most"


@torch.no_grad()
def logit_shift(model: Any, ids: Sequence[int]) -> Shift:
    """Compare the logits of a token sequence with the adapter and without.

    Raises:
        AdapterError: they are the same, bit for bit, or not finite.
    """
    was_training = model.training
    model.eval()
    inputs = torch.tensor([list(ids)], device=next(model.parameters()).device)
    with_adapter = model(input_ids=inputs, use_cache=False).logits.float()
    with disabled(model):
        difference = with_adapter - model(input_ids=inputs, use_cache=False).logits.float()
    model.train(was_training)
    shift = Shift(difference.abs().max().item(), difference.abs().mean().item())
    if not difference.isfinite().all():
        raise AdapterError("with the adapter the model's logits are not finite")
    if shift.largest == 0:
        raise AdapterError(
            "the adapter changes nothing: the logits are those of the base, bit for bit"
            " (was it trained at all? is its scale zero?)"
        )
    return shift

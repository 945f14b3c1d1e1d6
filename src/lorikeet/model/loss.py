"""The one loss: nats of every supervised token of a packed micro-batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorikeet.data.batch import Batch
from lorikeet.model.attention import packed_inputs
from lorikeet.model.rope import longest_unscaled, reset_angles

TokenNll = Callable[[nn.Module, Batch], Tensor]
"""(model, packed micro-batch) to the nats of its supervised tokens, [S]."""


def token_nll(model: nn.Module, batch: Batch) -> Tensor:
    """Negative log-likelihood of each supervised token, in nats.

    The output head runs on supervised rows only. Sums, means and perplexities are formed by the
    caller, which knows the global number of tokens.

    Args:
        model: a causal language model whose forward takes `logits_to_keep`.
        batch: T packed tokens, S of them supervised.

    Returns:
        float32 [S] (float64 for a float64 model), in the order of `batch.rows`.
    """
    lengths = batch.lengths
    if max(lengths) > longest_unscaled(getattr(model, "config", None)):
        if len(lengths) > 1:  # each by the angles of its own length
            return torch.cat([token_nll(model, document) for document in _apart(batch)])
        reset_angles(model)
    if len(lengths) == 1:  # what every architecture understands
        inputs = {"input_ids": batch.ids[None], "use_cache": False}
    else:
        dtype = model.get_input_embeddings().weight.dtype  # type: ignore[operator]
        inputs = packed_inputs(batch.ids, batch.positions, lengths, dtype=dtype)
    logits = model(**inputs, logits_to_keep=batch.rows).logits[0]
    if logits.shape[0] != batch.rows.shape[0]:  # a model that keeps every row whatever it is told
        logits = logits[batch.rows]
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    return F.cross_entropy(logits, batch.targets, reduction="none")


def _apart(batch: Batch) -> Iterator[Batch]:
    """The documents of a micro-batch, each as one of its own."""
    start = 0
    for number, length in enumerate(batch.lengths):
        own = batch.documents == number
        stop = start + length
        yield Batch(
            ids=batch.ids[start:stop],
            positions=batch.positions[start:stop],
            cu_seqlens=batch.cu_seqlens[number : number + 2] - start,
            rows=batch.rows[own] - start,
            targets=batch.targets[own],
            documents=batch.documents[own] - number,
        )
        start = stop

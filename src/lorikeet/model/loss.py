"""The one loss: nats of every supervised token of a packed micro-batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorikeet.data.batch import Batch
from lorikeet.model.attention import packed_inputs


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
    if len(batch.lengths) == 1:  # what every architecture understands
        inputs = {"input_ids": batch.ids[None], "use_cache": False}
    else:
        dtype = model.get_input_embeddings().weight.dtype  # type: ignore[operator]
        inputs = packed_inputs(batch.ids, batch.positions, batch.lengths, dtype=dtype)
    logits = model(**inputs, logits_to_keep=batch.rows).logits[0]
    if logits.shape[0] != batch.rows.shape[0]:  # a model that keeps every row whatever it is told
        logits = logits[batch.rows]
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    return F.cross_entropy(logits, batch.targets, reduction="none")

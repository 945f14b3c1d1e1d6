"""Output head and cross-entropy of the supervised rows, a few rows at a time.

The logits of a chunk are overwritten by their own gradient, softmax - onehot, from which the
gradient of the hidden rows is formed in the same pass: no [S, V] tensor is ever kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorikeet.kernels import int8, native
from lorikeet.kernels.fused import fused
from lorikeet.kernels.int8 import Int8Weight

CHUNK_BYTES = 24 << 20
"""Size of a chunk of logits: enough rows to make good use of the head's weight, and no more."""

CHUNK_BYTES_GPU = 256 << 20
"""The same on a GPU, which computes many more rows at once; chosen, not measured."""


def head_nll(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    rounded: Int8Weight | None = None,
) -> Tensor:
    """Negative log-likelihood of each target under softmax(hidden weightᵀ + bias), in nats.

    Args:
        hidden: [S, I], the normalised hidden rows.
        weight: [V, I].
        bias: [V], or None.
        targets: int64 [S]; a row whose target is negative counts nothing and has no gradient.
        rounded: the frozen weight in int8, which makes the logits in its place. Their gradient
            goes through the weight itself: probabilities span more than 127 steps.

    Returns:
        float32 [S] (float64 for float64).
    """
    return _HeadNll.apply(hidden, weight, bias, targets, rounded, torch.is_grad_enabled())


class _HeadNll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        rounded: Int8Weight | None,
        training: bool,
    ) -> Tensor:
        wanted = [need and training for need in ctx.needs_input_grad[:3]]
        nll, *gradients = _pass(hidden, weight, bias, targets, None, wanted, rounded)
        ctx.save_for_backward(hidden, weight, bias, targets, *gradients)
        ctx.rounded = rounded
        return nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dnll: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, dhidden, dweight, dbias = ctx.saved_tensors
        if dhidden is not None:
            dhidden = dhidden * dnll[:, None].to(dhidden.dtype)
        if dweight is not None or dbias is not None:
            # These were summed as if every row counted once, which holds up to a common factor.
            if _is_uniform(dnll):
                dweight = None if dweight is None else (dweight * dnll[:1].sum()).to(weight.dtype)
                dbias = (
                    None
                    if dbias is None or bias is None
                    else (dbias * dnll[:1].sum()).to(bias.dtype)
                )
            else:
                wanted = [False, dweight is not None, dbias is not None]
                _, _, dweight, dbias = _pass(
                    hidden, weight, bias, targets, dnll, wanted, ctx.rounded
                )
        return dhidden, dweight, dbias, None, None, None


def chunk_bytes(x: Tensor) -> int:
    """Size of a chunk of logits where x lies."""
    return CHUNK_BYTES_GPU if x.is_cuda else CHUNK_BYTES


def _is_uniform(dnll: Tensor) -> bool:
    """Whether all rows weigh the same; a sum's gradient is one number, which need not be read."""
    return dnll.stride() == (0,) or bool((dnll == dnll[:1]).all())


def _pass(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    row_weights: Tensor | None,
    wanted: list[bool],
    rounded: Int8Weight | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """nll [S] and the wanted gradients of its sum, weighted by row, for hidden, weight and bias."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    nll = hidden.new_empty(hidden.shape[0], dtype=wide)
    dhidden = torch.empty_like(hidden) if wanted[0] else None
    dweight = torch.zeros_like(weight, dtype=wide) if wanted[1] else None
    dbias = torch.zeros_like(bias, dtype=wide) if wanted[2] and bias is not None else None
    rows = max(32, chunk_bytes(hidden) // (weight.shape[0] * weight.element_size()) // 32 * 32)
    room = hidden.new_empty((min(rows, hidden.shape[0]), weight.shape[0]))
    for start in range(0, hidden.shape[0], rows):
        part = slice(start, start + rows)
        logits = room[: len(hidden[part])]
        if rounded is None:
            torch.mm(hidden[part], weight.t(), out=logits)
        else:
            int8.multiply(int8.quantize_rows(hidden[part]), rounded, dtype=hidden.dtype, out=logits)
        if bias is not None:
            logits += bias
        nll[part] = _cross_entropy_(logits, targets[part], gradient=any(wanted))
        if row_weights is not None:
            logits *= row_weights[part, None].to(logits.dtype)
        if dhidden is not None:
            torch.mm(logits, weight, out=dhidden[part])
        if dweight is not None:
            dweight += logits.t() @ hidden[part]
        if dbias is not None:
            dbias += logits.sum(0)
    return nll, dhidden, dweight, dbias


def _cross_entropy_(logits: Tensor, targets: Tensor, *, gradient: bool) -> Tensor:
    """nll [S] of logits [S, V], which become softmax - onehot if the gradient is wanted.

    Rows with a negative target become zeros.
    """
    if native.takes(logits):
        nll = logits.new_empty(logits.shape[0], dtype=torch.float32)
        arguments = (*logits.shape, logits, targets.contiguous(), nll, int(gradient))
        native.call("lk_cross_entropy", native.type_of(logits), *arguments)
        return nll
    if not gradient:
        return _nll(logits, targets)
    step = _in_two_passes_ if logits.is_cuda else _in_place_
    return step(logits, targets)


@fused
def _nll(logits: Tensor, targets: Tensor) -> Tensor:
    return _log_softmax_at(logits, targets)[1]


@fused
def _in_two_passes_(logits: Tensor, targets: Tensor) -> Tensor:
    """For a compiler: no element is written that is not the result."""
    wide, nll = _log_softmax_at(logits, targets)
    hit = torch.arange(logits.shape[1], device=logits.device) == targets[:, None]
    logits.copy_((wide.exp() - hit.to(wide.dtype)).masked_fill((targets < 0)[:, None], 0.0))
    return nll


def _in_place_(logits: Tensor, targets: Tensor) -> Tensor:
    """Operation by operation: as few of them over all elements as can be."""
    wide, nll = _log_softmax_at(logits, targets)
    logits.copy_(wide.exp_())
    at_target = ((-nll).exp() - 1).to(logits.dtype)
    logits.scatter_(1, targets.clamp(min=0)[:, None], at_target[:, None])
    logits[targets < 0] = 0.0
    return nll


def _log_softmax_at(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities [S, V], and the nll of the targets [S]."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    nll = -wide.gather(1, targets.clamp(min=0)[:, None]).squeeze(1)
    return wide, nll.masked_fill(targets < 0, 0.0)

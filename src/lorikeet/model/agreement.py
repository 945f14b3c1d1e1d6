"""Which loss function a model gets: the fast one only where it is seen to compute the same.

The first block of the loaded model is run both ways on random hidden rows of two documents, and the
outputs and all gradients compared; then the losses of the whole model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lorikeet import console
from lorikeet.data.batch import Batch, pack
from lorikeet.data.example import Example
from lorikeet.kernels import attention, fused, native
from lorikeet.model import fast, graphs
from lorikeet.model.attention import packed_inputs
from lorikeet.model.loss import TokenNll, token_nll

_LENGTHS = (37, 11)
_TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 1e-2}  # else 1e-4: relative, of a tensor's norm


def choose_nll(model: Any, *, asked: str, packing: bool) -> tuple[TokenNll, str]:
    """Pick the fast path if it takes the model and agrees with it, else the model's own forward.

    Args:
        model: a loaded transformers model without adapters.
        asked: "auto" or "off".
        packing: whether the model keeps packed documents apart.

    Returns:
        The loss function, and which path that is and why, as words for the user.
    """
    if asked == "off":
        return token_nll, "generic path, as asked"
    reason = fast.refusal(model)
    if reason is None and not packing:
        reason = "its documents cannot share a row"
    if reason is not None:
        return token_nll, f"generic path: {reason}"
    disagreement = _disagreement(model)
    if disagreement is not None:
        console.warn(f"the fast path is not used: {disagreement}")
        return token_nll, "generic path: the fast one disagrees with it here"
    device = next(model.parameters()).device
    return fast.FastNll(), f"fast path, {_on_gpu(model) if device.type == 'cuda' else _on_cpu()}"


def _on_cpu() -> str:
    missing = native.missing()
    return f"kernels in PyTorch ({missing})" if missing else "compiled kernels"


def _on_gpu(model: Any) -> str:
    """What of the GPU's side is in use, and what is not and why."""
    compiler, flash = fused.missing("cuda"), attention.flash_missing()
    return ", ".join(
        [
            f"kernels in PyTorch ({compiler})" if compiler else "compiled kernels",
            f"attention one document at a time ({flash})" if flash else "FlashAttention",
            *(["CUDA graphs in training"] if graphs.suits(model) else []),
        ]
    )


def _disagreement(model: Any) -> str | None:
    """What the fast path computes otherwise than the model, with figures; None if nothing."""
    batch = _batch(model).to(next(model.parameters()).device)
    tolerance = _TOLERANCE.get(next(model.parameters()).dtype, 1e-4)
    try:
        for what, error, allowed in _errors(model, batch):
            if not error <= allowed * tolerance:
                return f"{what} {error:.1e} off (at most {allowed * tolerance:.0e})"
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _errors(model: Any, batch: Batch) -> Iterator[tuple[str, float, float]]:
    """What is compared, how far it is off, and how many tolerances that may be."""
    with torch.enable_grad():  # whatever the caller has switched off
        expected, found = _own_block(model, batch), _fast_block(model, batch)
    for what, own, ours in zip(_names(model), expected, found, strict=True):
        # A bias has the sum over all tokens for its gradient, which may all but cancel.
        allowed = 4.0 if what.endswith(".bias") else 1.0
        yield f"{what} of its first block is", _gap(ours, own, floor=_largest(expected)), allowed
    with torch.no_grad():
        own_nll, fast_nll = token_nll(model, batch), fast.FastNll()(model, batch)
    yield "the losses of its tokens are", _gap(fast_nll, own_nll, floor=0.0), 1.0


def _batch(model: Any) -> Batch:
    size = model.get_input_embeddings().num_embeddings
    examples = []
    for number, length in enumerate(_LENGTHS):
        ids = [(7919 * (i + 1) * (number + 1)) % size for i in range(length)]
        examples.append(Example(tuple(ids), (False,) + (True,) * (length - 1), 0, "probe"))
    return pack(examples)


def _names(model: Any) -> list[str]:
    parameters = [name for name, _ in model.model.layers[0].named_parameters()]
    return [
        "the output",
        "the gradient of the input",
        *(f"the gradient of {n}" for n in parameters),
    ]


def _own_block(model: Any, batch: Batch) -> Sequence[Tensor]:
    body, hidden = model.model, _hidden(model, batch)
    inputs = packed_inputs(batch.ids, batch.positions, batch.lengths, dtype=hidden.dtype)
    output = body.layers[0](
        hidden[None],
        attention_mask=inputs["attention_mask"],
        position_ids=inputs["position_ids"],
        position_embeddings=body.rotary_emb(hidden, inputs["position_ids"]),
        documents=inputs["documents"],
    )
    return _with_gradients(model, output if isinstance(output, Tensor) else output[0], hidden)


def _fast_block(model: Any, batch: Batch) -> Sequence[Tensor]:
    hidden = _hidden(model, batch)
    return _with_gradients(model, fast.first_block(model, hidden, batch), hidden)


def _hidden(model: Any, batch: Batch) -> Tensor:
    """[T, I] random rows of the size that embeddings of trained models have."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(batch.tokens, model.config.hidden_size, generator=generator) / 8
    weight = model.get_input_embeddings().weight
    return rows.to(weight.device, weight.dtype).requires_grad_()


def _with_gradients(model: Any, output: Tensor, hidden: Tensor) -> Sequence[Tensor]:
    """The output [T, I], and the gradients of hidden and of the block's parameters."""
    output = output.view(hidden.shape)
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(output.shape, generator=generator).to(output.device, output.dtype)
    parameters = list(model.model.layers[0].parameters())
    return output, *torch.autograd.grad(output, [hidden, *parameters], weights)


def _largest(tensors: Sequence[Tensor]) -> float:
    return max(float(t.detach().float().norm()) for t in tensors[1:])


def _gap(found: Tensor, expected: Tensor, *, floor: float) -> float:
    """|found - expected| / |expected|.

    A gradient that all but vanishes (a key's bias moves no score against another) is measured
    against a thousandth of the largest one.
    """
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm()) / max(float(expected.norm()), 1e-3 * floor)

"""How examples are laid out in micro-batches changes nothing but rounding."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lorikeet.data import Example, micro_batches, pack
from lorikeet.evaluate import Score, evaluate
from lorikeet.lora import lora_parameters
from lorikeet.model import FastNll, TokenNll
from lorikeet.model.packing import enable_packing
from lorikeet.train import Optimizer

Gradients = dict[str, Tensor]
Step = tuple[float, Gradients]


def gathered(
    model: nn.Module, nll: TokenNll, examples: Sequence[Example], layout: list[list[int]]
) -> Step:
    """Loss and gradients of one optimizer step, as the loop forms them."""
    optimizer = Optimizer(dict(model.named_parameters()))
    supervised = sum(example.supervised_tokens for example in examples)
    nats = 0.0
    for members in layout:
        loss = nll(model, pack([examples[i] for i in members])).sum()
        optimizer.backward(loss / supervised)
        nats += loss.item()
    return nats / supervised, taken(model)


def padded(model: Any, examples: Sequence[Example]) -> Step:
    """Stock transformers: padding on the right, labels of -100, its own loss."""
    longest = max(len(example.ids) for example in examples)
    ids, labels, mask = torch.zeros(3, len(examples), longest, dtype=torch.long)
    labels -= 100
    for row, example in enumerate(examples):
        tokens = torch.tensor(example.ids)
        ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = 1
        labels[row, : len(tokens)] = torch.where(torch.tensor(example.supervised), tokens, -100)
    model.set_attn_implementation("sdpa")
    loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    loss.backward()
    enable_packing(model, device=torch.device("cpu"))
    return loss.item(), taken(model)


def taken(model: nn.Module) -> Gradients:
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return gradients


@pytest.mark.parametrize("method", ["lora", "full"])
def test_every_layout_gives_the_same_step(
    tiny: Callable[..., Any],
    adapted: Callable[..., nn.Module],
    ragged: Callable[..., list[Example]],
    nll: TokenNll,
    method: str,
) -> None:
    model = tiny()
    if method == "lora":
        adapted(model)
    examples = ragged(8)
    two_each = [[0, 1], [2, 3], [4, 5], [6, 7]]
    expected_loss, expected = gathered(model, nll, examples, [list(range(8))])
    assert len(expected) == (len(lora_parameters(model)) or len(list(model.parameters())))
    others = {
        "2 in 4": gathered(model, nll, examples, two_each),
        "one at a time": gathered(model, nll, examples, [[i] for i in range(8)]),
    }
    for name, step in others.items():
        same_step(step, (expected_loss, expected), name)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_stock_transformers_gives_the_same_step(
    tiny: Callable[..., Any],
    adapted: Callable[..., nn.Module],
    ragged: Callable[..., list[Example]],
    nll: TokenNll,
    method: str,
) -> None:
    model = tiny()
    if method == "lora":
        adapted(model)
    if isinstance(nll, FastNll):  # another order of operations rounds otherwise, by 1e-6 in float32
        model.double()
    examples = ragged(8)
    ours = gathered(model, nll, examples, [list(range(8))])
    same_step(padded(model, examples), ours, "padded")


def same_step(found: Step, expected: Step, name: str) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-6), name
    assert distance(found[1], expected[1]) < 1e-6, name
    for key, gradient in found[1].items():  # one tensor's sum may cancel almost to nothing
        assert distance({key: gradient}, expected[1]) < 1e-5, (name, key)


def distance(gradients: Gradients, expected: Gradients) -> float:
    gaps = sum(float((g - expected[n]).square().sum()) for n, g in gradients.items())
    return math.sqrt(gaps / sum(float(expected[n].square().sum()) for n in gradients))


def test_max_tokens_forces_micro_batches(ragged: Callable[..., list[Example]]) -> None:
    same = [example for example in ragged(60, longest=12) if len(example.ids) == 6][:4]
    assert len(same) == 4
    assert micro_batches(same, max_tokens=12) == [[0, 1], [2, 3]]


def test_evaluation_is_the_same_in_every_layout(
    tiny: Callable[..., Any], ragged: Callable[..., list[Example]], nll: TokenNll
) -> None:
    model, examples = tiny(), ragged(33)
    packed = evaluate(model, examples, nll=nll)
    longest = max(len(example.ids) for example in examples)
    others = {
        "one document a row": evaluate(model, examples, packing=False, nll=nll),
        "a few documents a row": evaluate(model, examples, max_tokens=3 * longest, nll=nll),
        "batches of 1": in_batches(model, nll, examples, 1),
        "batches of 3": in_batches(model, nll, examples, 3),
        "batches of 16": in_batches(model, nll, examples, 16),
    }
    for name, score in others.items():
        assert score.nll == pytest.approx(packed.nll, rel=1e-6), name
        assert score.nats == pytest.approx(packed.nats, rel=1e-5), name
        assert score.tokens == packed.tokens, name


def in_batches(model: nn.Module, nll: TokenNll, examples: Sequence[Example], size: int) -> Score:
    scores = [
        evaluate(model, examples[i : i + size], nll=nll) for i in range(0, len(examples), size)
    ]
    return Score(
        nats=np.concatenate([score.nats for score in scores]),
        tokens_per_document=np.concatenate([score.tokens_per_document for score in scores]),
        text_bytes=sum(score.text_bytes for score in scores),
    )

"""Gradients through the whole model against finite differences, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lorikeet.data import pack
from lorikeet.lora import lora_parameters
from lorikeet.model import FastNll, TokenNll


@pytest.mark.parametrize("method", ["lora", "full"])
def test_gradients_are_finite_differences(
    tiny: Callable[..., Any],
    adapted: Callable[..., nn.Module],
    ragged: Callable[..., Any],
    nll: TokenNll,
    method: str,
) -> None:
    model = tiny().double() if isinstance(nll, FastNll) else in_float64(tiny())
    if method == "lora":
        adapted(model, target_modules=["q_proj", "v_proj", "down_proj", "embed_tokens"]).double()
        parameters = lora_parameters(model)
    else:
        parameters = dict(model.named_parameters())
    batch = pack(ragged(5))
    loss = nll(model, batch).sum() / batch.supervised_tokens
    assert loss.dtype == torch.float64
    loss.backward()

    generator = torch.Generator().manual_seed(0)
    for name, parameter in parameters.items():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        assert parameter.grad is not None, name
        analytic = float((parameter.grad * direction).sum())
        numeric = slope(model, nll, batch, parameter, direction)
        assert analytic == pytest.approx(numeric, rel=1e-6, abs=1e-9), name
        assert analytic != 0, name


def in_float64(model: Any) -> nn.Module:
    """transformers' own norm computes in float32 whatever it is given: torch's does not."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ == "LlamaRMSNorm":
                norm = nn.RMSNorm(child.weight.numel(), eps=child.variance_epsilon)
                norm.weight.data.copy_(child.weight)
                setattr(parent, name, norm)
    return model.double()


@torch.no_grad()
def slope(
    model: nn.Module, nll: TokenNll, batch: Any, parameter: Any, direction: Any, h: float = 1e-6
) -> float:
    start = parameter.clone()
    losses = []
    for sign in (1, -1):
        parameter.copy_(start + sign * h * direction)
        losses.append(float(nll(model, batch).sum()) / batch.supervised_tokens)
    parameter.copy_(start)
    return (losses[0] - losses[1]) / (2 * h)

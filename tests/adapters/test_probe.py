from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from lorikeet.adapters import logit_shift
from lorikeet.config import LoraConfig
from lorikeet.errors import AdapterError
from lorikeet.lora import disabled, inject, lora_parameters

Tiny = Callable[[str], PreTrainedModel]
IDS = [1, 5, 9, 2]


def test_it_is_the_difference_of_the_logits(tiny: Tiny) -> None:
    model = tiny("llama").train()
    inject(model, LoraConfig(r=2, dropout=0.5), seed=0)
    for parameter in lora_parameters(model).values():
        torch.nn.init.normal_(parameter, std=0.3)
    shift = logit_shift(model, IDS)
    assert model.training
    model.eval()
    with torch.no_grad():
        tuned = model(torch.tensor([IDS])).logits
        with disabled(model):
            difference = (tuned - model(torch.tensor([IDS])).logits).abs()
    assert shift == (difference.max().item(), difference.mean().item())
    assert 0 < shift.mean < shift.largest


def test_an_adapter_that_changes_nothing_is_an_error(tiny: Tiny) -> None:
    model = tiny("llama")
    inject(model, LoraConfig(r=2), seed=0)
    with pytest.raises(AdapterError, match="changes nothing"):
        logit_shift(model, IDS)


def test_an_adapter_that_breaks_the_model_is_an_error(tiny: Tiny) -> None:
    model = tiny("llama")
    inject(model, LoraConfig(r=2), seed=0)
    for parameter in lora_parameters(model).values():
        torch.nn.init.constant_(parameter, 1e30)
    with pytest.raises(AdapterError, match="not finite"):
        logit_shift(model, IDS)

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import LlamaForCausalLM

from lorikeet.config import LoraConfig
from lorikeet.errors import AdapterError
from lorikeet.lora import (
    LoraEmbedding,
    LoraLinear,
    disabled,
    inject,
    lora_layers,
    lora_parameters,
    remove,
)

Build = Callable[..., LlamaForCausalLM]
IDS = torch.arange(24).reshape(2, 12)
TARGETS = LoraConfig(
    r=3, alpha=6, target_modules=["q_proj", "down_proj", "lm_head", "embed_tokens"]
)


def logits(model: LlamaForCausalLM) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def wake(model: LlamaForCausalLM) -> None:
    """Give every adapter something to say."""
    for parameter in lora_parameters(model).values():
        torch.nn.init.normal_(parameter)


@pytest.mark.parametrize("tied", [True, False])
def test_a_fresh_adapter_changes_nothing(llama: Build, tied: bool) -> None:
    model = llama(tied=tied)
    before = logits(model)
    targets = inject(model, TARGETS, seed=0)
    assert torch.equal(logits(model), before)
    assert [target.name for target in targets] == list(lora_layers(model))
    assert isinstance(model.model.embed_tokens, LoraEmbedding)
    assert isinstance(model.lm_head, LoraLinear)


def test_only_the_adapter_trains(llama: Build) -> None:
    model = llama()
    inject(model, TARGETS, seed=0)
    wake(model)
    model(IDS, labels=IDS).loss.backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == set(lora_parameters(model))
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trained


def test_disabled_is_the_base_bit_for_bit(llama: Build) -> None:
    model = llama(tied=True)
    before = logits(model)
    inject(model, TARGETS, seed=0)
    wake(model)
    adapted = logits(model)
    assert not torch.allclose(adapted, before, atol=0.1)
    with pytest.raises(KeyError), disabled(model):
        with disabled(model):
            pass
        assert torch.equal(logits(model), before)
        raise KeyError
    assert torch.equal(logits(model), adapted)


def test_remove_restores_the_very_modules(llama: Build) -> None:
    model = llama(tied=True)
    before, modules = logits(model), dict(model.named_modules())
    inject(model, TARGETS, seed=0)
    wake(model)
    remove(model)
    after = dict(model.named_modules())
    assert all(after[name] is module for name, module in modules.items())
    assert after.keys() == modules.keys()
    assert torch.equal(logits(model), before)
    inject(model, TARGETS, seed=0)


def test_a_second_adapter_is_refused(llama: Build) -> None:
    model = llama()
    inject(model, TARGETS, seed=0)
    with pytest.raises(AdapterError, match="already carries 6 LoRA layers"):
        inject(model, TARGETS, seed=0)


def test_a_misfit_leaves_the_model_alone(llama: Build) -> None:
    model = llama()
    with pytest.raises(AdapterError):
        inject(model, LoraConfig(target_modules=["q_proj", "nope"]), seed=0)
    assert not lora_layers(model)
    assert all(p.requires_grad for p in model.parameters())


def test_the_seed_alone_decides(llama: Build) -> None:
    def start(seed: int, targets: list[str], dtype: torch.dtype) -> dict[str, torch.Tensor]:
        model = llama().to(dtype)
        state = torch.get_rng_state()
        inject(model, LoraConfig(target_modules=targets), seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        return {name: p.detach().clone() for name, p in lora_parameters(model).items()}

    one = start(7, ["q_proj"], torch.float32)
    torch.manual_seed(99)
    two = start(7, ["embed_tokens", "k_proj", "q_proj"], torch.bfloat16)
    other = start(8, ["q_proj"], torch.float32)
    assert all(torch.equal(two[name], value) for name, value in one.items())
    drawn = [value for name, value in one.items() if name.endswith("lora_A")]
    assert not torch.equal(drawn[0], drawn[1])
    assert not any(torch.equal(other[n], v) for n, v in one.items() if n.endswith("lora_A"))


def test_the_mode_of_the_model_is_kept(llama: Build) -> None:
    model = llama()
    inject(model, TARGETS.model_copy(update={"dropout": 0.5}), seed=0)
    wake(model)
    assert torch.equal(logits(model), logits(model))
    model.train()
    assert not torch.equal(logits(model), logits(model))

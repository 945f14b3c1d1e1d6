"""Named adapters beside one base: the same outputs as each alone, and nothing written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from lorikeet.adapters import AdapterSet, load_adapter, save_adapter
from lorikeet.config import LoraConfig
from lorikeet.errors import AdapterError
from lorikeet.lora import inject, lora_layers, lora_parameters

Tiny = Callable[[str], PreTrainedModel]
Logits = Callable[[nn.Module], torch.Tensor]

CONFIGS = {
    "plain": LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
    "other": LoraConfig(r=2, target_modules=["q_proj", "down_proj", "embed_tokens"]),
    "dora": LoraConfig(r=3, dora=True),
}


@pytest.fixture
def folders(tiny: Tiny, tmp_path: Path) -> dict[str, Path]:
    """Adapters that differ in targets, rank and method."""
    for name, config in CONFIGS.items():
        model = tiny("llama")
        inject(model, config, seed=0)
        for parameter in lora_parameters(model).values():
            nn.init.normal_(parameter, std=0.3)
        save_adapter(model, tmp_path / name, config=config, base_model="tiny", provenance={})
    return {name: tmp_path / name for name in CONFIGS}


def test_each_answers_as_it_does_alone(
    tiny: Tiny, logits: Logits, folders: dict[str, Path]
) -> None:
    expected = {None: logits(tiny("llama"))}
    for name, folder in folders.items():
        alone = tiny("llama")
        load_adapter(alone, folder)
        expected[name] = logits(alone)
    model = tiny("llama")
    before = {name: p.clone() for name, p in model.named_parameters()}
    places = {name: p.data_ptr() for name, p in model.named_parameters()}
    adapters = AdapterSet(model)
    for name, folder in folders.items():
        adapters.load(name, folder)
        assert adapters.active is None  # loading does not switch
    for name in ("plain", "dora", None, "other", "plain", None):
        adapters.use(name)
        assert adapters.active == name
        assert torch.equal(logits(model), expected[name])
    with adapters.using("dora"):
        assert torch.equal(logits(model), expected["dora"])
        with adapters.using("other"):
            assert torch.equal(logits(model), expected["other"])
        assert torch.equal(logits(model), expected["dora"])
    assert torch.equal(logits(model), expected[None])
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert {n: p.data_ptr() for n, p in model.named_parameters()} == places


def test_an_error_inside_the_block_still_switches_back(
    tiny: Tiny, folders: dict[str, Path]
) -> None:
    adapters = AdapterSet(tiny("llama"))
    adapters.load("plain", folders["plain"])
    with pytest.raises(RuntimeError, match="inside"), adapters.using("plain"):
        raise RuntimeError("inside")
    assert adapters.active is None


def test_loading_while_one_is_in_use(tiny: Tiny, logits: Logits, folders: dict[str, Path]) -> None:
    model = tiny("llama")
    adapters = AdapterSet(model)
    adapters.load("plain", folders["plain"])
    adapters.use("plain")
    expected = logits(model)
    adapters.load("other", folders["other"])
    assert adapters.active == "plain"
    assert torch.equal(logits(model), expected)
    adapters.drop("plain")
    assert adapters.active is None
    assert adapters.names == ["other"]
    assert not lora_layers(model)


@pytest.mark.parametrize("name", ["", "../evil", "a/b", ".hidden", "-x", "a b"])
def test_what_is_no_name(tiny: Tiny, folders: dict[str, Path], name: str) -> None:
    adapters = AdapterSet(tiny("llama"))
    with pytest.raises(AdapterError, match="cannot be called"):
        adapters.load(name, folders["plain"])
    assert not adapters.names


def test_what_is_unknown_taken_or_broken(
    tiny: Tiny, logits: Logits, folders: dict[str, Path]
) -> None:
    model = tiny("llama")
    adapters = AdapterSet(model)
    adapters.load("plain", folders["plain"])
    adapters.use("plain")
    expected = logits(model)
    with pytest.raises(AdapterError, match="no adapter 'plian'; loaded: plain"):
        adapters.use("plian")
    with pytest.raises(AdapterError, match="already"):
        adapters.load("plain", folders["other"])
    weights = folders["other"] / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(AdapterError, match="damaged"):
        adapters.load("other", folders["other"])
    assert adapters.names == ["plain"]
    assert adapters.active == "plain"
    assert torch.equal(logits(model), expected)


def test_training_mode_reaches_the_adapter(tiny: Tiny, folders: dict[str, Path]) -> None:
    model = tiny("llama").train()
    adapters = AdapterSet(model)
    adapters.load("plain", folders["plain"])
    adapters.use("plain")
    assert all(layer.training for layer in lora_layers(model).values())
    adapters.use(None)
    model.eval()
    adapters.use("plain")
    assert not any(layer.training for layer in lora_layers(model).values())


def test_a_model_with_an_adapter_is_no_base(tiny: Tiny, folders: dict[str, Path]) -> None:
    model = tiny("llama")
    load_adapter(model, folders["plain"])
    with pytest.raises(AdapterError, match="already carries"):
        AdapterSet(model)

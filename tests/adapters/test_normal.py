"""Adapters in their plain form do what they did before, in our hands and in PEFT's."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import PreTrainedModel

from lorikeet.adapters import (
    Adapter,
    Update,
    load_adapter,
    read_adapter,
    save_adapter,
    write_adapter,
)
from lorikeet.adapters.base_weights import BaseWeights
from lorikeet.adapters.normal import normalize
from lorikeet.config import LoraConfig
from lorikeet.errors import AdapterError, ModelError
from lorikeet.lora import inject, lora_parameters

Tiny = Callable[[str], PreTrainedModel]
Logits = Callable[[nn.Module], Tensor]

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is dep:FutureWarning"),
    pytest.mark.filterwarnings(r"ignore:Unexpected keyword arguments \['lorikeet'\]:UserWarning"),
]


@st.composite
def adapters(draw: st.DrawFn) -> Adapter:
    """Plain LoRA of any ranks and scales."""
    updates: dict[str, Update] = {}
    for module in draw(st.lists(st.sampled_from("abc"), min_size=1, unique=True)):
        r = draw(st.integers(1, 6))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
        A, B = (torch.randn(s, generator=generator) for s in ((r, 5), (7, r)))
        kind: Any = draw(st.sampled_from(["linear", "conv1d", "embedding"]))
        updates[module] = Update(A, B, draw(st.floats(0.01, 30)), kind)
    return Adapter(updates, "some/model", {"template": "chat"}, 0.1)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(adapters())
def test_every_update_stays_what_it_was(adapter: Adapter) -> None:
    found, errors, _ = normalize(adapter)
    assert {update.r for update in found.updates.values()} == {
        max(update.r for update in adapter.updates.values())
    }
    assert {update.scale for update in found.updates.values()} == {1.0}
    assert list(found.updates) == list(adapter.updates)
    assert errors == dict.fromkeys(adapter.updates, 0.0)
    for module, update in adapter.updates.items():
        own = found.updates[module]
        assert own.kind == update.kind
        assert own.A.is_contiguous()
        assert own.B.is_contiguous()
        wanted = update.scale * (update.B.double() @ update.A.double())
        lost = (own.B.double() @ own.A.double() - wanted).norm()
        assert float(lost) <= 1e-6 * update.scale * float(update.A.norm() * update.B.norm())
    assert (found.base_model, found.dropout) == ("some/model", 0.1)
    assert found.provenance["template"] == "chat"
    assert found.provenance["normalized"]["dora"] is False


@settings(deadline=None, max_examples=40, derandomize=True)
@given(adapters(), st.integers(1, 7))
def test_a_plain_adapter_can_be_cut_too(adapter: Adapter, rank: int) -> None:
    found, errors, _ = normalize(adapter, rank=rank)
    assert {u.r for u in found.updates.values()} == {
        max(min(u.r, rank, *u.shape) if u.r > rank else u.r for u in adapter.updates.values())
    }
    for module, update in adapter.updates.items():
        wanted = update.delta().double()
        S = torch.linalg.svdvals(wanted)
        lost = float((found.updates[module].delta() - wanted).norm() / wanted.norm())
        assert lost == pytest.approx(float(S[rank:].norm() / S.norm()), abs=1e-5)
        assert errors[module] == pytest.approx(lost, abs=1e-5)


def test_normalizing_twice_changes_nothing() -> None:
    updates = {"a": Update(torch.randn(2, 5), torch.randn(7, 2), 0.3)}
    once = normalize(Adapter(updates)).adapter
    twice = normalize(once).adapter
    assert torch.equal(twice.updates["a"].A, once.updates["a"].A)
    assert torch.equal(twice.updates["a"].B, once.updates["a"].B)


LORAS: dict[str, tuple[str, dict[str, Any]]] = {
    "rank-stabilised": ("llama", {"rslora": True}),
    "patterns": (
        "llama",
        {"rank_pattern": {"v_proj": 2, "q_proj": 7}, "alpha_pattern": {"o_proj": 3.5}},
    ),
    "head": ("llama", {"target_modules": ["lm_head", "q_proj"]}),
    "transposed": ("gpt2", {"rslora": True}),
    "embedding": ("gpt2", {"target_modules": ["wte", "c_fc"], "rank_pattern": {"wte": 2}}),
}


def trained(model: PreTrainedModel, folder: Path, **options: Any) -> PreTrainedModel:
    """Give the model a random adapter and save that."""
    config = LoraConfig(**{"r": 4, "alpha": 8.0, **options})
    inject(model, config, seed=0)
    generator = torch.Generator().manual_seed(11)
    for name, parameter in lora_parameters(model).items():
        if name.endswith("magnitude"):
            parameter.data *= 1 + 0.2 * torch.rand(parameter.shape, generator=generator)
        else:
            nn.init.normal_(parameter, std=0.3, generator=generator)
    save_adapter(model, folder, config=config, base_model="tiny", provenance={})
    return model


@pytest.mark.parametrize("case", LORAS)
def test_peft_finds_the_same_logits(tiny: Tiny, logits: Logits, tmp_path: Path, case: str) -> None:
    family, options = LORAS[case]
    expected = logits(trained(tiny(family), tmp_path / "a", **options))
    assert not torch.allclose(expected, logits(tiny(family)), atol=1e-2)
    write_adapter(normalize(read_adapter(tmp_path / "a")).adapter, tmp_path / "plain")
    described = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    assert described["lora_alpha"] == described["r"]
    assert not described["rank_pattern"]
    assert not described["alpha_pattern"]
    assert not described["use_rslora"]
    assert not described["use_dora"]
    theirs = peft.PeftModel.from_pretrained(tiny(family), str(tmp_path / "plain"))
    assert_close(logits(theirs), expected, atol=1e-5, rtol=1e-5)
    ours = tiny(family)
    load_adapter(ours, tmp_path / "plain")
    assert_close(logits(ours), expected, atol=1e-5, rtol=1e-5)


DORAS: dict[str, tuple[str, dict[str, Any]]] = {
    "all-linear": ("llama", {"rank_pattern": {"v_proj": 2}}),
    "transposed": ("gpt2", {"rslora": True}),
}


def stored(model: PreTrainedModel) -> Callable[[str], Tensor]:
    return lambda module: model.get_parameter(f"{module}.weight").detach()


@pytest.mark.parametrize("case", DORAS)
def test_a_dora_of_full_rank_is_the_same_model(
    tiny: Tiny, logits: Logits, tmp_path: Path, case: str
) -> None:
    family, options = DORAS[case]
    expected = logits(trained(tiny(family), tmp_path / "a", dora=True, **options))
    found = normalize(read_adapter(tmp_path / "a"), stored(tiny(family)), rank=48)
    assert max(found.errors.values()) < 1e-12
    assert all(update.magnitude is None for update in found.adapter.updates.values())
    assert found.adapter.provenance["normalized"]["dora"] is True
    write_adapter(found.adapter, tmp_path / "plain")
    theirs = peft.PeftModel.from_pretrained(tiny(family), str(tmp_path / "plain"))
    assert_close(logits(theirs), expected, atol=1e-5, rtol=1e-5)
    ours = tiny(family)
    load_adapter(ours, tmp_path / "plain")
    assert_close(logits(ours), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
def test_pefts_dora_of_an_embedding(tiny: Tiny, logits: Logits, tmp_path: Path) -> None:
    config = peft.LoraConfig(
        r=4, target_modules=["embed_tokens", "q_proj"], use_dora=True, task_type="CAUSAL_LM"
    )
    theirs = peft.get_peft_model(tiny("llama"), config).eval()
    for name, parameter in theirs.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1 + 0.2 * torch.rand(parameter.shape)
        elif "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    theirs.save_pretrained(str(tmp_path / "a"))
    adapter = read_adapter(tmp_path / "a")
    assert adapter.updates["model.embed_tokens"].magnitude is not None
    write_adapter(normalize(adapter, stored(tiny("llama")), rank=48).adapter, tmp_path / "plain")
    ours = tiny("llama")
    load_adapter(ours, tmp_path / "plain")
    assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", DORAS)
@pytest.mark.parametrize(("limit", "value"), [("", 0), ("rank", 3), ("error", 0.2)])
def test_a_dora_that_is_cut_says_by_how_much(
    tiny: Tiny, tmp_path: Path, case: str, limit: str, value: float
) -> None:
    family, options = DORAS[case]
    trained(tiny(family), tmp_path / "a", dora=True, **options)
    adapter, weights = read_adapter(tmp_path / "a"), stored(tiny(family))
    found = normalize(adapter, weights, **({limit: value} if limit else {}))
    cut = {"": 2 * 4, "rank": 3}.get(limit, 0)  # twice the largest rank
    for module, update in adapter.updates.items():
        weight = weights(module).double()
        change = update.applied(weights(module)).double() - weight
        plain = found.adapter.updates[module].applied(weights(module)).double() - weight
        S = torch.linalg.svdvals(change)
        lost = float((plain - change).norm() / change.norm())
        assert lost == pytest.approx(found.errors[module], abs=1e-5)
        if limit == "error":
            assert lost <= value + 1e-5
        else:
            assert lost == pytest.approx(float(S[cut:].norm() / S.norm()), abs=1e-5)
    assert max(found.errors.values()) > 0.001
    assert len({update.r for update in found.adapter.updates.values()}) == 1


def test_modules_without_a_magnitude_stay_exact(tiny: Tiny, tmp_path: Path) -> None:
    trained(tiny("llama"), tmp_path / "a", dora=True, target_modules=["q_proj", "v_proj"])
    adapter = read_adapter(tmp_path / "a")
    plain, *_ = adapter.updates
    mixed = {**adapter.updates, plain: replace(adapter.updates[plain], magnitude=None)}
    found = normalize(replace(adapter, updates=mixed), stored(tiny("llama")))
    assert found.errors[plain] == 0
    assert_close(found.adapter.updates[plain].delta(), mixed[plain].delta())


def test_what_cannot_be_made_plain(tiny: Tiny, tmp_path: Path) -> None:
    trained(tiny("llama"), tmp_path / "a", dora=True, target_modules=["q_proj", "v_proj"])
    adapter = read_adapter(tmp_path / "a")
    with pytest.raises(AdapterError) as caught:
        normalize(adapter, rank=0)
    message = str(caught.value)
    assert all(part in message for part in ("rank is 0", "6 modules have magnitudes", "--model"))
    with pytest.raises(AdapterError, match="updates no module"):
        normalize(Adapter({}))
    with pytest.raises(AdapterError) as caught:
        normalize(adapter, lambda module: torch.zeros(16, 16 if "q_proj" in module else 15))
    message = str(caught.value)
    assert "layers.2.self_attn.v_proj: the weight is [16, 15], but the adapter fits" in message
    assert "layers.0.self_attn.v_proj" in message
    one = next(iter(adapter.updates))
    dead = replace(adapter.updates[one], B=torch.zeros(16, 4))
    with pytest.raises(AdapterError, match=f"{one}: the adapted weight is not finite"):
        normalize(Adapter({one: dead}), lambda _: torch.zeros(16, 16))


@pytest.fixture
def model_folder(tiny: Tiny, tmp_path: Path) -> Path:
    tiny("gpt2").save_pretrained(str(tmp_path / "model"))
    return tmp_path / "model"


def test_base_weights_by_name(tiny: Tiny, model_folder: Path) -> None:
    model, weights = tiny("gpt2"), BaseWeights(model_folder)
    for module in ("transformer.h.1.attn.c_attn", "transformer.wte"):
        assert torch.equal(weights(module), model.get_parameter(f"{module}.weight"))


@pytest.mark.parametrize(
    "change", [lambda k: k.removeprefix("transformer."), lambda k: f"model.{k}"]
)
def test_base_weights_of_a_shorter_or_longer_name(
    tiny: Tiny, model_folder: Path, change: Callable[[str], str]
) -> None:
    file = model_folder / "model.safetensors"
    save_file({change(name): t for name, t in load_file(file).items()}, file)
    found = BaseWeights(model_folder)("transformer.h.2.mlp.c_fc")
    assert torch.equal(found, tiny("gpt2").transformer.h[2].mlp.c_fc.weight)


def test_base_weights_in_shards(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("llama")
    model.save_pretrained(str(tmp_path / "shards"), max_shard_size="8KB")
    assert not (tmp_path / "shards" / "model.safetensors").exists()
    weights = BaseWeights(tmp_path / "shards")
    for module in ("model.layers.2.mlp.down_proj", "model.embed_tokens", "lm_head"):
        assert torch.equal(weights(module), model.get_parameter(f"{module}.weight"))


def test_a_tied_heads_weight_is_the_embeddings(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("llama-tied")
    model.save_pretrained(str(tmp_path / "tied"))
    assert torch.equal(BaseWeights(tmp_path / "tied")("lm_head"), model.model.embed_tokens.weight)


def refusal(folder: Path, module: str = "h.0.mlp.c_fc") -> str:
    with pytest.raises((AdapterError, ModelError)) as caught:
        BaseWeights(folder)(module)
    return str(caught.value)


def test_base_weights_that_are_not_there(model_folder: Path, tmp_path: Path) -> None:
    assert "has no weights: expected model.safetensors" in refusal(tmp_path)
    message = refusal(model_folder, "transformer.h.0.mlp.gate")
    assert "the base has no such weight: transformer.h.0.mlp.gate.weight" in message
    file = model_folder / "model.safetensors"
    save_file({"h.0.mlp.c_fc.weight": torch.ones(2, 2, dtype=torch.int8)}, file)
    assert "is int8; needed are weights that are not quantised" in refusal(model_folder)
    file.write_bytes(file.read_bytes()[:20])
    assert "model.safetensors" in refusal(model_folder)

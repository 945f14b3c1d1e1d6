"""Adapters read and written without a model: beside PEFT, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import PreTrainedModel

from lorikeet.adapters import Adapter, Update, load_adapter, read_adapter, write_adapter
from lorikeet.config import LoraConfig
from lorikeet.errors import AdapterError
from lorikeet.lora import inject, lora_layers

Tiny = Callable[[str], PreTrainedModel]
Logits = Callable[[torch.nn.Module], torch.Tensor]

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is dep:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Unexpected keyword arguments:UserWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
]

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "names": ("llama", {"target_modules": ["q_proj", "v_proj"], "use_rslora": True}),
    "patterns": (
        "qwen2",
        {
            "target_modules": ["q_proj", "k_proj"],
            "rank_pattern": {r"layers\.1\..*": 2},
            "alpha_pattern": {"k_proj": 3.5},
        },
    ),
    "dora": ("phi", {"target_modules": ["q_proj", "fc1"], "use_dora": True}),
    "transposed": ("gpt2", {"target_modules": ["c_attn", "c_proj"]}),
    "transposed dora": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "use_dora": True}),
    "whole": (
        "qwen2",
        {
            "target_modules": ["q_proj"],
            "modules_to_save": ["lm_head", "layers.1.mlp"],
            "bias": "all",
        },
    ),
    "embedding": ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
}


def save_theirs(model: PreTrainedModel, folder: Path, **options: Any) -> torch.nn.Module:
    config = peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **options)
    adapted = peft.get_peft_model(model, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(str(folder))
    return adapted.eval()


@pytest.mark.parametrize("case", CASES)
def test_updates_are_what_peft_merges(
    tiny: Tiny, logits: Logits, tmp_path: Path, case: str
) -> None:
    """Every weight that PEFT merges is the base's with our update applied; nothing else moves."""
    family, options = CASES[case]
    merged = save_theirs(tiny(family), tmp_path / "a", **options).merge_and_unload()
    adapter = read_adapter(tmp_path / "a")
    theirs = dict(merged.named_parameters(remove_duplicate=False))
    moved = set()
    for name, weight in tiny(family).named_parameters(remove_duplicate=False):
        module = name.removesuffix(".weight")
        if module in adapter.updates:
            moved.add(module)
            expected = adapter.updates[module].applied(weight.detach())
            assert_close(theirs[name].detach(), expected, atol=1e-5, rtol=1e-5)
        elif name in adapter.whole:
            moved.add(name)
            assert torch.equal(theirs[name].detach(), adapter.whole[name])
        else:
            assert torch.equal(theirs[name], weight)
    assert moved == {*adapter.updates, *adapter.whole}


@pytest.mark.parametrize("case", CASES)
def test_what_is_written_is_the_same_adapter_to_everybody(
    tiny: Tiny, logits: Logits, tmp_path: Path, case: str
) -> None:
    family, options = CASES[case]
    expected = logits(save_theirs(tiny(family), tmp_path / "a", **options))
    adapter = read_adapter(tmp_path / "a")
    write_adapter(adapter, tmp_path / "b")
    model = tiny(family)
    load_adapter(model, tmp_path / "b")
    assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    theirs = peft.PeftModel.from_pretrained(tiny(family), str(tmp_path / "b"))
    assert_close(logits(theirs), expected, atol=1e-5, rtol=1e-5)
    assert same(read_adapter(tmp_path / "b"), adapter)


def same(one: Adapter, two: Adapter) -> bool:
    return (
        one.updates.keys() == two.updates.keys()
        and all(
            a.scale == b.scale
            and a.kind == b.kind
            and torch.equal(a.A, b.A)
            and torch.equal(a.B, b.B)
            and (a.magnitude is None) == (b.magnitude is None)
            and (a.magnitude is None or torch.equal(a.magnitude, b.magnitude))
            for a, b in zip(one.updates.values(), two.updates.values(), strict=True)
        )
        and (
            one.whole.keys() == two.whole.keys()
            and all(torch.equal(tensor, two.whole[name]) for name, tensor in one.whole.items())
        )
    )


@settings(deadline=None, max_examples=30, derandomize=True)
@given(
    ranks=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    scales=st.lists(st.floats(1e-3, 1e3), min_size=5, max_size=5),
)
def test_any_ranks_and_scales_come_back(
    tmp_path_factory: pytest.TempPathFactory, ranks: list[int], scales: list[float]
) -> None:
    folder = tmp_path_factory.mktemp("adapter") / "a"
    updates = {
        f"model.layers.{i}.q_proj": Update(torch.randn(r, 6), torch.randn(5, r), scale)
        for i, (r, scale) in enumerate(zip(ranks, scales, strict=False))
    }
    write_adapter(Adapter(updates), folder)
    for module, update in read_adapter(folder).updates.items():
        assert update.r == updates[module].r
        expected = updates[module].delta()
        assert (update.delta() - expected).norm() <= 1e-6 * expected.norm()


def test_a_file_holds_the_factors_and_nothing_more(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("llama")
    inject(model, LoraConfig(r=4), seed=0)
    updates = {
        name: Update(layer.lora_A.detach(), layer.lora_B.detach(), layer.scale)
        for name, layer in lora_layers(model).items()
    }
    adapter = Adapter(updates)
    write_adapter(adapter, tmp_path / "a")
    numbers = sum(t.numel() for t in load_file(tmp_path / "a/adapter_model.safetensors").values())
    expected = sum(4 * sum(update.shape) for update in updates.values())
    assert numbers == adapter.size == expected


def test_a_files_size_is_that_of_its_ranks(tmp_path: Path) -> None:
    """30 blocks of width 576, as SmolLM-135M has them, at rank 16."""
    sizes = {"q_proj": (576, 576), "k_proj": (192, 576), "v_proj": (192, 576), "o_proj": (576, 576)}
    sizes |= {"gate_proj": (1536, 576), "up_proj": (1536, 576), "down_proj": (576, 1536)}
    updates = {
        f"model.layers.{block}.{leaf}": Update(torch.randn(16, i), torch.randn(o, 16), 1.0)
        for block in range(30)
        for leaf, (o, i) in sizes.items()
    }
    write_adapter(Adapter(updates), tmp_path / "a")
    expected = 4 * 16 * 30 * sum(map(sum, sizes.values()))
    found = sum(path.stat().st_size for path in (tmp_path / "a").iterdir())
    assert expected <= found < 1.02 * expected


def break_key(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    tensors["base_model.model.x.lora_C.weight"] = tensors.pop(sorted(tensors)[0])


def break_prefix(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    for key in list(tensors):
        tensors[key.removeprefix("base_model.")] = tensors.pop(key)


def break_rank(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    config["r"] = 5


def break_value(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    tensors[sorted(tensors)[1]][0, 0] = torch.nan


def break_type(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    key = sorted(tensors)[1]
    tensors[key] = tensors[key].to(torch.int32)


def break_dora(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    config["use_dora"] = True


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (break_key, ["missing (1)", "unexpected (1)", "lora_C"]),
        (break_prefix, ["no tensor of a LoRA", "unexpected (12)"]),
        (break_rank, ["misshapen (6)", "not rank 5"]),
        (break_value, ["not finite (1)"]),
        (break_type, ["not floating-point (1)"]),
        (break_dora, ["missing (6)", "lora_magnitude_vector"]),
    ],
)
def test_a_damaged_adapter_is_refused_with_all_findings(
    tiny: Tiny,
    tmp_path: Path,
    damage: Callable[[dict[str, torch.Tensor], dict[str, Any]], None],
    named: list[str],
) -> None:
    save_theirs(tiny("llama"), tmp_path / "a", target_modules=["q_proj", "v_proj"])
    weights, described = (
        tmp_path / "a" / f"adapter_{n}" for n in ("model.safetensors", "config.json")
    )
    tensors, config = load_file(weights), json.loads(described.read_text())
    damage(tensors, config)
    save_file(tensors, weights)
    described.write_text(json.dumps(config))
    with pytest.raises(AdapterError) as caught:
        read_adapter(tmp_path / "a")
    assert all(part in str(caught.value) for part in named)


def test_what_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no module"):
        write_adapter(Adapter({}), tmp_path / "a")
    bad = Update(torch.full((1, 2), torch.inf), torch.ones(3, 1), 1.0)
    with pytest.raises(AdapterError, match=r"not finite \(1\)"):
        write_adapter(Adapter({"x": bad}), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_an_update_of_another_shape() -> None:
    update = Update(torch.ones(1, 2), torch.ones(3, 1), 1.0)
    with pytest.raises(AdapterError, match=r"\[2, 3\], but the adapter fits \[3, 2\]"):
        update.applied(torch.zeros(2, 3))

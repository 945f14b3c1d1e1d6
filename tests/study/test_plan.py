"""The plan against what really happens on a model small enough to run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lorikeet import starter
from lorikeet.config import load_config
from lorikeet.data.batch import pack
from lorikeet.data.example import Example
from lorikeet.lora import inject
from lorikeet.model import load_model, token_nll
from lorikeet.model.footprint import saved_bytes, saved_bytes_per_token
from lorikeet.model.packing import enable_packing
from lorikeet.study.plan import plan

TOKENS = 256


def settings(**options: object) -> dict[str, object]:
    return {"model.path": str(starter.folder()), "model.dtype": "fp32", **options}


@pytest.mark.parametrize("fast", ["auto", "off"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_activations_are_what_autograd_saves(method: str, fast: str) -> None:
    """One document of real tokens through the real model, its saved tensors added up."""
    options = {"train.method": method, "data.max_length": TOKENS, "model.fast": fast}
    config = load_config(overrides=settings(**options))
    base = load_model(starter.folder(), dtype="fp32", device="cpu", fast=fast)
    if method == "lora":
        inject(base.model, config.lora, seed=0)
    else:
        base.model.requires_grad_(True)
    own = {p.untyped_storage().data_ptr() for p in base.model.parameters()}
    saved: dict[int, int] = {}
    kept = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
        return tensor

    # The fast path runs the last block's MLP for supervised rows only; the other path would add
    # the logits of all rows to the activations.
    supervised = [fast == "auto"] * (TOKENS - 1) + [True]
    example = Example(tuple(range(TOKENS)), (False, *supervised[1:]), 0, "row")
    base.model.train()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        base.nll(base.model, pack([example])).sum()
    planned = plan(config).memory.activations / (TOKENS * config.train.batch_size)
    assert planned == pytest.approx(sum(saved.values()) / TOKENS, rel=0.1)


def test_activations_grow_with_the_tokens_and_not_faster() -> None:
    from lorikeet.model import empty_model

    def measured(tokens: int) -> int:
        model = empty_model(starter.folder(), dtype="fp32")
        model.requires_grad_(True)
        return saved_bytes_per_token(model, tokens=tokens)

    assert measured(128) == pytest.approx(measured(512), rel=0.02)


def test_memory_of_weights_and_optimizer() -> None:
    lora = plan(load_config(overrides=settings(**{"lora.r": 8})))
    full = plan(load_config(overrides=settings(**{"train.method": "full"})))
    base = lora.parameters.base
    assert lora.memory.weights == full.memory.weights == 4 * base
    assert lora.memory.adapter == 4 * lora.parameters.trainable
    assert lora.memory.optimizer == 12 * lora.parameters.trainable  # two moments, a gradient
    assert full.parameters.trainable == base
    assert full.memory.optimizer == 12 * base


def test_the_data_sets_the_tokens(tmp_path: Path) -> None:
    row = json.dumps({"prompt": "Say plum.", "completion": "plum"})
    data = tmp_path / "rows.jsonl"
    data.write_text(f"{row}\n" * 20, encoding="utf-8")
    with_data = plan(load_config(overrides=settings(**{"data.path": str(data)})))
    without = plan(load_config(overrides=settings()))
    assert with_data.workload.step_tokens < without.workload.step_tokens / 10
    assert with_data.workload.step_supervised < with_data.workload.step_tokens
    assert with_data.memory.total < without.memory.total


def test_tokens_that_are_trained_are_counted() -> None:
    """Ids that the small vocabulary of the timed block lacks, and tokens that the model lacks."""
    without = plan(load_config(overrides=settings()))
    for options, base in (
        ({"lora.trainable_tokens": "700,701"}, 0),
        ({"lora.new_tokens": "<tool>,</tool>"}, 2 * 256),
    ):
        found = plan(load_config(overrides=settings(**options)))
        assert found.parameters.base == without.parameters.base + base
        assert found.parameters.trainable == without.parameters.trainable + 2 * 256
        assert found.memory.logits > without.memory.logits  # the head is no plain product


_SIZES = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
_GROUPED = {**_SIZES, "intermediate_size": 24, "num_key_value_heads": 1, "pad_token_id": 0}
_MPT = {"vocab_size": 61, "d_model": 16, "n_layers": 2, "n_heads": 2}
_GPT_J = {"vocab_size": 61, "n_embd": 16, "n_layer": 2, "n_head": 2, "rotary_dim": 4}
_GPT_NEO = {"vocab_size": 61, "hidden_size": 16, "num_layers": 2, "num_heads": 2}
_MAMBA = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}
_SCALED = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
CONFIGS: dict[str, transformers.PretrainedConfig] = {
    "soft-capped scores": transformers.Gemma2Config(**_GROUPED, head_dim=8),
    "no exchange": transformers.GPTJConfig(**_GPT_J),
    "no exchange, local": transformers.GPTNeoConfig(
        **_GPT_NEO, attention_types=[[["global", "local"], 1]]
    ),
    "alibi": transformers.MptConfig(**_MPT),
    "linear layers of its own": transformers.FalconConfig(**_SIZES),
    "no attention": transformers.MambaConfig(**_MAMBA),
    "experts": transformers.MixtralConfig(**_GROUPED, num_local_experts=4),
    "angles by length": transformers.LlamaConfig(**_GROUPED, rope_parameters=_SCALED),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_models_that_keep_their_own_attention(name: str, tmp_path: Path) -> None:
    """Planned is what a document alone keeps of a model that cannot pack, else of a full row."""
    CONFIGS[name].save_pretrained(tmp_path)
    options = {"model.path": str(tmp_path), "model.fast": "off", "data.max_length": 64}
    config = load_config(overrides=settings(**options, **{"train.batch_size": 2}))
    found = plan(config)

    model: Any = transformers.AutoModelForCausalLM.from_config(CONFIGS[name])
    packing = enable_packing(model.eval(), device=torch.device("cpu"))
    assert packing == (name in ("experts", "angles by length"))
    assert found.workload.micro_tokens == (128 if packing else 64)
    inject(model, config.lora, seed=0)
    model.train()
    document = Example(tuple(i % 61 for i in range(64)), (False,) * 63 + (True,), 0, "row")
    with saved_bytes(model) as count:
        token_nll(model, pack([document] * (found.workload.micro_tokens // 64)))
        assert found.memory.activations == pytest.approx(count(), rel=0.15)
    assert found.seconds_per_step > 0

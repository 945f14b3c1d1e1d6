"""Layouts beside transformers and llama.cpp, the inverse, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import SIZES, logits_of, random_model, tensors_of, write_model
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from lorikeet.errors import ModelError
from lorikeet.export.architectures import ARCHITECTURES
from lorikeet.export.layout import arranged, lay_out, restored
from lorikeet.export.llama_cpp import LlamaCpp, find

SCALED = {"factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}
YARN = {**SCALED, "rope_type": "yarn"}
LLAMA3 = {**SCALED, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 2.0],
    "long_factor": [2.0 + i for i in range(8)],
}
PHI3 = {**SIZES, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GEMMA = {**SIZES, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16}
PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}
GEMMA3_LINEAR = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}

CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "llama, tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama, biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "llama, wide heads": LlamaConfig(**SIZES, head_dim=24),
    "llama, llama3": LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    "llama, linear": LlamaConfig(**SIZES, rope_parameters=LINEAR),
    "llama, yarn": LlamaConfig(**SIZES, rope_parameters=YARN),
    "llama, yarn and its scale": LlamaConfig(
        **SIZES, rope_parameters={**YARN, "attention_factor": 1.5}
    ),
    "llama, longrope": LlamaConfig(
        **SIZES, rope_parameters={**LONG, "original_max_position_embeddings": 300}
    ),
    "mistral": MistralConfig(**SIZES, head_dim=16, sliding_window=None),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen2, yarn": Qwen2Config(**SIZES, rope_parameters=YARN),
    "qwen3": Qwen3Config(**SIZES, head_dim=32),
    "gemma": GemmaConfig(**SIZES, head_dim=32),
    "gemma2": Gemma2Config(**{**GEMMA, "num_hidden_layers": 4}),
    "gemma3": Gemma3TextConfig(**{**GEMMA, "num_hidden_layers": 7}),
    "gemma3, linear": Gemma3TextConfig(
        **{**GEMMA, "num_hidden_layers": 7}, rope_parameters=GEMMA3_LINEAR
    ),
    "phi3": Phi3Config(**PHI3),
    "phi3, longrope": Phi3Config(
        **PHI3, original_max_position_embeddings=300, rope_parameters=LONG
    ),
    "phi3, partly turned": Phi3Config(**PHI3 | {"num_attention_heads": 2}, rope_parameters=PARTIAL),
}


def shapes_of(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def llama_shapes(**more: int) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """A config.json and the shapes that belong to it."""
    config = {**LlamaConfig(**SIZES).to_dict(), **more}
    return config, shapes_of(tensors_of(random_model(LlamaConfig(**SIZES))))


@pytest.mark.skipif(find() is None, reason="needs xllamacpp or llama-cpp-python")
@pytest.mark.parametrize("name", CONFIGS)
def test_llama_cpp_computes_what_transformers_does(name: str, tmp_path: Path) -> None:
    model = random_model(CONFIGS[name])
    write_model(tmp_path / "model.gguf", model)
    ids = torch.randint(320, (90,), generator=torch.Generator().manual_seed(2)).tolist()
    expected = logits_of(model, ids)
    with LlamaCpp(tmp_path / "model.gguf", context=128, threads=1) as llama:
        found = llama.logits(ids)
    # llama.cpp looks GELU up in a table of float16.
    tolerance = 2e-3 if "gemma" in name else 3e-5
    assert (found - expected).abs().max() < tolerance * expected.abs().max()
    assert expected.std() > 0.5


@pytest.mark.parametrize("name", ["llama, biases", "qwen3", "gemma3", "phi3"])
def test_the_way_back(name: str) -> None:
    model = random_model(CONFIGS[name])
    tensors = tensors_of(model)
    layout = lay_out(model.config.to_dict(), shapes_of(tensors))
    assert {placed.source for placed in layout.placed} == set(tensors)
    assert len({placed.name for placed in layout.placed}) == len(tensors)
    for placed in layout.placed:
        there = arranged(placed, tensors[placed.source])
        assert there.shape == placed.shape
        torch.testing.assert_close(
            restored(placed, there), tensors[placed.source], rtol=0, atol=1e-7
        )


def test_the_old_way_to_write_rope() -> None:
    """transformers 4 wrote `rope_theta` and `rope_scaling` with `type`."""
    for new in (LLAMA3, YARN, LINEAR):
        config, shapes = llama_shapes()
        before = lay_out(config | {"rope_parameters": new}, shapes)
        del config["rope_parameters"]
        old = {key: value for key, value in new.items() if key != "rope_theta"}
        old["type"] = old.pop("rope_type")
        after = lay_out(config | {"rope_theta": 1e4, "rope_scaling": old}, shapes)
        assert before.metadata == after.metadata
        assert before.made.keys() == after.made.keys()
        assert all(torch.equal(before.made[key], after.made[key]) for key in before.made)


def test_both_ways_to_write_rope() -> None:
    """transformers then takes the old one whole, its type too."""
    config, shapes = llama_shapes()
    alone = config | {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 5e5}
    both = alone | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    del alone["rope_parameters"]
    assert LlamaConfig(**both).rope_parameters == LlamaConfig(**alone).rope_parameters
    assert lay_out(both, shapes).metadata == lay_out(alone, shapes).metadata


def test_gemma3s_old_way_to_write_rope() -> None:
    model = random_model(CONFIGS["gemma3, linear"])
    config, shapes = model.config.to_dict(), shapes_of(tensors_of(model))
    before = lay_out(config, shapes)
    del config["rope_parameters"]
    config |= {"rope_theta": 1e6, "rope_local_base_freq": 1e4}
    config["rope_scaling"] = {"rope_type": "linear", "factor": 8.0}
    assert lay_out(config, shapes).metadata == before.metadata


def test_a_config_that_leaves_defaults_out() -> None:
    config, shapes = llama_shapes()
    for key in ("rms_norm_eps", "rope_parameters", "tie_word_embeddings", "head_dim"):
        config.pop(key)
    found = lay_out(config, shapes).metadata
    assert found["llama.attention.layer_norm_rms_epsilon"].value == 1e-6
    assert found["llama.rope.freq_base"].value == 10_000
    assert found["llama.attention.key_length"].value == 16


def test_names_without_the_prefix_and_buffers() -> None:
    config, shapes = llama_shapes()
    bare = {name.removeprefix("model."): shape for name, shape in shapes.items()}
    bare["layers.0.self_attn.rotary_emb.inv_freq"] = (8,)
    layout = lay_out(config, bare)
    sources = {placed.name: placed.source for placed in layout.placed}
    assert sources["blk.1.attn_q.weight"] == "layers.1.self_attn.q_proj.weight"


def test_a_head_that_is_tied_is_left_out() -> None:
    config, shapes = llama_shapes()
    layout = lay_out(config | {"tie_word_embeddings": True}, shapes)
    assert "output.weight" not in {placed.name for placed in layout.placed}
    untied = lay_out(config | {"tie_word_embeddings": False}, shapes)
    assert "output.weight" in {placed.name for placed in untied.placed}


def window_notes(config: PretrainedConfig, **changes: Any) -> tuple[str, ...]:
    model = random_model(config)
    return lay_out(model.config.to_dict() | changes, shapes_of(tensors_of(model))).notes


def test_a_window_that_llama_cpp_ignores_is_noted() -> None:
    mistral = MistralConfig(**SIZES, head_dim=16, sliding_window=None)
    assert window_notes(mistral) == ()
    assert "the last 128 tokens" in window_notes(mistral, sliding_window=128)[0]
    assert window_notes(mistral, sliding_window=512) == ()
    assert "the last 100 tokens" in window_notes(Phi3Config(**PHI3), sliding_window=100)[0]
    qwen = Qwen2Config(**SIZES)
    assert window_notes(qwen, sliding_window=128) == ()
    assert window_notes(qwen, sliding_window=128, use_sliding_window=True)
    long = CONFIGS["phi3, longrope"]
    assert "give it at most 300" in window_notes(long)[0]


def refusal(config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> tuple[str, ...]:
    with pytest.raises(ModelError) as caught:
        lay_out(config, shapes)
    return caught.value.problems or (str(caught.value),)


def test_everything_wrong_with_tensors_is_said_at_once() -> None:
    config, shapes = llama_shapes()
    del shapes["model.norm.weight"]
    shapes["model.layers.0.mlp.up_proj.weight"] = (64, 96)
    shapes["model.layers.1.self_attn.q_proj.bias"] = (64,)
    shapes["score.weight"] = (2, 64)
    shapes["model.layers.2.input_layernorm.weight"] = (64,)
    assert refusal(config, shapes) == (
        "the checkpoint lacks model.norm.weight [64]",
        "model.layers.0.mlp.up_proj.weight is [64, 96]; config.json implies [96, 64]",
        "model.layers.1.self_attn.q_proj.bias [64] has no place in this architecture",
        "score.weight [2, 64] has no place in this architecture",
        "model.layers.2.input_layernorm.weight [64] has no place in this architecture",
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"hidden_act": "gelu"}, "the activation function is gelu"),
        ({"num_key_value_heads": 3}, "4 heads cannot share 3"),
        ({"quantization_config": {"quant_method": "awq"}}, "the checkpoint is quantised (awq)"),
        ({"num_local_experts": 8}, "mixture of experts"),
        ({"hidden_size": "64"}, "hidden_size in config.json is '64'"),
        ({"num_hidden_layers": None}, "num_hidden_layers in config.json is None"),
        ({"vocab_size": -1}, "vocab_size in config.json is -1"),
        ({"rms_norm_eps": None}, "rms_norm_eps in config.json is None"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type is dynamic"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_type linear are incomplete"),
        ({"rope_parameters": {**YARN, "beta_fast": 16}}, "yarn's beta_fast is 16"),
        ({"rope_parameters": {**YARN, "truncate": False}}, "yarn's truncate is False"),
        ({"rope_parameters": LONG | {"long_factor": [1.0]}}, "need 8 numbers each"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "expected a causal language"),
        ({"model_type": "qwen2", "head_dim": 32}, "are not the hidden size 64"),
        ({"model_type": "qwen3", "attention_bias": True}, "no output bias"),
        ({"model_type": "qwen2", "rope_parameters": LLAMA3}, "runs default, linear, yarn"),
        ({"model_type": "gemma", "hidden_act": "silu"}, "gelu_pytorch_tanh"),
        ({"model_type": "gemma", "tie_word_embeddings": False}, "ties the head"),
        (
            {"model_type": "gemma2", "layer_types": ["full_attention"] * 2},
            "each layer whose number 2 divides",
        ),
        ({"model_type": "gemma2", "query_pre_attn_scalar": 5}, "query_pre_attn_scalar is 5"),
        (
            {"model_type": "gemma2", "attn_logit_softcapping": None},
            "attn_logit_softcapping is None",
        ),
        ({"model_type": "gemma3_text", "attn_logit_softcapping": 9.0}, "does not cap"),
        ({"model_type": "gemma3_text", "sliding_window": None}, "sliding_window is None"),
        ({"model_type": "gemma", "use_bidirectional_attention": True}, "attends causally"),
    ],
)
def test_options_that_llama_cpp_does_not_run(changes: dict[str, Any], expected: str) -> None:
    config, shapes = llama_shapes()
    assert any(expected in problem for problem in refusal(config | changes, shapes))


ODD = [None, True, -1, 0, 2**70, 1.5, float("nan"), "", "x", [], [None], {}, {"a": 1}]


@pytest.mark.parametrize(
    "name", ["llama, llama3", "qwen2, yarn", "gemma2", "gemma3", "phi3, longrope"]
)
def test_whatever_a_config_says_the_answer_is_a_layout_or_a_refusal(name: str) -> None:
    config = CONFIGS[name].to_dict()
    shapes = shapes_of(tensors_of(random_model(CONFIGS[name])))
    scaling = config["rope_parameters"].get("full_attention", config["rope_parameters"])
    trials = [config | {key: value} for key in config for value in ODD]
    trials += [
        config | {"rope_parameters": scaling | {key: value}} for key in scaling for value in ODD
    ]
    refused = 0
    for trial in trials:
        try:
            lay_out(trial, shapes)
        except ModelError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize("model_type", ["gpt2", "mixtral", None, ["llama"]])
def test_architectures_that_are_not_supported(model_type: Any) -> None:
    config, shapes = llama_shapes()
    (message,) = refusal(config | {"model_type": model_type, "num_local_experts": 8}, shapes)
    assert all(name in message for name in ARCHITECTURES)
    assert "mixtures of experts are not exported" in message


def test_keys_of_a_known_model(shared: Callable[[str], Path]) -> None:
    config = json.loads((shared("shapes/smollm-135m") / "config.json").read_text())
    layout = lay_out(config, smollm_shapes())
    found = {key: field.value for key, field in layout.metadata.items()}
    assert found == {
        "general.architecture": "llama",
        "general.type": "model",
        "llama.block_count": 30,
        "llama.context_length": 2048,
        "llama.embedding_length": 576,
        "llama.feed_forward_length": 1536,
        "llama.vocab_size": 49152,
        "llama.attention.head_count": 9,
        "llama.attention.head_count_kv": 3,
        "llama.attention.key_length": 64,
        "llama.attention.value_length": 64,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": 64,
        "llama.rope.freq_base": 10_000.0,
    }


def smollm_shapes() -> dict[str, tuple[int, ...]]:
    block = {
        "input_layernorm.weight": (576,),
        "self_attn.q_proj.weight": (576, 576),
        "self_attn.k_proj.weight": (192, 576),
        "self_attn.v_proj.weight": (192, 576),
        "self_attn.o_proj.weight": (576, 576),
        "post_attention_layernorm.weight": (576,),
        "mlp.gate_proj.weight": (1536, 576),
        "mlp.up_proj.weight": (1536, 576),
        "mlp.down_proj.weight": (576, 1536),
    }
    found = {f"model.layers.{i}.{name}": shape for i in range(30) for name, shape in block.items()}
    return {"model.embed_tokens.weight": (49152, 576), "model.norm.weight": (576,), **found}

"""The types of tensors against llama-quantize's own choices (`mixtures.json`)."""

from __future__ import annotations

import json
import shutil
from typing import Any

import gguf
import pytest
from mixture_tables import MODELS, TABLE, Model, asked, joined

from lorikeet.errors import ConfigError
from lorikeet.gguf.mixture import KINDS, Assigned, assign, file_type

FLOATS = ("f32", "f16", "bf16")
QUANTISED = [kind for kind in KINDS if kind not in FLOATS]


@pytest.fixture(scope="module")
def tables() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
    return found


def assigned(kind: str, model: Model) -> Assigned:
    return assign(
        kind,
        model.tensors(),
        architecture=model.architecture,
        layers=model.layers,
        heads=model.heads,
        kv_heads=model.kv_heads,
        experts=model.experts,
        importance=model.importance,
    )


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", QUANTISED)
def test_types_are_those_of_llama_quantize(name: str, kind: str, tables: dict[str, Any]) -> None:
    types = assigned(kind, MODELS[name]).types
    assert list(types) == [tensor for tensor, _ in MODELS[name].tensors()]
    assert joined(dict(types)) == tables[name][kind]


@pytest.mark.skipif(not shutil.which("llama-quantize"), reason="no llama-quantize on the PATH")
@pytest.mark.parametrize("name", MODELS)
def test_the_table_is_what_llama_quantize_says(name: str, tables: dict[str, Any]) -> None:
    chosen = asked("llama-quantize", MODELS[name], QUANTISED)
    assert {kind: joined(types) for kind, types in chosen.items()} == tables[name]


def test_the_order_of_the_tensors_does_not_matter() -> None:
    model = MODELS["TinyLlama-1.1B"]
    turned = assign(
        "q4_k_m", model.tensors()[::-1], architecture="llama", layers=22, heads=32, kv_heads=4
    )
    assert turned.types == assigned("q4_k_m", model).types


@pytest.mark.parametrize("kind", FLOATS)
def test_float_files_keep_norms_and_biases_in_float32(kind: str) -> None:
    types = assigned(kind, MODELS["Qwen2-0.5B"]).types
    small = {name for name in types if "norm" in name or name.endswith("bias")}
    assert {types[name] for name in small} == {"F32"}
    assert {types[name] for name in set(types) - small} == {kind.upper()}


def test_the_gate_of_experts_stays_float32() -> None:
    assert assigned("q2_k", MODELS["Mixtral-8x7B"]).types["blk.0.ffn_gate_inp.weight"] == "F32"


def test_fallbacks_are_named_with_what_they_would_have_been() -> None:
    found = assigned("q4_k_m", MODELS["SmolLM-135M"])
    assert found.fallbacks["blk.0.attn_q.weight"] == "Q4_K"
    assert found.types["blk.0.attn_q.weight"] == "Q5_0"
    assert found.fallbacks["blk.0.attn_v.weight"] == "Q6_K"
    assert found.types["blk.0.attn_v.weight"] == "Q8_0"
    assert not any("ffn_down" in name for name in found.fallbacks)
    assert not assigned("q4_k_m", MODELS["TinyLlama-1.1B"]).fallbacks


def test_rows_that_fit_no_block_become_float16() -> None:
    found = assigned("q6_k", MODELS["stories260k"])
    assert found.types["blk.0.ffn_down.weight"] == "F16"
    assert found.fallbacks["blk.0.ffn_down.weight"] == "Q6_K"


def test_a_single_row_is_no_matrix() -> None:
    found = assign(
        "q8_0", [("score.weight", (1, 64))], architecture="llama", layers=1, heads=1, kv_heads=1
    )
    assert found.types == {"score.weight": "F32"}


def test_file_types_are_numbered_as_in_gguf() -> None:
    assert file_type("f32") == gguf.LlamaFileType.ALL_F32
    assert file_type("q4_k_m") == 15
    assert file_type("q2_k") == gguf.LlamaFileType.MOSTLY_Q2_K
    assert len({file_type(kind) for kind in KINDS}) == len(KINDS)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match="q4_k_m"):
        file_type("q4_k_x")
    with pytest.raises(ConfigError, match="q9_9 is not a type of file"):
        assign("q9_9", [], architecture="llama", layers=1, heads=1, kv_heads=1)

"""GGUF LoRAs in a stock llama.cpp, beside the adapter in Lorikeet; and what the format refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from random_models import SIZES, logits_of, random_model, tensors_of, write_model
from torch import Tensor
from transformers import (
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from lorikeet.adapters import (
    Adapter,
    BaseWeights,
    Tokens,
    Update,
    load_adapter,
    normalize,
    read_adapter,
)
from lorikeet.errors import AdapterError, ModelError
from lorikeet.export.gguf_adapter import export_adapter
from lorikeet.export.llama_cpp import LlamaCpp, find
from lorikeet.gguf.metadata import Field
from lorikeet.gguf.read import open_gguf

needs_llama_cpp = pytest.mark.skipif(find() is None, reason="needs xllamacpp or llama-cpp-python")

# PEFT 0.21 asks a transformers model for a property that transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is dep:FutureWarning")

IDS = [5, 300, 17, 17, 1, 256, 90, 44, 45, 46]
FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SIZES, tie_word_embeddings=False),
    "llama-tied": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**SIZES, tie_word_embeddings=False),
    "gemma": lambda: GemmaConfig(**SIZES, head_dim=32, hidden_act="gelu_pytorch_tanh"),
    "gemma3": lambda: Gemma3TextConfig(
        **SIZES, head_dim=32, sliding_window=64, query_pre_attn_scalar=32
    ),
    "phi3": lambda: Phi3Config(**SIZES, pad_token_id=0, tie_word_embeddings=False),
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    "every linear layer": ("llama", {"target_modules": "all-linear"}),
    "rank-stabilised": ("llama", {"target_modules": ["k_proj", "o_proj"], "use_rslora": True}),
    "patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "k_proj", "v_proj", "down_proj"],
            "rank_pattern": {"q_proj": 7, "layers.1.mlp.down_proj": 1},
            "alpha_pattern": {"v_proj": 3, "k_proj": 0.5},
        },
    ),
    "both": (
        "llama",
        {
            "target_modules": "all-linear",
            "use_rslora": True,
            "rank_pattern": {"up_proj": 3},
            "alpha_pattern": {"layers.0.self_attn.q_proj": 1},
        },
    ),
    "embedding": (
        "llama",
        {"target_modules": ["embed_tokens", "q_proj"], "alpha_pattern": {"q_proj": 5}},
    ),
    "head": ("llama", {"target_modules": ["lm_head", "gate_proj"]}),
    "tied": ("llama-tied", {"target_modules": "all-linear"}),
    "qwen2": ("qwen2", {"target_modules": "all-linear"}),
    "gemma": ("gemma", {"target_modules": "all-linear"}),
    "gemma3": ("gemma3", {"target_modules": "all-linear"}),
    "phi3": ("phi3", {"target_modules": "all-linear"}),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """The folder of a family's base, and its GGUF file."""
    made: dict[str, tuple[Path, Path]] = {}

    def make(family: str) -> tuple[Path, Path]:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            model = random_model(FAMILIES[family]())
            model.save_pretrained(folder)
            write_model(folder / "base.gguf", model)
            made[family] = folder, folder / "base.gguf"
        return made[family]

    return make


def adapt(model: PreTrainedModel, folder: Path, **options: Any) -> None:
    """An adapter of PEFT's with random factors."""
    config = peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **options)
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    adapted.save_pretrained(str(folder), save_embedding_layers=False)


def spread(found: Tensor, expected: Tensor) -> float:
    """The largest difference, in parts of the largest logit."""
    return float((found - expected).abs().max() / expected.abs().max())


@needs_llama_cpp
@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_llama_cpp_computes_what_we_do(
    bases: Callable[[str], tuple[Path, Path]], tmp_path: Path, case: str
) -> None:
    family, options = CASES[case]
    folder, base = bases(family)
    adapt(random_model(FAMILIES[family]()), tmp_path / "adapter", **options)
    adapter = read_adapter(tmp_path / "adapter")
    model = random_model(FAMILIES[family]())
    before = logits_of(model, IDS)
    load_adapter(model, tmp_path / "adapter")
    expected = logits_of(model, IDS)
    done = export_adapter(folder, adapter, tmp_path / "a.gguf")
    assert done.modules == len(adapter.updates)
    assert done.size == (tmp_path / "a.gguf").stat().st_size
    with LlamaCpp(base, adapter=tmp_path / "a.gguf", threads=1) as llama:
        found = llama.logits(IDS)
    assert spread(before, expected) > 0.01
    # llama.cpp looks GELU, which Gemma has, up in a table of float16
    assert spread(found, expected) < (3e-4 if family.startswith("gemma") else 1e-5)


@needs_llama_cpp
def test_float16(bases: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    folder, base = bases("llama")
    adapt(random_model(), tmp_path / "adapter", target_modules="all-linear")
    adapter = read_adapter(tmp_path / "adapter")
    model = random_model()
    load_adapter(model, tmp_path / "adapter")
    export_adapter(folder, adapter, tmp_path / "a.gguf", kind="f16")
    assert {t.type for t in open_gguf(tmp_path / "a.gguf").tensors.values()} == {"F16"}
    with LlamaCpp(base, adapter=tmp_path / "a.gguf", threads=1) as llama:
        assert spread(llama.logits(IDS), logits_of(model, IDS)) < 2e-3


def update(r: int = 2, *, out: int = 64, fan_in: int = 64, scale: float = 2.0) -> Update:
    return Update(torch.randn(r, fan_in), torch.randn(out, r), scale)


def layer(name: str, number: int = 0) -> str:
    return f"model.layers.{number}.{name}"


def plain() -> Adapter:
    return Adapter({layer("self_attn.o_proj"): update(), layer("self_attn.q_proj"): update()})


def test_what_is_written(bases: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    adapter = plain()
    done = export_adapter(bases("llama")[0], adapter, tmp_path / "a.gguf")
    file = open_gguf(tmp_path / "a.gguf")
    assert file.metadata == {
        "general.architecture": Field("str", "llama"),
        "general.type": Field("str", "adapter"),
        "adapter.type": Field("str", "lora"),
        "adapter.lora.alpha": Field("f32", 4.0),
        "general.file_type": Field("u32", 0),
    }
    own = adapter.updates[layer("self_attn.o_proj")]
    shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
    assert shapes == {
        "blk.0.attn_q.weight.lora_a": (2, 64),
        "blk.0.attn_q.weight.lora_b": (64, 2),
        "blk.0.attn_output.weight.lora_a": (2, 64),
        "blk.0.attn_output.weight.lora_b": (64, 2),
    }
    assert torch.equal(file.rows("blk.0.attn_output.weight.lora_a", 0, 2), own.A)
    assert torch.equal(file.rows("blk.0.attn_output.weight.lora_b", 0, 64), own.B)
    assert done.summary()["ranks"] == {"2": 2}
    assert (done.alpha, done.rescaled, done.architecture) == (4.0, 0, "llama")


@needs_llama_cpp
def test_a_scale_of_zero_is_none(bases: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    """llama.cpp takes an alpha of 0 for a scale of 1."""
    folder, base = bases("llama")
    off = {layer("self_attn.o_proj"): update(scale=0.0)}
    half = {**off, layer("self_attn.q_proj"): update(scale=-0.5)}
    with LlamaCpp(base, threads=1) as llama:
        expected = llama.logits(IDS)
    export_adapter(folder, Adapter(off), tmp_path / "off")
    with LlamaCpp(base, adapter=tmp_path / "off", threads=1) as llama:
        assert torch.equal(llama.logits(IDS), expected)
    assert export_adapter(folder, Adapter(half), tmp_path / "half").alpha == -1.0
    weights = tensors_of(random_model())
    name = layer("self_attn.q_proj")
    model = random_model()
    model.load_state_dict(
        weights | {f"{name}.weight": half[name].applied(weights[f"{name}.weight"])}
    )
    with LlamaCpp(base, adapter=tmp_path / "half", threads=1) as llama:
        assert spread(llama.logits(IDS), logits_of(model, IDS)) < 1e-5


def refused(model: Path, adapter: Adapter, tmp_path: Path) -> str:
    with pytest.raises(AdapterError) as caught:
        export_adapter(model, adapter, tmp_path / "a.gguf")
    assert not (tmp_path / "a.gguf").exists()
    return str(caught.value)


def test_what_the_format_cannot_carry_is_all_named(
    bases: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    dora = replace(update(), magnitude=torch.ones(64))
    broken = replace(update(), A=torch.full((2, 64), torch.nan))
    adapter = Adapter(
        {layer("self_attn.q_proj"): dora, layer("self_attn.o_proj"): broken},
        whole={layer("self_attn.q_proj.bias"): torch.ones(64), "model.norm.weight": torch.ones(64)},
        tokens=(Tokens("model.embed_tokens", (3, 4), torch.ones(2, 64)),),
    )
    message = refused(bases("llama")[0], adapter, tmp_path)
    for finding in (
        "without --adapter-only",
        "DoRA: 1 modules have magnitudes",
        "lorikeet adapter normalize DIR --model BASE --out OTHER",
        "trained biases (1): model.layers.0.self_attn.q_proj.bias",
        "model.norm.weight",
        "rows of single tokens (1): model.embed_tokens (2)",
        "factors that are not finite",
    ):
        assert finding in message
    assert "no updates at all" in refused(bases("llama")[0], Adapter({}), tmp_path)


def test_the_way_out_for_dora(bases: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    folder, _ = bases("llama")
    name = layer("self_attn.q_proj")
    norms = tensors_of(random_model())[f"{name}.weight"].norm(dim=1)
    dora = Adapter({name: replace(update(), magnitude=norms * 1.1)})
    assert "DoRA" in refused(folder, dora, tmp_path)
    plain_lora = normalize(dora, BaseWeights(folder)).adapter
    assert export_adapter(folder, plain_lora, tmp_path / "a.gguf").ranks == {4: 1}


@pytest.mark.parametrize("family", ["llama-tied", "gemma"])
def test_one_of_a_tied_pair_is_refused(
    bases: Callable[[str], tuple[Path, Path]], tmp_path: Path, family: str
) -> None:
    table = Update(torch.randn(2, 320), torch.randn(64, 2), 1.0, "embedding")
    head = Update(torch.randn(2, 64), torch.randn(320, 2), 1.0)
    for adapter in (Adapter({"model.embed_tokens": table}), Adapter({"lm_head": head})):
        message = refused(bases(family)[0], adapter, tmp_path)
        assert "embedding and head share one weight" in message


@needs_llama_cpp
def test_llama_cpp_aborts_where_we_refuse(
    bases: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    """If this fails, an embedding that the head shares can be adapted, and need not be refused."""
    table = Update(torch.randn(2, 320), torch.randn(64, 2), 1.0, "embedding")
    export_adapter(bases("llama")[0], Adapter({"model.embed_tokens": table}), tmp_path / "a.gguf")
    tied = bases("llama-tied")[1]
    with (
        LlamaCpp(tied, adapter=tmp_path / "a.gguf", threads=1) as llama,
        pytest.raises(ModelError, match="it ended with SIGABRT") as caught,
    ):
        llama.logits(IDS)
    assert "GGML_ASSERT" in str(caught.value)


def test_an_adapter_of_another_model(
    bases: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    adapter = Adapter({layer("self_attn.q_proj", 9): update(), layer("mlp.up_proj"): update()})
    message = refused(bases("llama")[0], adapter, tmp_path)
    assert "model.layers.9.self_attn.q_proj" in message
    assert "model.layers.0.mlp.up_proj.weight is [96, 64], the adapter fits [64, 64]" in message


def test_numbers_beyond_float16(bases: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    name = layer("self_attn.o_proj")
    adapter = Adapter({name: replace(update(), A=torch.full((2, 64), 1e6))})
    with pytest.raises(AdapterError, match=f"the update of {name}.weight cannot be stored as f16"):
        export_adapter(bases("llama")[0], adapter, tmp_path / "a.gguf", kind="f16")

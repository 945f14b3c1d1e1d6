"""Merging into a folder: base and adapter's logits, the base's bytes, nothing by halves."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, PreTrainedModel

from lorikeet.adapters import Adapter, checkpoint, read_adapter, save_adapter
from lorikeet.adapters.adapter import Tokens
from lorikeet.adapters.merge import merge
from lorikeet.config import LoraConfig
from lorikeet.lora import inject, lora_layers, lora_parameters, whole_parameters

Tiny = Callable[[str], PreTrainedModel]
Logits = Callable[[torch.nn.Module], torch.Tensor]

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is dep:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Unexpected keyword arguments:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
]

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama dora": ("llama", {"dora": True}),
    "llama, embedding": ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
    "llama, head": ("llama", {"target_modules": ["q_proj", "lm_head"]}),
    "llama tied": ("llama-tied", {}),
    "llama tied, embedding": ("llama-tied", {"target_modules": ["q_proj", "embed_tokens"]}),
    "llama tied, head": ("llama-tied", {"target_modules": ["q_proj", "lm_head"]}),
    "llama tied, both": ("llama-tied", {"target_modules": ["lm_head", "embed_tokens"]}),
    "qwen2": ("qwen2", {"target_modules": ["q_proj", "v_proj"], "rslora": True}),
    "gpt2": ("gpt2", {}),
    "gpt2 dora": ("gpt2", {"dora": True}),
    "gpt2, embedding": ("gpt2", {"target_modules": ["c_attn", "wte"]}),
    "gpt2, positions": ("gpt2", {"target_modules": ["c_attn", "wpe"]}),
    "opt, embedding": ("opt", {"target_modules": ["q_proj", "embed_tokens"]}),
    "llama, whole head": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "llama tied, whole head": (
        "llama-tied",
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ),
    "opt, whole embedding": (
        "opt",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ),
    "llama, norms": (
        "llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]},
    ),
    "gpt2, biases": ("gpt2", {"target_modules": ["c_attn"], "bias": "all"}),
    "phi, biases": ("phi", {"target_modules": ["q_proj", "fc1"], "bias": "lora_only"}),
    "gemma3, embedding": ("gemma3", {"target_modules": ["q_proj", "embed_tokens"]}),
}


def save_base(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(str(folder))
    (folder / "tokenizer.json").write_text('{"made": "up"}')
    return folder


def save_tuned(model: PreTrainedModel, folder: Path, **options: Any) -> PreTrainedModel:
    """Adapt a model at random and save the adapter; the model keeps it."""
    config = LoraConfig(**{"r": 4, "alpha": 8.0, **options})
    inject(model, config, seed=0)
    generator = torch.Generator().manual_seed(11)
    for parameter in [*lora_parameters(model).values(), *whole_parameters(model).values()]:
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    save_adapter(model, folder, config=config, base_model="tiny", provenance={"a": "é"})
    return model


def load(folder: Path) -> PreTrainedModel:
    """The model as anybody loads it, every weight from the file."""
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return model.eval()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= {name: t.clone() for name, t in load_file(path).items()}  # not mapped
    return found


@pytest.mark.parametrize("case", CASES)
def test_the_logits_of_base_and_adapter(
    tiny: Tiny, logits: Logits, tmp_path: Path, case: str
) -> None:
    family, options = CASES[case]
    base = save_base(tiny(family), tmp_path / "base")
    before = weights(base)
    plain = logits(tiny(family))
    tuned = save_tuned(tiny(family), tmp_path / "adapter", **options)
    expected = logits(tuned)
    assert not torch.allclose(expected, plain, atol=1e-2)
    report = merge(base, read_adapter(tmp_path / "adapter"), tmp_path / "out")
    assert_close(logits(load(tmp_path / "out")), expected, atol=1e-5, rtol=1e-5)
    # The adapted weights are the layers' own, all others the base's to the bit.
    after = weights(tmp_path / "out")
    whole = whole_parameters(tuned)
    assert set(report.merged) == set(lora_layers(tuned)) | set(whole)
    assert all(torch.equal(after.pop(name), parameter) for name, parameter in whole.items())
    for name, layer in lora_layers(tuned).items():
        merged = layer.merged().weight
        assert_close(after.pop(f"{name}.weight"), merged, atol=1e-6, rtol=1e-6)
    for name, tensor in after.items():
        if name not in before:  # the head, untied
            embeddings = ("embed_tokens.weight", "wte.weight")
            name = next(own for own in before if own.endswith(embeddings))
        assert torch.equal(tensor, before[name]), name
    # PEFT computes the same, not merged; its merging would change both of two tied weights.
    theirs = peft.PeftModel.from_pretrained(tiny(family), str(tmp_path / "adapter"))
    assert_close(logits(theirs), expected, atol=1e-5, rtol=1e-5)
    if not report.untied:
        assert_close(logits(theirs.merge_and_unload()), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("case", "untied"),
    [(case, "tied," in case or case.startswith(("gpt2, emb", "opt", "gemma3"))) for case in CASES],
)
def test_what_was_tied_is_untied_only_if_it_must(
    tiny: Tiny, tmp_path: Path, case: str, untied: bool
) -> None:
    family, options = CASES[case]
    base = save_base(tiny(family), tmp_path / "base")
    save_tuned(tiny(family), tmp_path / "adapter", **options)
    report = merge(base, read_adapter(tmp_path / "adapter"), tmp_path / "out")
    assert report.untied == untied
    names = set(weights(tmp_path / "out"))
    config, before = ((p / "config.json").read_bytes() for p in (tmp_path / "out", base))
    if untied:
        assert names - set(weights(base)) == {"lm_head.weight"}
        assert json.loads(config) == {**json.loads(before), "tie_word_embeddings": False}
    else:
        assert names == set(weights(base))
        assert config == before


def test_untying_a_model_whose_file_has_both_weights(
    tiny: Tiny, logits: Logits, tmp_path: Path
) -> None:
    base = save_base(tiny("llama-tied"), tmp_path / "base")
    both = weights(base)
    both["lm_head.weight"] = both["model.embed_tokens.weight"].clone()
    save_file(both, base / "model.safetensors", metadata={"format": "pt"})
    tuned = save_tuned(tiny("llama-tied"), tmp_path / "a", target_modules=["embed_tokens"])
    assert merge(base, read_adapter(tmp_path / "a"), tmp_path / "out").untied
    assert_close(logits(load(tmp_path / "out")), logits(tuned), atol=1e-5, rtol=1e-5)


def test_adapters_of_peft(tiny: Tiny, logits: Logits, tmp_path: Path) -> None:
    base = save_base(tiny("llama-tied"), tmp_path / "base")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"], task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(tiny("llama-tied"), config).eval()
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    theirs.save_pretrained(str(tmp_path / "a"))
    adapter = read_adapter(tmp_path / "a")
    assert adapter.copies  # PEFT writes the base's embedding, too
    merge(base, adapter, tmp_path / "out")
    assert_close(logits(load(tmp_path / "out")), logits(theirs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "opt"])
@pytest.mark.parametrize("twins", [False, True])
def test_rows_of_single_tokens(
    tiny: Tiny,
    logits: Logits,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    twins: bool,
) -> None:
    """They take the places of the base's, in a head that shares the weight as well."""
    monkeypatch.setattr(checkpoint, "_BLOCK_VALUES", 5 * 16)
    base, model = save_base(tiny(family), tmp_path / "base"), tiny(family)
    state = weights(base)
    embedding = next(n for n in state if n.endswith(("embed_tokens.weight", "wte.weight")))
    if twins and family != "llama":  # as pickles have it: both names, one weight
        state["lm_head.weight"] = state[embedding].clone()
        save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    ids, rows = (3, 47, 11), torch.randn(3, 16)
    model.get_input_embeddings().weight.data[list(ids)] = rows
    tokens = Tokens(embedding.removesuffix(".weight"), ids, rows)
    report = merge(base, Adapter({}, tokens=(tokens,)), tmp_path / "out")
    assert report.merged == (tokens.module,)
    assert not report.untied
    assert_close(logits(load(tmp_path / "out")), logits(model), atol=1e-5, rtol=1e-5)
    assert torch.equal(weights(tmp_path / "out")[embedding], model.get_input_embeddings().weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block", [3 * 24, 1 << 20])
def test_half_precision_is_rounded_once(
    tiny: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    block: int,
) -> None:
    """Bit for bit the rounded float32 sum, also in blocks of a few rows.

    Factors of few bits have exact products, so that no order of summation rounds another way.
    """
    monkeypatch.setattr(checkpoint, "_BLOCK_VALUES", block)
    base = save_base(tiny("gpt2").to(dtype), tmp_path / "base")
    before = weights(base)
    save_tuned(tiny("gpt2"), tmp_path / "a", target_modules=["c_attn", "c_fc", "wte"])
    adapter = read_adapter(tmp_path / "a")
    few = {
        module: replace(u, A=(u.A * 16).round() / 16, B=(u.B * 16).round() / 16)
        for module, u in adapter.updates.items()
    }
    report = merge(base, replace(adapter, updates=few), tmp_path / "out")
    assert report.dtypes == ({torch.bfloat16: "BF16", torch.float16: "F16"}[dtype],)
    after = weights(tmp_path / "out")
    for module, update in few.items():
        name = f"{module}.weight"
        delta = update.scale * (update.B.double() @ update.A.double()).float()
        expected = (before[name].float() + delta.t()).to(dtype)
        assert after[name].dtype == dtype
        assert torch.equal(after[name], expected)
    assert not torch.equal(after["transformer.wte.weight"], before["transformer.wte.weight"])


def test_blocks_of_dora_rows(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_BLOCK_VALUES", 24)
    for family in ("llama", "gpt2"):
        base = save_base(tiny(family), tmp_path / family)
        tuned = save_tuned(tiny(family), tmp_path / "a", dora=True)
        merge(base, read_adapter(tmp_path / "a"), tmp_path / "out")
        after = weights(tmp_path / "out")
        for name, layer in lora_layers(tuned).items():
            merged = layer.merged().weight
            assert_close(after[f"{name}.weight"], merged, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("sharded_in", [False, True])
@pytest.mark.parametrize("sharded_out", [False, True])
@pytest.mark.parametrize("pickled", [False, True])
def test_shards_and_pickles(
    tiny: Tiny,
    logits: Logits,
    tmp_path: Path,
    sharded_in: bool,
    sharded_out: bool,
    pickled: bool,
) -> None:
    base = tmp_path / "base"
    model = tiny("llama-tied")
    model.save_pretrained(str(base), max_shard_size="6KB" if sharded_in else "1GB")
    assert (len(list(base.glob("*.safetensors"))) > 2) == sharded_in
    if pickled:
        to_pickles(base)
    tuned = save_tuned(tiny("llama-tied"), tmp_path / "a", target_modules=["q_proj", "lm_head"])
    report = merge(
        base,
        read_adapter(tmp_path / "a"),
        tmp_path / "out",
        shard_bytes=9_000 if sharded_out else 1 << 30,
    )
    files = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert files == sorted(report.files)
    if sharded_out:
        assert len(files) > 3
        assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        found = weights(tmp_path / "out")
        assert set(index["weight_map"]) == set(found)
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in found.values())
        for file in files:
            assert (tmp_path / "out" / file).stat().st_size <= 9_000
    else:
        assert files == ["model.safetensors"]
    assert_close(logits(load(tmp_path / "out")), logits(tuned), atol=1e-5, rtol=1e-5)


def to_pickles(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    for path in folder.glob("*.safetensors"):
        name = path.name.replace("model", "pytorch_model").replace(".safetensors", ".bin")
        torch.save(load_file(path), folder / name)
        path.unlink()
    if index.exists():
        tree = json.loads(index.read_text())
        tree["weight_map"] = {
            name: file.replace("model", "pytorch_model").replace(".safetensors", ".bin")
            for name, file in tree["weight_map"].items()
        }
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(tree))
        index.unlink()


def test_old_pickles_that_share_storage(tiny: Tiny, logits: Logits, tmp_path: Path) -> None:
    base = save_base(tiny("llama-tied"), tmp_path / "base")
    state = tiny("llama-tied").state_dict()
    assert state["lm_head.weight"].data_ptr() == state["model.embed_tokens.weight"].data_ptr()
    (base / "model.safetensors").unlink()
    torch.save(state, base / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    tuned = save_tuned(tiny("llama-tied"), tmp_path / "a", target_modules=["embed_tokens"])
    merge(base, read_adapter(tmp_path / "a"), tmp_path / "out")
    assert_close(logits(load(tmp_path / "out")), logits(tuned), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("target", ["c_attn", "wte", "lm_head"])
def test_files_without_the_models_prefix(
    tiny: Tiny, logits: Logits, tmp_path: Path, target: str
) -> None:
    """GPT-2's own file says `h.0.attn.c_attn.weight`, the model `transformer.h.0...`."""
    base = save_base(tiny("gpt2"), tmp_path / "base")
    state = {k.removeprefix("transformer."): t for k, t in weights(base).items()}
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    tuned = save_tuned(tiny("gpt2"), tmp_path / "a", target_modules=[target])
    merge(base, read_adapter(tmp_path / "a"), tmp_path / "out")
    assert set(state) <= set(weights(tmp_path / "out"))
    assert_close(logits(load(tmp_path / "out")), logits(tuned), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["gpt-neox", "gpt-neox-tied"])
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["dense", "lm_head"]},
        {"target_modules": ["dense"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["dense"], "trainable_tokens": {"lm_head": [3, 5]}},
    ],
    ids=["adapted", "whole", "tokens"],
)
def test_a_head_that_files_have_under_another_name(
    tiny: Tiny, logits: Logits, tmp_path: Path, family: str, options: dict[str, Any]
) -> None:
    """GPT-NeoX's files say `embed_out.weight`, the model of transformers 5 `lm_head.weight`."""
    base = save_base(tiny(family), tmp_path / "base")
    tuned = save_tuned(tiny(family), tmp_path / "a", **options)
    merge(base, read_adapter(tmp_path / "a"), tmp_path / "out")
    assert "lm_head.weight" not in weights(tmp_path / "out") or family == "gpt-neox-tied"
    assert_close(logits(load(tmp_path / "out")), logits(tuned), atol=1e-5, rtol=1e-5)


def test_biases_of_files_without_the_models_prefix(
    tiny: Tiny, logits: Logits, tmp_path: Path
) -> None:
    base = save_base(tiny("gpt2"), tmp_path / "base")
    state = {k.removeprefix("transformer."): t for k, t in weights(base).items()}
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    tuned = save_tuned(tiny("gpt2"), tmp_path / "a", target_modules=["c_attn"], bias="all")
    merge(base, read_adapter(tmp_path / "a"), tmp_path / "out")
    assert set(weights(tmp_path / "out")) == set(state)
    assert_close(logits(load(tmp_path / "out")), logits(tuned), atol=1e-5, rtol=1e-5)

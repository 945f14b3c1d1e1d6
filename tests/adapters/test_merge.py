"""Merging into a folder: base and adapter's logits, the base's bytes, nothing by halves."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lorikeet.adapters import Adapter, Update, read_adapter, save_adapter, write_adapter
from lorikeet.adapters import merge as merge_module
from lorikeet.adapters.merge import merge
from lorikeet.adapters.safe import Content, open_safe, write_safe
from lorikeet.config import LoraConfig
from lorikeet.errors import AdapterError, ConfigError, ModelError, StorageError
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


@pytest.fixture
def base(tiny: Tiny, tmp_path: Path) -> Path:
    return save_base(tiny("llama"), tmp_path / "base")


@pytest.fixture
def adapter(tiny: Tiny, tmp_path: Path) -> Adapter:
    save_tuned(tiny("llama"), tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    return read_adapter(tmp_path / "adapter")


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
    monkeypatch.setattr(merge_module, "_BLOCK_VALUES", block)
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
    monkeypatch.setattr(merge_module, "_BLOCK_VALUES", 24)
    for family in ("llama", "gpt2"):
        base = save_base(tiny(family), tmp_path / family)
        tuned = save_tuned(tiny(family), tmp_path / "a", dora=True)
        merge(base, read_adapter(tmp_path / "a"), tmp_path / "out")
        after = weights(tmp_path / "out")
        for name, layer in lora_layers(tuned).items():
            merged = layer.merged().weight
            assert_close(after[f"{name}.weight"], merged, atol=1e-6, rtol=1e-6)


def test_untouched_tensors_keep_their_bytes(base: Path, adapter: Adapter, tmp_path: Path) -> None:
    """Also those that torch could not have read: nothing is decoded to be copied."""
    contents = {
        name: Content("F32", tuple(t.shape), lambda t=t: [t]) for name, t in weights(base).items()
    }
    contents["odd"] = Content("F4", (4,), lambda: [b"\x12\x34"])
    contents["nan"] = Content("F32", (1,), lambda: [b"\x01\x00\xa0\x7f"])  # a signalling NaN
    write_safe(base / "model.safetensors", contents, metadata={})
    merge(base, adapter, tmp_path / "out")
    before, after = (open_safe(p / "model.safetensors") for p in (base, tmp_path / "out"))
    assert list(before.entries) == list(after.entries)
    changed = {name for name in before.entries if [*before.raw(name)] != [*after.raw(name)]}
    assert changed == {f"{module}.weight" for module in adapter.updates}


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


def test_the_other_files(base: Path, adapter: Adapter, tmp_path: Path) -> None:
    for name in (
        "README.md chat_template.jinja tokenizer.model vocab.txt LICENSE modeling_x.py a.gguf"
        " b.onnx c.bin training_args.bin adapter_config.json pytorch_model.bin.index.json"
    ).split():
        (base / name).write_text(name)
    (base / "onnx").mkdir()
    (base / "onnx" / "config.json").write_text("{}")
    merge(base, adapter, tmp_path / "out")
    found = {path.name for path in (tmp_path / "out").iterdir()}
    copied = set(
        "chat_template.jinja tokenizer.model vocab.txt LICENSE modeling_x.py tokenizer.json"
        " generation_config.json config.json".split()
    )
    assert found == copied | {"model.safetensors", "lorikeet.json"}
    assert all((tmp_path / "out" / n).read_bytes() == (base / n).read_bytes() for n in copied)
    note = json.loads((tmp_path / "out" / "lorikeet.json").read_text(encoding="utf-8"))
    assert note["base"] == str(base)
    assert note["adapter"] == {"base_model": "tiny", "provenance": {"a": "é"}}
    assert note["versions"]["torch"] == torch.__version__


def refused(base: Path, adapter: Adapter, out: Path) -> str:
    with pytest.raises(AdapterError) as caught:
        merge(base, adapter, out)
    assert not out.exists()
    assert not list(out.parent.glob(".*"))
    return str(caught.value)


def test_every_misfit_is_listed(base: Path, adapter: Adapter, tmp_path: Path) -> None:
    state = weights(base)
    names = sorted(adapter.updates)
    state[f"{names[0]}.weight"] = torch.zeros(4, 4)
    state[f"{names[1]}.weight"] = torch.zeros(16, 24, dtype=torch.int8)
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    stranger = Update(torch.zeros(2, 16), torch.zeros(16, 2), 1.0)
    updates = {**adapter.updates, "model.layers.7.mlp.up_proj": stranger}
    copies = {"model.embed_tokens.weight": torch.zeros(48, 16), "x.y.weight": torch.zeros(1)}
    message = refused(base, replace(adapter, updates=updates, copies=copies), tmp_path / "out")
    for part in (
        f"misshapen (1): {names[0]}.weight is [4, 4], the adapter fits [16, 24]",
        f"not a plain floating-point weight (quantised?) (1): {names[1]}.weight is I8",
        "the base has no such weight (2): model.layers.7.mlp.up_proj.weight, x.y.weight",
        "base weights that differ from the model's (resized or retrained?) (1): model.embed",
    ):
        assert part in message, message


def test_what_was_trained_whole_must_fit_too(base: Path, adapter: Adapter, tmp_path: Path) -> None:
    name = sorted(adapter.updates)[0]
    whole = {
        "model.norm.weight": torch.ones(15),
        "lm_head.bias": torch.ones(48),
        f"{name}.weight": torch.zeros(16, 24),
    }
    message = refused(base, replace(adapter, whole=whole), tmp_path / "out")
    assert "misshapen (1): model.norm.weight is [16], the adapter fits [15]" in message
    assert "the base has no such weight (1): lm_head.bias" in message
    assert f"adapted twice (1): {name}.weight" in message
    far = {"model.norm.weight": torch.full((16,), torch.inf)}
    message = refused(base, replace(adapter, whole=far), tmp_path / "out")
    assert "the merged model.norm.weight has values that are not finite" in message


def test_a_scalar_that_was_trained(base: Path, adapter: Adapter, tmp_path: Path) -> None:
    state = weights(base) | {"temperature": torch.tensor(1.5)}
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    merge(base, replace(adapter, whole={"temperature": torch.tensor(2.5)}), tmp_path / "out")
    assert weights(tmp_path / "out")["temperature"] == torch.tensor(2.5)


def test_two_updates_of_one_tensor(base: Path, adapter: Adapter, tmp_path: Path) -> None:
    name = sorted(adapter.updates)[0]
    twice = {**adapter.updates, name.removeprefix("model."): adapter.updates[name]}
    message = refused(base, replace(adapter, updates=twice), tmp_path / "out")
    assert f"adapted twice (1): {name}.weight" in message


def test_a_quantised_base(base: Path, adapter: Adapter, tmp_path: Path) -> None:
    edit_config(base, quantization_config={"quant_method": "gptq"})
    assert "the base is quantised" in refused(base, adapter, tmp_path / "out")


def edit_config(base: Path, **values: object) -> None:
    path = base / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_an_embedding_that_may_be_tied_by_another_name(tiny: Tiny, tmp_path: Path) -> None:
    base = save_base(tiny("llama-tied"), tmp_path / "base")
    state = weights(base)
    state["model.tokens.weight"] = state.pop("model.embed_tokens.weight")
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    update = Update(torch.ones(2, 48), torch.ones(16, 2), 1.0, "embedding")
    message = refused(base, Adapter({"model.tokens": update}), tmp_path / "out")
    assert (
        "cannot tell whether embedding and head share this weight (1): model.tokens.weight"
        in message
    )


def test_a_copy_in_a_coarser_type_is_a_copy(base: Path, adapter: Adapter, tmp_path: Path) -> None:
    saved = weights(base)["model.embed_tokens.weight"].bfloat16()
    merge(base, replace(adapter, copies={"model.embed_tokens.weight": saved}), tmp_path / "out")


def test_a_sum_out_of_range(tiny: Tiny, adapter: Adapter, tmp_path: Path) -> None:
    base = save_base(tiny("llama").half(), tmp_path / "base")
    name, update = next(iter(adapter.updates.items()))
    far = {**adapter.updates, name: replace(update, scale=1e6)}
    message = refused(base, replace(adapter, updates=far), tmp_path / "out")
    assert f"the merged {name}.weight has values that are not finite in F16" in message


def test_bases_that_are_not_whole(base: Path, adapter: Adapter, tmp_path: Path) -> None:
    def refusal() -> str:
        with pytest.raises(ModelError) as caught:
            merge(base, adapter, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return str(caught.value)

    whole = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(whole[:-1])
    assert f"{base / 'model.safetensors'} is damaged" in refusal()
    (base / "model.safetensors").unlink()
    assert "has no weights" in refusal()
    index = base / "model.safetensors.index.json"
    for text in ("{", "[]", '{"weight_map": [1]}', '{"weight_map": {"a": "../base/x"}}'):
        index.write_text(text)
        assert f"{index} is damaged" in refusal()
    (base / "a.safetensors").write_bytes(whole)
    index.write_text('{"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}')
    assert "lacks weight files that model.safetensors.index.json names:\n  - b.s" in refusal()
    shutil.copy(base / "a.safetensors", base / "b.safetensors")
    message = refusal()
    assert "in no file, though the index names a file (2): a, b" in message
    assert "in several files (" in message
    index.unlink()
    for content in (Path("code"), [1], {"a": torch.eye(2).to_sparse()}):
        torch.save(content, base / "pytorch_model.bin")
        assert str(base / "pytorch_model.bin") in refusal()
    (base / "pytorch_model.bin").write_bytes(b"PK" + bytes(50))
    assert "is damaged or holds more than tensors" in refusal()
    (base / "config.json").write_text("[]")
    assert "must hold an object" in refusal()
    (base / "config.json").unlink()
    assert "not a model folder" in refusal()


def test_what_may_be_replaced(base: Path, adapter: Adapter, tmp_path: Path) -> None:
    out = tmp_path / "out"
    merge(base, adapter, out)
    first = (out / "model.safetensors").read_bytes()
    (out / "vocab.txt").write_text("of the earlier merge")
    merge(base, adapter, out)
    assert (out / "model.safetensors").read_bytes() == first
    assert not (out / "vocab.txt").exists()
    (out / "mine").mkdir()
    for taken in (out, base, base.parent, base / "config.json"):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(ConfigError, match="choose another folder"):
            merge(base, adapter, taken)
        assert sorted(tmp_path.rglob("*")) == before


class Interruption(BaseException):
    pass


@pytest.mark.parametrize("kind", [Interruption, KeyboardInterrupt, OSError])
def test_an_interruption_leaves_nothing(
    base: Path, adapter: Adapter, tmp_path: Path, kind: type[BaseException]
) -> None:
    seen = []

    def stop(done: int, total: int) -> None:
        seen.append((done, total))
        if done == 9:
            raise kind(28, "No space left on device")

    with pytest.raises(StorageError if kind is OSError else kind):
        merge(base, adapter, tmp_path / "out", progress=stop)
    total = len(weights(base))
    assert seen == [(n, total) for n in range(1, 10)]
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))


def run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True
    )


KILLED = """
import os, signal, sys
from pathlib import Path
from lorikeet.adapters import read_adapter
from lorikeet.adapters.merge import merge
base, adapter, out = map(Path, sys.argv[1:])
def die(done, total):
    if done == total:
        os.kill(os.getpid(), signal.SIGKILL)
merge(base, read_adapter(adapter), out, progress=die)
"""


def test_a_kill_leaves_no_folder_of_that_name(base: Path, adapter: Adapter, tmp_path: Path) -> None:
    done = run(KILLED, base, tmp_path / "adapter", tmp_path / "out")
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "out").exists()
    merge(base, adapter, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file()


FULL = """
import resource, sys
from pathlib import Path
from lorikeet.adapters import read_adapter
from lorikeet.adapters.merge import merge
base, adapter, out = map(Path, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
merge(base, read_adapter(adapter), out)
"""


def test_a_full_disk(base: Path, adapter: Adapter, tmp_path: Path) -> None:
    """A bound on the size of files stands for it."""
    done = run(FULL, base, tmp_path / "adapter", tmp_path / "out")
    assert "lorikeet.errors.StorageError: cannot write" in done.stderr
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))


PEAK = """
import sys
from pathlib import Path
from lorikeet.adapters import read_adapter
from lorikeet.adapters.merge import merge
base, adapter, out = map(Path, sys.argv[1:])
merge(base, read_adapter(adapter), out)
status = Path("/proc/self/status").read_text()
print(status.partition("VmHWM:")[2].split()[0])
"""


@pytest.mark.slow
def test_the_memory_of_a_merge(shared: Callable[[str], Path], tmp_path: Path) -> None:
    """A model of TinyLlama's shape, 2.2 GB of bf16, every matrix of it adapted."""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc")
    base, shape = tmp_path / "base", shared("shapes/tinyllama-1.1b-chat")
    base.mkdir()
    shutil.copy(shape / "config.json", base)
    with torch.device("meta"):
        config = AutoConfig.from_pretrained(shape)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}

    def drawn(size: tuple[int, ...]) -> Content:
        return Content("BF16", size, lambda: [torch.randn(size).bfloat16()])

    contents = {name: drawn(size) for name, size in shapes.items()}
    write_safe(base / "model.safetensors", contents, metadata={"format": "pt"})
    assert (base / "model.safetensors").stat().st_size > 2e9
    updates: dict[str, Update] = {}
    for name, size in shapes.items():
        module = name.removesuffix(".weight")
        if len(size) == 2:
            embedding = module == "model.embed_tokens"
            rows, columns = size[::-1] if embedding else size
            A, B = torch.randn(16, columns), torch.randn(rows, 16)
            updates[module] = Update(A, B, 0.01, "embedding" if embedding else "linear")
    write_adapter(Adapter(updates), tmp_path / "adapter")
    done = run(PEAK, base, tmp_path / "adapter", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) * 1024 < 1.5e9
    merged = open_safe(tmp_path / "out" / "model.safetensors")
    name = "model.layers.21.mlp.down_proj.weight"
    before = open_safe(base / "model.safetensors").rows(name, 2000, 2048)
    update = updates[name.removesuffix(".weight")]
    expected = (before.float() + 0.01 * update.B[2000:] @ update.A).bfloat16()
    off = merged.rows(name, 2000, 2048) != expected
    assert off.float().mean() < 1e-3  # sums that end between two values round either way

"""Folders as GGUF files: the folded weights exactly, and what adapters do to them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from exporting import (
    FAMILIES,
    copied,
    edit,
    exported,
    random_adapter,
    random_ids,
    reread,
    spread,
    weights,
    weights_in,
)
from exporting import texts_of as said
from random_models import logits_of
from safetensors.torch import load_file

from lorikeet import starter
from lorikeet.adapters import read_adapter, save_adapter
from lorikeet.adapters.merge import merge
from lorikeet.config import LoraConfig
from lorikeet.data import Example
from lorikeet.errors import AdapterError, ModelError
from lorikeet.export.convert import Conversion, export_gguf
from lorikeet.export.importance import Importance, measure_importance
from lorikeet.export.llama_cpp import LlamaCpp, find
from lorikeet.gguf.read import open_gguf
from lorikeet.lora import grow_vocabulary, inject
from lorikeet.model import load_model, load_tokenizer

needs_llama_cpp = pytest.mark.skipif(find() is None, reason="needs xllamacpp or llama-cpp-python")

NEW = ["<tool>", "blorptastic"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    "every linear layer": ("llama", {"target_modules": "all-linear"}),
    "rank-stabilised": ("qwen2", {"target_modules": "all-linear", "rslora": True}),
    "DoRA": ("llama", {"target_modules": "all-linear", "dora": True}),
    "DoRA, gemma": ("gemma", {"target_modules": ["q_proj", "o_proj"], "dora": True}),
    "tied embedding": ("llama tied", {"target_modules": ["q_proj", "embed_tokens"]}),
    "tied head": ("qwen2", {"target_modules": ["q_proj", "lm_head"]}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "k_proj"]}),
    "whole head": ("llama tied", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "new tokens": ("llama", {"target_modules": ["q_proj"], "new_tokens": NEW}),
    "new tokens, tied": ("llama tied", {"target_modules": ["k_proj"], "new_tokens": NEW}),
    "new tokens, gemma": ("gemma", {"target_modules": ["q_proj"], "new_tokens": NEW}),
}

Bases = Callable[[str], Path]


def train(base: Path, folder: Path, **options: Any) -> Any:
    """A random adapter in a folder; the model that carries it, and its tokenizer."""
    loaded = load_model(base, dtype="fp32", fast="off")
    new = options.get("new_tokens")
    if new:
        grow_vocabulary(loaded.model, loaded.tokenizer, new)
    config = LoraConfig(r=4, alpha=8.0, **options)
    inject(loaded.model, config, seed=0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.1 * noise)
    save_adapter(
        loaded.model,
        folder,
        config=config,
        base_model=str(base),
        provenance={},
        tokenizer=loaded.tokenizer if new else None,
    )
    return loaded.model.eval(), loaded.tokenizer


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_is_the_weights_themselves(family: str, bases: Bases, tmp_path: Path) -> None:
    base = bases(family)
    conversion = exported(base, "f32", tmp_path / "x.gguf")
    found = dict(weights_in(conversion, open_gguf(tmp_path / "x.gguf")))
    expected = weights(base)
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        # Gemma's norms are stored with 1 added, in float32.
        most = 1e-6 if family == "gemma" and name.endswith("norm.weight") else 0
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=most)


@pytest.mark.parametrize(("kind", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_half_precision_is_rounded_once(
    kind: str, dtype: torch.dtype, bases: Bases, tmp_path: Path
) -> None:
    """Matrices are; norms stay in float32."""
    adapter = random_adapter()
    conversion = exported(bases("llama"), kind, tmp_path / "x.gguf", adapter=adapter)
    file = open_gguf(tmp_path / "x.gguf")
    found = dict(weights_in(conversion, file))
    for name, tensor in weights(bases("llama")).items():
        update = adapter.updates.get(name.removesuffix(".weight"))
        exact = update.applied(tensor) if update else tensor
        assert torch.equal(found[name], exact.to(dtype).float() if exact.ndim > 1 else exact)
    types = {name: info.type for name, info in file.tensors.items()}
    assert types["blk.0.attn_q.weight"] == kind.upper()
    assert types["blk.0.attn_norm.weight"] == types["output_norm.weight"] == "F32"


def test_the_sum_of_base_and_adapter_is_not_rounded(bases: Bases, tmp_path: Path) -> None:
    """A merged folder has the base's type; the file has the sum itself."""
    adapter = random_adapter()
    merge(bases("llama"), adapter, tmp_path / "merged")
    conversion = exported(bases("llama"), "f32", tmp_path / "x.gguf", adapter=adapter)
    found = dict(weights_in(conversion, open_gguf(tmp_path / "x.gguf")))
    rounded = load_file(tmp_path / "merged" / "model.safetensors")
    assert set(found) == set(rounded)
    base = weights(bases("llama"))
    for name, tensor in found.items():
        assert torch.equal(tensor.to(rounded[name].dtype), rounded[name])
        update = adapter.updates.get(name.removesuffix(".weight"))
        assert torch.equal(tensor, update.applied(base[name]) if update else base[name])
        assert torch.equal(tensor, rounded[name].float()) == (update is None)


@needs_llama_cpp
@pytest.mark.parametrize("case", CASES)
def test_adapters_in_llama_cpp(case: str, bases: Bases, tmp_path: Path) -> None:
    """What llama.cpp computes is what the model computes that carries the adapter."""
    family, options = CASES[case]
    model, tokenizer = train(bases(family), tmp_path / "adapter", **options)
    adapter, out = read_adapter(tmp_path / "adapter"), tmp_path / "x.gguf"
    own = {"tokenizer": load_tokenizer(tmp_path / "adapter")} if "new_tokens" in options else {}
    conversion = exported(bases(family), "f32", out, adapter=adapter, **own)
    new = tokenizer.convert_tokens_to_ids(NEW) if "new_tokens" in options else []
    ids = [*random_ids(20, below=1000), *new, *random_ids(9, below=1000, seed=1)]
    expected = logits_of(model, ids)
    with LlamaCpp(out, context=64, threads=1) as llama:
        found = llama.logits(ids)
        spelled = [llama.tokenize(t, add_special=True, parse_special=True) for t in sentences(new)]
    assert spread(found, expected) < (1e-3 if family == "gemma" else 1e-5)
    assert spread(logits_of(reread(conversion, out), ids), expected) < 1e-5
    base = load_model(bases(family), dtype="fp32", fast="off").model
    plain = logits_of(base, random_ids(20, below=1000))
    assert spread(expected[:20, :1024], plain) > 0.02  # the adapter does something
    assert spelled == [tokenizer(text)["input_ids"] for text in sentences(new)]
    if new:
        assert found.shape == (len(ids), 1026)
        assert new == [1024, 1025]
        assert new[0] in spelled[0]
        assert new[1] in spelled[1]


def sentences(new: list[int]) -> list[str]:
    return ["Call <tool> now.", "How blorptastic it is!", "a<tool><tool>"] if new else []


def test_a_tied_weight_that_an_adapter_unties(bases: Bases, tmp_path: Path) -> None:
    base = bases("llama tied")
    train(base, tmp_path / "adapter", target_modules=["embed_tokens"])
    out = tmp_path / "x.gguf"
    exported(base, "f32", out, adapter=read_adapter(tmp_path / "adapter"))
    file, own = open_gguf(out), weights(base)["model.embed_tokens.weight"]
    assert torch.equal(file.rows("output.weight", 0, 1024), own)
    assert not torch.allclose(file.rows("token_embd.weight", 0, 1024), own)
    exported(base, "f32", out)
    assert "output.weight" not in open_gguf(out).tensors


@needs_llama_cpp
@pytest.mark.parametrize("copy", [True, False])
def test_a_head_in_the_files_of_a_model_that_says_it_is_tied(
    copy: bool, bases: Bases, tmp_path: Path
) -> None:
    """Transformers ties them only if they are equal, and so does everything that is made of it."""
    base, out = copied(bases("llama tied"), tmp_path / "base"), tmp_path / "x.gguf"
    moved = 0 if copy else 1
    edit(base, lambda s: {**s, "lm_head.weight": s["model.embed_tokens.weight"].roll(moved, 0)})
    exported(base, "f32", out)
    assert ("output.weight" in open_gguf(out).tensors) is not copy
    ids = random_ids(40, below=1000)
    with LlamaCpp(out, context=64, threads=1) as llama:
        found = llama.logits(ids)
    assert spread(found, logits_of(load_model(base, dtype="fp32", fast="off").model, ids)) < 1e-5
    train(base, tmp_path / "adapter", target_modules=["q_proj"])
    merge(base, read_adapter(tmp_path / "adapter"), tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["tie_word_embeddings"] is copy
    train(base, tmp_path / "rows", target_modules=["embed_tokens"])
    report = merge(base, read_adapter(tmp_path / "rows"), tmp_path / "merged")
    assert report.untied is copy


@needs_llama_cpp
def test_every_token_that_ends_an_answer(bases: Bases, tmp_path: Path) -> None:
    base, out = copied(bases("llama"), tmp_path / "base"), tmp_path / "x.gguf"
    words = load_tokenizer(base)
    own = words.eos_token_id
    found: list[set[int]] = []
    for more in ([], [300]):
        file = base / "generation_config.json"
        file.write_text(json.dumps({"eos_token_id": [own, *more]}), encoding="utf-8")
        exported(base, "f32", out)
        with LlamaCpp(out, context=16, threads=1) as llama:
            found.append(set(llama.ending()))
    assert own in found[0]
    assert found[1] - found[0] == {300}
    file.write_text(json.dumps({"eos_token_id": [300, 301]}), encoding="utf-8")
    lacking = words.convert_ids_to_tokens(301)
    assert f"llama.cpp goes on after {lacking}" in exported(base, "f32", out).notes[-1]


def test_new_tokens_are_in_the_files_vocabulary(bases: Bases, tmp_path: Path) -> None:
    train(bases("llama"), tmp_path / "adapter", target_modules=["q_proj"], new_tokens=NEW)
    adapter, out = read_adapter(tmp_path / "adapter"), tmp_path / "x.gguf"
    words = load_tokenizer(tmp_path / "adapter")
    exported(bases("llama"), "q8_0", out, adapter=adapter, tokenizer=words)
    found = said(out)
    assert list(found["tokenizer.ggml.tokens"][1024:]) == NEW
    assert found["llama.vocab_size"] == 1026
    assert open_gguf(out).tensors["token_embd.weight"].shape == (1026, 64)
    with pytest.raises(AdapterError, match="the tokenizer with them is needed"):
        Conversion.plan(bases("llama"), "q8_0", adapter=adapter)
    words = load_tokenizer(bases("llama"))
    with pytest.raises(AdapterError, match="does not know the adapter's new tokens"):
        Conversion.plan(bases("llama"), "q8_0", adapter=adapter, tokenizer=words)


def importance() -> Importance:
    base = load_model(starter.folder(), dtype="fp32", fast="off")
    ids = random_ids(300, below=1000)
    supervised = tuple(i > 0 for i in range(300))
    return measure_importance(
        base.model, [Example(tuple(ids), supervised, 300, "x")], source="words.txt"
    )


def test_calibration_moves_bytes_where_the_format_searches(tmp_path: Path) -> None:
    """The errors of K-quants, weighed by importance, go down; Q8_0 has no use for it."""
    columns = importance()
    plain, calibrated = tmp_path / "plain.gguf", tmp_path / "calibrated.gguf"
    fewer = 0
    for kind in ("q4_k_s", "q2_k", "q5_0", "q8_0"):
        conversion = exported(starter.folder(), kind, plain)
        exported(starter.folder(), kind, calibrated, importance=columns)
        files = open_gguf(plain), open_gguf(calibrated)
        for placed in conversion.layout.placed:
            types = {file.tensors[placed.name].type for file in files}
            own = columns.of(placed.source)
            before, after = (b"".join(file.raw(placed.name)) for file in files)
            if len(types) > 1:
                continue  # with a matrix the mixture is another
            if own is None or types & {"Q8_0", "F32"}:
                assert before == after, placed.name
                continue
            assert before != after, placed.name
            exact = torch.cat(list(conversion.rows(placed)))
            errors = [
                float(((f.rows(placed.name, 0, len(exact)) - exact).square() * own).sum())
                for f in files
            ]
            assert errors[1] < errors[0], (kind, placed.name)
            fewer += 1
    assert fewer > 60
    assert said(calibrated)["quantize.imatrix.chunks_count"] == 1
    assert said(calibrated)["quantize.imatrix.entries_count"] == 28
    assert "quantize.imatrix.file" not in said(plain)


def test_a_base_models_names(tmp_path: Path) -> None:
    """Without the prefix `model.` the file is the same, and calibration counts as well."""
    bare = copied(starter.folder(), tmp_path / "bare")
    edit(bare, lambda state: {n.removeprefix("model."): t for n, t in state.items()})
    columns = importance()
    for kind, given in (("q8_0", None), ("q3_k_m", None), ("q3_k_m", columns)):
        for folder, out in ((bare, "a"), (starter.folder(), "b")):
            exported(folder, kind, tmp_path / out, importance=given, name="x")
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_calibration_of_another_model(bases: Bases, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="14 of the 28 layers that were calibrated"):
        Conversion.plan(bases("llama"), "q3_k_m", importance=importance())


@pytest.mark.parametrize(("kind", "number"), [("f32", 0), ("f16", 1), ("q4_k_m", 15), ("q2_k", 10)])
def test_what_the_file_says_of_itself(kind: str, number: int, bases: Bases, tmp_path: Path) -> None:
    """The numbers are llama.cpp's own, of the kinds in its `llama_ftype`."""
    out = tmp_path / "x.gguf"
    conversion = exported(bases("llama"), kind, out)
    found = said(out)
    assert found["general.file_type"] == number
    assert found["general.quantization_version"] == 2
    assert found["general.architecture"] == "llama"
    tokenizer = load_tokenizer(bases("llama"))
    assert found["tokenizer.chat_template"] == tokenizer.chat_template
    assert found["tokenizer.ggml.bos_token_id"] == tokenizer.bos_token_id
    assert len(found["tokenizer.ggml.tokens"]) == 1024
    assert [*open_gguf(out).tensors] == [*conversion.types.types]


def test_a_report_of_what_was_written(bases: Bases, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    out = tmp_path / "x.gguf"
    conversion = Conversion.plan(bases("llama"), "q4_k_m")
    found = export_gguf(conversion, out, progress=lambda *at: told.append(at))
    state = weights(bases("llama"))
    assert found.weights == sum(t.numel() for t in state.values())
    assert told[-1] == (found.weights, found.weights)
    assert len(told) == len(state)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert found.size == out.stat().st_size
    assert sum(found.types.values()) == len(state)
    assert set(found.fallbacks.values()) <= {("Q5_0", "Q4_K"), ("Q8_0", "Q6_K")}
    assert found.fallbacks["blk.0.attn_q.weight"] == ("Q5_0", "Q4_K")  # rows of 64
    json.dumps(found.summary())


def test_an_export_twice_is_the_same_bytes(bases: Bases, tmp_path: Path) -> None:
    for name in ("a", "b"):
        exported(bases("llama"), "q4_k_m", tmp_path / name, adapter=random_adapter())
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()

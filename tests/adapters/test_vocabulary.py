"""Adapters of ours that bring new tokens: in PEFT, merged, swapped, added; the same logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from new_tokens import (
    TEXTS,
    Letters,
    every_trained,
    grown_logits,
    load_whole,
    train_ours,
)
from peft_folders import Logits, Tiny, randomise, renamed
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoTokenizer

from lorikeet.adapters import (
    Adapter,
    AdapterSet,
    Update,
    load_adapter,
    read_adapter,
    save_adapter,
    write_adapter,
)
from lorikeet.adapters.algebra import combine
from lorikeet.adapters.anatomy import examine
from lorikeet.adapters.merge import merge
from lorikeet.config import LoraConfig
from lorikeet.errors import AdapterError
from lorikeet.lora import disabled, grow_vocabulary, inject, lora_layers, remove, vocabulary

pytestmark = [renamed, pytest.mark.filterwarnings("ignore::UserWarning")]

FAMILIES = ["llama", "llama-tied", "qwen2", "gemma", "gemma3", "gpt2", "opt"]
TIED = ("llama-tied", "gemma", "gemma3", "gpt2", "opt")


@pytest.mark.parametrize("family", FAMILIES)
def test_ours_travels(
    tiny: Tiny, letters: Letters, logits: Logits, tmp_path: Path, family: str
) -> None:
    """To PEFT, back to ours, into a merged folder; tied and untied."""
    ours = tmp_path / "ours"
    model = train_ours(tiny, letters, ours, family)
    expected = grown_logits(model)
    raw = json.loads((ours / "adapter_config.json").read_text())
    assert raw["lorikeet"]["vocabulary"] == {
        "rows": 50,
        "base_rows": 48,
        "new_tokens": [{"id": 48, "text": "<ab>"}, {"id": 49, "text": "<c,d>"}],
    }
    ids = raw["trainable_token_indices"]
    assert ids == (
        [48, 49] if family in TIED else {"model.embed_tokens": [48, 49], "lm_head": [48, 49]}
    )

    theirs = tiny(family)
    tokenizer = AutoTokenizer.from_pretrained(ours)
    assert len(tokenizer) == 50
    theirs.resize_token_embeddings(len(tokenizer))  # PEFT's user, with random rows
    theirs = peft.PeftModel.from_pretrained(theirs, str(ours))
    assert_close(grown_logits(theirs), expected, atol=1e-5, rtol=1e-5)

    again, own = tiny(family), letters(48)
    plain = logits(again)
    info = load_adapter(again, ours, tokenizer=own)
    assert torch.equal(grown_logits(again), expected)
    assert own.get_vocab() == tokenizer.get_vocab()
    with disabled(again):
        assert_close(logits(again)[..., :48], plain, atol=1e-6, rtol=1e-6)
    save_adapter(again, tmp_path / "twice", config=info.config, base_model="", provenance={})
    once, twice = (load_file(f / "adapter_model.safetensors") for f in (ours, tmp_path / "twice"))
    assert once.keys() == twice.keys()
    assert all(torch.equal(once[key], twice[key]) for key in once)
    assert read_adapter(tmp_path / "twice").vocabulary == vocabulary(again)

    base = tmp_path / "base"
    tiny(family).save_pretrained(str(base))
    letters(48).save_pretrained(str(base))
    report = merge(base, read_adapter(ours), tmp_path / "merged", tokenizer=ours)
    assert report.rows == 50
    assert not report.untied
    merged = load_whole(tmp_path / "merged")
    assert merged.config.vocab_size == 50
    assert_close(grown_logits(merged), expected, atol=1e-5, rtol=1e-5)
    one, other = (folder / "tokenizer.json" for folder in (ours, tmp_path / "merged"))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_a_padded_base_does_not_grow(
    tiny: Tiny, letters: Letters, tmp_path: Path, family: str
) -> None:
    model = train_ours(tiny, letters, tmp_path / "a", family, size=41)
    expected = grown_logits(model, (41, 42))
    again, tokenizer = tiny(family), letters(41)
    base = again.save_pretrained(str(tmp_path / "base")) or tmp_path / "base"
    load_adapter(again, tmp_path / "a", tokenizer=tokenizer)
    assert len(again.model.embed_tokens.weight) == 48
    assert torch.equal(grown_logits(again, (41, 42)), expected)
    assert tokenizer.convert_tokens_to_ids(TEXTS) == [41, 42]
    theirs = peft.PeftModel.from_pretrained(tiny(family), str(tmp_path / "a"))
    assert_close(grown_logits(theirs, (41, 42)), expected, atol=1e-5, rtol=1e-5)
    report = merge(base, read_adapter(tmp_path / "a"), tmp_path / "out", tokenizer=tmp_path / "a")
    assert report.rows is None
    merged = load_whole(tmp_path / "out")
    assert_close(grown_logits(merged, (41, 42)), expected, atol=1e-5, rtol=1e-5)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 43


def test_what_is_trained_whole_grows_too(tiny: Tiny, letters: Letters, tmp_path: Path) -> None:
    for family, saved in (
        ("llama", ["embed_tokens"]),
        ("llama", ["lm_head"]),
        ("llama-tied", ["embed_tokens", "lm_head"]),
        ("phi", ["lm_head"]),  # its head has a bias
    ):
        case = tmp_path / f"{family} {saved}"
        model = train_ours(tiny, letters, case / "a", family, modules_to_save=saved)
        expected = grown_logits(model)
        again = tiny(family)
        base = again.save_pretrained(str(case / "base")) or case / "base"
        load_adapter(again, case / "a", tokenizer=letters(48))
        assert torch.equal(grown_logits(again), expected)
        theirs = tiny(family)
        theirs.resize_token_embeddings(50)
        theirs = peft.PeftModel.from_pretrained(theirs, str(case / "a"))
        assert_close(grown_logits(theirs), expected, atol=1e-5, rtol=1e-5)
        merge(base, read_adapter(case / "a"), case / "out", tokenizer=case / "a")
        assert_close(grown_logits(load_whole(case / "out")), expected, atol=1e-5, rtol=1e-5)


def test_it_needs_a_tokenizer_and_the_same_ids(
    tiny: Tiny, letters: Letters, logits: Logits, tmp_path: Path
) -> None:
    train_ours(tiny, letters, tmp_path / "a", "llama")
    model = tiny("llama")
    plain, before = logits(model), dict(model.named_parameters())

    def refused(named: str, tokenizer: Any) -> None:
        with pytest.raises(AdapterError, match=named):
            load_adapter(model, tmp_path / "a", tokenizer=tokenizer)
        assert torch.equal(logits(model), plain)
        assert all(own is before[n] for n, own in model.named_parameters())
        assert not lora_layers(model)

    refused(r"brings new tokens, <ab> \(48\), <c,d> \(49\); give the base's tokenizer", None)
    refused("'<ab>' would be token 46 here, not 48", letters(46))
    taken = letters(48)
    taken.add_tokens(["<c,d>"])
    refused("'<c,d>' is a token of the base already, 48", taken)
    path = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "stray": torch.ones(1)}, path)
    refused("unexpected .*stray", letters(48))
    save_file(tensors, path)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    tokens = config["lorikeet"]["vocabulary"]["new_tokens"]
    for damage in (
        {"rows": 50},
        {"rows": "x", "base_rows": 48, "new_tokens": []},
        {"rows": 10**12, "base_rows": 48, "new_tokens": tokens},
        {"rows": 49, "base_rows": 48, "new_tokens": tokens},
        5,
    ):
        config["lorikeet"]["vocabulary"] = damage
        (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
        refused(r"record of new tokens \(vocabulary\) is damaged", letters(48))


def test_after_an_adapter_the_base_stays_grown(
    tiny: Tiny, letters: Letters, tmp_path: Path
) -> None:
    train_ours(tiny, letters, tmp_path / "a", "llama-tied")
    model, tokenizer = tiny("llama-tied"), letters(48)
    start = tiny("llama-tied")
    grow_vocabulary(start, letters(48), TEXTS)
    load_adapter(model, tmp_path / "a", tokenizer=tokenizer)
    with disabled(model):
        assert torch.equal(grown_logits(model), grown_logits(start))
    expected = grown_logits(model)
    remove(model)
    assert torch.equal(grown_logits(model), grown_logits(start))
    assert len(tokenizer) == 50
    load_adapter(model, tmp_path / "a", tokenizer=tokenizer)  # once more, on what is there
    assert torch.equal(grown_logits(model), expected)
    assert len(tokenizer) == 50


def test_beside_other_adapters(
    tiny: Tiny, letters: Letters, logits: Logits, tmp_path: Path
) -> None:
    grown = grown_logits(train_ours(tiny, letters, tmp_path / "new", "llama"))
    for name, target in (("plain", "v_proj"), ("head", "lm_head")):
        model = tiny("llama")
        inject(model, config := LoraConfig(r=2, target_modules=[target]), seed=0)
        randomise(every_trained(model))
        save_adapter(model, tmp_path / name, config=config, base_model="", provenance={})
    alone = tiny("llama")
    load_adapter(alone, tmp_path / "plain")
    expected = logits(alone)

    tokenizer = letters(48)
    beside = AdapterSet(model := tiny("llama"), tokenizer=tokenizer)
    beside.load("plain", tmp_path / "plain")
    beside.load("head", tmp_path / "head")
    with pytest.raises(AdapterError, match=r"load it before those that .*: head$"):
        beside.load("new", tmp_path / "new")
    assert (beside.names, len(tokenizer)) == (["plain", "head"], 48)
    beside.drop("head")
    beside.load("new", tmp_path / "new")
    beside.load("again", tmp_path / "new")
    with pytest.raises(AdapterError, match=r"lm_head.lora_B.weight is \[48, 2\], needed is \[50"):
        beside.load("head", tmp_path / "head")
    for name, wanted in (("new", grown), ("again", grown)):
        beside.use(name)
        assert torch.equal(grown_logits(model), wanted)
    beside.use("plain")
    assert_close(logits(model)[..., :48], expected, atol=1e-6, rtol=1e-6)
    train_ours(tiny, letters, tmp_path / "other", "llama", size=47)
    with pytest.raises(AdapterError, match=r"has grown by .* before; load the base anew"):
        beside.load("other", tmp_path / "other")


def test_saving_without_the_new_rows(tiny: Tiny, letters: Letters, tmp_path: Path) -> None:
    """An adapter that has nothing to do with them is the plain base's; one that has is refused."""
    plain, model = tiny("llama"), tiny("llama")
    config = LoraConfig(r=2, target_modules=["v_proj"])
    inject(plain, config, seed=0)
    randomise(every_trained(plain))
    save_adapter(plain, tmp_path / "plain", config=config, base_model="", provenance={})
    grow_vocabulary(model, letters(48), TEXTS)
    load_adapter(model, tmp_path / "plain")
    given = {"vocabulary": "left from elsewhere"}
    save_adapter(model, tmp_path / "b", config=config, base_model="", provenance=given)
    assert read_adapter(tmp_path / "b").vocabulary is None
    load_adapter(tiny("llama"), tmp_path / "b")
    remove(model)
    by_hand = LoraConfig(r=2, target_modules=["v_proj"], new_tokens=TEXTS)
    inject(model, by_hand, seed=0)
    model.lm_head = model.lm_head.base  # as if the head were not part of it
    with pytest.raises(AdapterError, match=r"(?s)would be lost.*lm_head"):
        save_adapter(model, tmp_path / "c", config=by_hand, base_model="", provenance={})


def test_sums_with_new_tokens(tiny: Tiny, letters: Letters, tmp_path: Path) -> None:
    train_ours(tiny, letters, tmp_path / "new", "llama")
    new = read_adapter(tmp_path / "new")
    update = Update(torch.randn(2, 16), torch.randn(16, 2), 0.5)
    other = Adapter({"model.layers.0.self_attn.q_proj": update})
    found = combine([other, new], [1.0, 0.5]).adapter
    assert found.vocabulary == new.vocabulary
    assert found.tokens == new.tokens
    write_adapter(found, tmp_path / "sum", tokenizer=tmp_path / "new")
    model, tokenizer = tiny("llama"), letters(48)
    load_adapter(model, tmp_path / "sum", tokenizer=tokenizer)
    assert model.lm_head.rows.detach().equal(
        new.tokens[0].rows
    ) or model.lm_head.rows.detach().equal(new.tokens[1].rows)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "sum")) == 50
    assert combine([other, new], [1.0, 0.0]).adapter.vocabulary is None
    for weights, named in (
        ([1.0, 1.0], r"several bring some: <ab> \(48\), .* \(adapter 1, weight 1\); <ab>"),
        ([1.0], None),
        ([-1.0], "rows of new tokens cannot be taken away"),
    ):
        if named is None:
            assert combine([new] * len(weights), weights).adapter.tokens == new.tokens
            continue
        with pytest.raises(AdapterError, match=named):
            combine([new] * len(weights), weights)
    train_ours(tiny, letters, tmp_path / "old", "llama", trainable_tokens=[5])
    with pytest.raises(AdapterError, match=r"rows of trained tokens, which are no .*\(1\): 5"):
        combine([read_adapter(tmp_path / "old")], [0.5])


def test_what_is_said_of_it(tiny: Tiny, letters: Letters, tmp_path: Path) -> None:
    train_ours(tiny, letters, tmp_path / "a", "llama")
    found = examine(read_adapter(tmp_path / "a"))
    assert found.tokens == 2
    assert any("new tokens, which the base learns" in finding for finding in found.findings)
    assert any("<ab> (48), <c,d> (49)" in finding for finding in found.findings)


@pytest.mark.parametrize("block", [5 * 16, 1 << 20])
def test_a_merge_grows_in_blocks(
    tiny: Tiny, letters: Letters, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    """Bit for bit the base's rows, then the adapter's rounded once; a head's bias gets zeros."""
    from lorikeet.adapters import checkpoint

    monkeypatch.setattr(checkpoint, "_BLOCK_VALUES", block)
    model = tiny("phi")
    model.lm_head.bias.data.normal_()
    model.bfloat16().save_pretrained(str(tmp_path / "base"))
    train_ours(tiny, letters, tmp_path / "a", "phi")
    adapter = read_adapter(tmp_path / "a")
    merge(tmp_path / "base", adapter, tmp_path / "out", tokenizer=tmp_path / "a", shard_bytes=2000)
    before, after = (
        {k: t for file in folder.glob("*.safetensors") for k, t in load_file(file).items()}
        for folder in (tmp_path / "base", tmp_path / "out")
    )
    for tokens in adapter.tokens:
        table = after[f"{tokens.module}.weight"]
        assert torch.equal(table[:48], before[f"{tokens.module}.weight"])
        assert torch.equal(table[48:], tokens.rows.bfloat16())
    assert torch.equal(after["lm_head.bias"][:48], before["lm_head.bias"])
    assert not after["lm_head.bias"][48:].any()


def test_a_merge_needs_the_tokenizer_that_knows_them(
    tiny: Tiny, letters: Letters, tmp_path: Path
) -> None:
    train_ours(tiny, letters, tmp_path / "a", "llama")
    tiny("llama").save_pretrained(str(tmp_path / "base"))
    letters(48).save_pretrained(str(tmp_path / "other"))
    for folder, named in (
        (None, "its folder has no tokenizer"),
        (tmp_path / "base", "its folder has no tokenizer"),
        (tmp_path / "other", r"does not know the adapter's new tokens <ab> \(48\), <c,d> \(49\)"),
    ):
        with pytest.raises(AdapterError, match=named):
            merge(
                tmp_path / "base", read_adapter(tmp_path / "a"), tmp_path / "out", tokenizer=folder
            )
        assert not (tmp_path / "out").exists()

"""PEFT's adapters for models whose vocabulary was resized: the same logits from the plain base."""

from __future__ import annotations

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
    save_theirs,
    train_theirs,
)
from peft_folders import Logits, Tiny, randomise, renamed
from safetensors.torch import load_file
from torch.testing import assert_close

from lorikeet.adapters import (
    load_adapter,
    normalize,
    read_adapter,
    save_adapter,
    write_adapter,
)
from lorikeet.adapters.merge import merge
from lorikeet.errors import AdapterError
from lorikeet.lora import vocabulary
from lorikeet.model import tokenizer_fingerprint

pytestmark = [renamed, pytest.mark.filterwarnings("ignore::UserWarning")]

THEIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "tied": ("llama-tied", {"trainable_token_indices": [48, 49]}),
    "tied, and an old one": ("llama-tied", {"trainable_token_indices": [49, 3, 48]}),
    "tied, said twice": (
        "llama-tied",
        {"trainable_token_indices": {"embed_tokens": [48, 49], "lm_head": [48, 49]}},
    ),
    "gpt2": ("gpt2", {"trainable_token_indices": [48, 49]}),
    "gemma3": ("gemma3", {"trainable_token_indices": [48, 49]}),
    "untied": (
        "llama",
        {"trainable_token_indices": {"embed_tokens": [48, 49], "lm_head": [48, 49]}},
    ),
    "untied, others in the head": (
        "llama",
        {"trainable_token_indices": {"embed_tokens": [48, 49], "lm_head": [49, 7, 48]}},
    ),
    "untied, embedding alone": ("llama", {"trainable_token_indices": [48, 49]}),
    "rows for padding": ("llama-tied", {"trainable_token_indices": [48, 49], "rows": 56}),
    "whole tables": ("llama", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "tied whole tables": ("llama-tied", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "a tied whole embedding": ("llama-tied", {"modules_to_save": ["embed_tokens"]}),
    "a whole head": (
        "llama",
        {"modules_to_save": ["lm_head"], "trainable_token_indices": {"embed_tokens": [48, 49]}},
    ),
    "no row trained": ("llama", {}),
    "no row of a tied table trained": ("llama-tied", {}),
}


@pytest.mark.parametrize("case", THEIRS)
def test_theirs_travels(tiny: Tiny, letters: Letters, tmp_path: Path, case: str) -> None:
    """A resized model trained by PEFT, which then writes whole tables too; ours from the base."""
    family, options = THEIRS[case]
    base, folder = tmp_path / "base", tmp_path / "theirs"
    theirs = train_theirs(tiny, letters, base, family, **options)
    save_theirs(theirs, letters, folder)
    expected = grown_logits(theirs)
    assert max(len(t) for t in load_file(folder / "adapter_model.safetensors").values()) >= 50

    model, tokenizer = tiny(family), letters(48)
    info = load_adapter(model, folder, tokenizer=tokenizer)
    assert_close(grown_logits(model), expected, atol=1e-5, rtol=1e-5)
    assert tokenizer.convert_tokens_to_ids(TEXTS) == [48, 49]
    resave = tmp_path / "resaved"
    save_adapter(
        model, resave, config=info.config, base_model="", provenance={}, tokenizer=tokenizer
    )
    again = tiny(family)
    load_adapter(again, resave, tokenizer=letters(48))
    assert_close(grown_logits(again), expected, atol=1e-5, rtol=1e-5)

    write_adapter(normalize(read_adapter(folder)).adapter, tmp_path / "plain", tokenizer=folder)
    rows = options.get("rows", 50)
    for one in (folder, resave, tmp_path / "plain"):
        out = tmp_path / f"{one.name} merged"
        report = merge(base, read_adapter(one), out, tokenizer=one)
        merged = load_whole(out)
        assert report.rows == merged.config.vocab_size == rows
        assert_close(grown_logits(merged), expected, atol=1e-5, rtol=1e-5)
    again = tiny(family)
    load_adapter(again, tmp_path / "plain", tokenizer=letters(48))
    assert_close(grown_logits(again), expected, atol=1e-5, rtol=1e-5)


def test_theirs_without_whole_tables(tiny: Tiny, letters: Letters, tmp_path: Path) -> None:
    """Rows that are trained are enough; rows that are nowhere are an error."""
    for family, indices, lost in (
        ("llama-tied", [48, 49], ""),
        ("llama", {"embed_tokens": [48, 49], "lm_head": [48, 49]}, ""),
        ("llama", [48, 49], r"lm_head, rows of the tokens 48, 49"),
        ("llama-tied", [49], "model.embed_tokens, rows of the tokens 48"),
    ):
        case = tmp_path / f"{family} {len(indices)} {lost[:3]}"
        theirs = train_theirs(tiny, letters, case / "base", family, trainable_token_indices=indices)
        save_theirs(theirs, letters, case / "a", save_embedding_layers=False)
        model, tokenizer = tiny(family), letters(48)
        if lost:
            before = tokenizer_fingerprint(tokenizer)
            with pytest.raises(AdapterError, match=rf"(?s)Missing:.*{lost}"):
                load_adapter(model, case / "a", tokenizer=tokenizer)
            assert tokenizer_fingerprint(tokenizer) == before
            assert len(model.model.embed_tokens.weight) == 48
            with pytest.raises(AdapterError, match="rows of new tokens that the adapter does not"):
                merge(case / "base", read_adapter(case / "a"), case / "out", tokenizer=case / "a")
            continue
        load_adapter(model, case / "a", tokenizer=tokenizer)
        assert_close(grown_logits(model), grown_logits(theirs), atol=1e-5, rtol=1e-5)


def test_theirs_without_a_tokenizer(tiny: Tiny, letters: Letters, tmp_path: Path) -> None:
    theirs = train_theirs(
        tiny, letters, tmp_path / "base", "llama-tied", trainable_token_indices=[48, 49]
    )
    theirs.save_pretrained(str(tmp_path / "a"))
    for tokenizer in (letters(48), None):
        with pytest.raises(AdapterError, match=r"at least 50 tokens.* 48 rows.*save_pretrained"):
            load_adapter(tiny("llama-tied"), tmp_path / "a", tokenizer=tokenizer)
    with pytest.raises(AdapterError, match=r"no tokenizer \(tokenizer.json\) that knows them"):
        merge(tmp_path / "base", read_adapter(tmp_path / "a"), tmp_path / "out")
    letters(48).save_pretrained(str(tmp_path / "a"))  # the base's, which does not know them
    with pytest.raises(AdapterError, match=r"tokenizer.json, texts of the tokens 48, 49"):
        load_adapter(tiny("llama-tied"), tmp_path / "a", tokenizer=letters(48))
    save_theirs(theirs, letters, tmp_path / "b")
    with pytest.raises(AdapterError, match="Give the base's tokenizer too"):
        load_adapter(tiny("llama-tied"), tmp_path / "b")


def test_theirs_on_another_base(tiny: Tiny, letters: Letters, tmp_path: Path) -> None:
    theirs = train_theirs(
        tiny, letters, tmp_path / "base", "llama-tied", trainable_token_indices=[48, 49]
    )
    save_theirs(theirs, letters, tmp_path / "a")
    model, tokenizer = tiny("llama-tied"), letters(48)
    model.model.embed_tokens.weight.data[5] += 1
    with pytest.raises(AdapterError, match="base weights that differ from the model's"):
        load_adapter(model, tmp_path / "a", tokenizer=tokenizer)
    assert vocabulary(model) is None
    assert len(model.model.embed_tokens.weight) == model.config.vocab_size == 48
    assert len(tokenizer) == 48


def test_a_tokenizer_with_tokens_of_no_use(
    tiny: Tiny, letters: Letters, logits: Logits, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A padding token that many scripts add, with no row trained: the adapter loads without it."""
    tiny("llama").save_pretrained(str(tmp_path / "base"))
    model = peft.get_peft_model(
        tiny("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    randomise(every_trained(model))
    model.save_pretrained(str(tmp_path / "a"))
    tokenizer = letters(48)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(str(tmp_path / "a"))
    again, own = tiny("llama"), letters(48)
    load_adapter(again, tmp_path / "a", tokenizer=own)
    assert_close(logits(again), logits(model), atol=1e-5, rtol=1e-5)
    assert len(own) == 48
    assert "of which the adapter brings no rows; the base's does without them: [PAD] (48)" in (
        " ".join(capsys.readouterr().err.split())
    )


def test_special_tokens_stay_special(tiny: Tiny, letters: Letters, tmp_path: Path) -> None:
    theirs = train_theirs(
        tiny, letters, tmp_path / "base", "llama-tied", trainable_token_indices=[48, 49]
    )
    theirs.save_pretrained(str(tmp_path / "a"))
    tokenizer = letters(48)
    tokenizer.add_tokens(["<ab>"], special_tokens=True)
    tokenizer.add_tokens(["<c,d>"])
    tokenizer.save_pretrained(str(tmp_path / "a"))
    model, own = tiny("llama-tied"), letters(48)
    info = load_adapter(model, tmp_path / "a", tokenizer=own)
    save_adapter(model, tmp_path / "b", config=info.config, base_model="", provenance={})
    again = letters(48)
    load_adapter(tiny("llama-tied"), tmp_path / "b", tokenizer=again)
    for one in (own, again):
        assert repr(one.added_tokens_decoder) == repr(tokenizer.added_tokens_decoder)


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_tables_that_are_adapted_beside_new_rows(
    tiny: Tiny, letters: Letters, tmp_path: Path, family: str
) -> None:
    """Low-rank updates of resized tables: they run, and nothing else can be made of them."""
    theirs = train_theirs(
        tiny, letters, tmp_path / "base", family, target_modules=["embed_tokens", "lm_head"]
    )
    save_theirs(theirs, letters, tmp_path / "a")
    model = tiny(family)
    info = load_adapter(model, tmp_path / "a", tokenizer=letters(48))
    assert_close(grown_logits(model), grown_logits(theirs), atol=1e-5, rtol=1e-5)
    with pytest.raises(AdapterError, match=r"(?s)would be lost.*model.embed_tokens"):
        save_adapter(model, tmp_path / "b", config=info.config, base_model="", provenance={})
    with pytest.raises(AdapterError, match="misshapen"):
        adapter = read_adapter(tmp_path / "a")
        merge(tmp_path / "base", adapter, tmp_path / "out", tokenizer=tmp_path / "a")


def test_a_padded_base_learns_the_tokens(tiny: Tiny, letters: Letters, tmp_path: Path) -> None:
    """Nothing was resized; what tells is that the rows of unknown ids were trained."""
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", trainable_token_indices=[5, 41, 42]
    )
    theirs = peft.get_peft_model(tiny("llama-tied"), config).eval()
    randomise(every_trained(theirs))
    theirs.save_pretrained(str(tmp_path / "a"))
    known = letters(41)
    known.add_tokens([*TEXTS, "<unused>"])
    known.save_pretrained(str(tmp_path / "a"))
    model, tokenizer = tiny("llama-tied"), letters(41)
    load_adapter(model, tmp_path / "a", tokenizer=tokenizer)
    assert tokenizer.convert_tokens_to_ids(TEXTS) == [41, 42]
    assert len(tokenizer) == 43
    assert_close(
        grown_logits(model, (41, 42)), grown_logits(theirs, (41, 42)), atol=1e-5, rtol=1e-5
    )
    plain = tiny("llama-tied")  # without a tokenizer the rows alone are loaded
    load_adapter(plain, tmp_path / "a")
    assert torch.equal(grown_logits(plain, (41, 42)), grown_logits(model, (41, 42)))

"""Variants of LoRA in PEFT and in ours: PiSSA, parameters trained whole, single tokens."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft_folders import Logits, Tiny, randomise, renamed, save_ours, unknown_key
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from lorikeet.adapters import AdapterSet, load_adapter, read_adapter, save_adapter, write_adapter
from lorikeet.adapters.algebra import combine
from lorikeet.adapters.merge import merge
from lorikeet.config import LoraConfig
from lorikeet.errors import AdapterError
from lorikeet.lora import (
    disabled,
    inject,
    lora_layers,
    lora_parameters,
    remove,
    token_layers,
    whole_parameters,
)

pytestmark = renamed


@unknown_key
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("options", [{}, {"rslora": True, "rank_pattern": {"1.*(q_proj|c_fc)": 2}}])
def test_pissa_is_pefts_and_leaves_as_plain_lora(
    tiny: Tiny, logits: Logits, tmp_path: Path, family: str, options: dict[str, Any]
) -> None:
    """The same start as PEFT's, the same function of A and B; what is saved runs on the base."""
    targets = ["c_attn", "c_fc"] if family == "gpt2" else ["q_proj", "down_proj"]
    config = LoraConfig(r=4, alpha=8, target_modules=targets, init="pissa", **options)
    model = tiny(family)
    plain = logits(model)
    inject(model, config, seed=0)
    assert_close(logits(model), plain, atol=1e-5, rtol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        described = peft.LoraConfig(
            r=4,
            lora_alpha=8,
            target_modules=targets,
            init_lora_weights="pissa",
            use_rslora=config.rslora,
            rank_pattern=config.rank_pattern,
            task_type="CAUSAL_LM",
        )
        theirs = peft.get_peft_model(tiny(family), described).eval()
    own = {n: p for n, p in theirs.named_parameters() if "lora_" in n}
    for (name, mine), other in zip(lora_parameters(model).items(), own.values(), strict=True):
        assert_close(mine, other, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: n + m)
    for held in (lora_parameters(model), own):  # the same step away from the start
        generator = torch.Generator().manual_seed(2)
        for parameter in held.values():
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    expected = logits(theirs)
    assert not torch.allclose(expected, plain, atol=1e-3)
    assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    save_adapter(model, tmp_path / "a", config=config, base_model="tiny", provenance={})
    again = tiny(family)
    load_adapter(again, tmp_path / "a")
    assert_close(logits(again), expected, atol=1e-5, rtol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read = peft.PeftModel.from_pretrained(tiny(family), str(tmp_path / "a"))
    assert_close(logits(read), expected, atol=1e-5, rtol=1e-5)


def test_pissa_needs_enough_singular_values(tiny: Tiny) -> None:
    with pytest.raises(AdapterError, match=r"(?s)fewer singular values.*q_proj \(rank 17 of 16\)"):
        inject(tiny("llama"), LoraConfig(r=17, target_modules=["q_proj"], init="pissa"), seed=0)


WHOLE: dict[str, tuple[str, dict[str, Any]]] = {
    "head": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "tied head": ("llama-tied", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "embedding": ("qwen2", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "tied embedding": ("opt", {"target_modules": ["fc1"], "modules_to_save": ["embed_tokens"]}),
    "norms": ("gemma", {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]}),
    "ends of names": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}),
    "a whole block": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["layers.2.mlp"]}),
    "biases of qwen2": ("qwen2", {"target_modules": ["q_proj", "o_proj"], "bias": "all"}),
    "biases of opt": ("opt", {"target_modules": ["q_proj"], "bias": "all"}),
    "biases of gpt2": ("gpt2", {"target_modules": ["c_attn"], "bias": "all"}),
    "biases of adapted modules": (
        "phi",
        {"target_modules": ["q_proj", "fc1"], "bias": "lora_only"},
    ),
    "biases of modules to save": (
        "phi",
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "bias": "all"},
    ),
    "everything": (
        "phi",
        {
            "target_modules": ["q_proj"],
            "modules_to_save": ["final_layernorm"],
            "bias": "lora_only",
        },
    ),
}
quiet = pytest.mark.filterwarnings("ignore::UserWarning")


def every_trained(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@quiet
@pytest.mark.parametrize("case", WHOLE)
def test_what_is_trained_whole_travels(
    tiny: Tiny, logits: Logits, tmp_path: Path, case: str
) -> None:
    """Both ways; and the base comes back when the adapter is off or gone."""
    family, options = WHOLE[case]
    model = tiny(family)
    plain, before = logits(model), {n: p.clone() for n, p in model.named_parameters()}
    config = LoraConfig(r=4, alpha=8, **options)
    inject(model, config, seed=0)
    assert torch.equal(logits(model), plain)
    assert whole_parameters(model)
    randomise(every_trained(model))
    expected = logits(model)
    save_adapter(model, tmp_path / "ours", config=config, base_model="tiny", provenance={})
    read = peft.PeftModel.from_pretrained(tiny(family), str(tmp_path / "ours"))
    assert_close(logits(read), expected, atol=1e-5, rtol=1e-5)
    again = tiny(family)
    load_adapter(again, tmp_path / "ours")
    assert torch.equal(logits(again), expected)
    for held in (model, again):
        with disabled(held):
            assert torch.equal(logits(held), plain)
        assert torch.equal(logits(held), expected)
        remove(held)
        assert torch.equal(logits(held), plain)
        assert all(torch.equal(p, before[n]) for n, p in held.named_parameters())

    described = peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **options)
    theirs = peft.get_peft_model(tiny(family), described).eval()
    randomise(every_trained(theirs))
    theirs.save_pretrained(str(tmp_path / "theirs"), save_embedding_layers=False)
    load_adapter(again, tmp_path / "theirs")
    assert_close(logits(again), logits(theirs), atol=1e-5, rtol=1e-5)


TOKENS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"target_modules": "all-linear"}),
    "tied llama": ("llama-tied", {"target_modules": "all-linear"}),
    "an expression that takes in all": ("llama-tied", {"target_modules": r".*\.(0|1)\..*_proj"}),
    "padding": ("llama", {"target_modules": ["q_proj"], "tokens": [5, 0]}),
    "gemma": ("gemma", {"target_modules": ["q_proj"]}),
    "gemma 3, which scales": ("gemma3", {"target_modules": ["q_proj"]}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn"]}),
    "opt": ("opt", {"target_modules": ["q_proj"], "bias": "all"}),
    "a head of its own, whole": (
        "llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ),
    "dora": ("llama-tied", {"target_modules": ["q_proj"], "dora": True}),
}


@quiet
@pytest.mark.parametrize("case", TOKENS)
def test_trained_tokens_travel(tiny: Tiny, logits: Logits, tmp_path: Path, case: str) -> None:
    """Both ways, in the order of the ids; the base comes back when the adapter is off or gone."""
    family, options = TOKENS[case]
    options = {**options}
    tokens = options.pop("tokens", [9, 3, 40])  # the batch has the first two
    model = tiny(family)
    plain, before = logits(model), {n: p.clone() for n, p in model.named_parameters()}
    config = LoraConfig(r=4, alpha=8, trainable_tokens=tokens, **options)
    inject(model, config, seed=0)
    assert_close(logits(model), plain, atol=1e-5, rtol=1e-5)
    randomise(every_trained(model))
    expected = logits(model)
    assert not torch.allclose(expected, plain, atol=1e-2)
    save_adapter(model, tmp_path / "ours", config=config, base_model="tiny", provenance={})
    read = peft.PeftModel.from_pretrained(tiny(family), str(tmp_path / "ours"))
    assert_close(logits(read), expected, atol=1e-5, rtol=1e-5)
    again = tiny(family)
    load_adapter(again, tmp_path / "ours")
    assert torch.equal(logits(again), expected)
    for held in (model, again):
        with disabled(held):
            assert torch.equal(logits(held), plain)
        assert torch.equal(logits(held), expected)
        remove(held)
        assert torch.equal(logits(held), plain)
        assert all(torch.equal(p, before[n]) for n, p in held.named_parameters())

    if "dora" in options:
        options["use_dora"] = options.pop("dora")
    described = peft.LoraConfig(
        r=4, lora_alpha=8, task_type="CAUSAL_LM", trainable_token_indices=tokens, **options
    )
    theirs = peft.get_peft_model(tiny(family), described).eval()
    randomise(every_trained(theirs))
    theirs.save_pretrained(str(tmp_path / "theirs"), save_embedding_layers=False)
    load_adapter(again, tmp_path / "theirs")
    assert_close(logits(again), logits(theirs), atol=1e-5, rtol=1e-5)
    ours, of_peft = (
        load_file(tmp_path / side / "adapter_model.safetensors") for side in ("ours", "theirs")
    )
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in of_peft.items()}
    by_itself = read_adapter(tmp_path / "theirs")
    assert len(by_itself.tokens) == 1
    assert by_itself.tokens[0].ids == tuple(tokens)
    assert by_itself.size == sum(t.numel() for t in of_peft.values())
    write_adapter(by_itself, tmp_path / "rewritten")
    remove(again)
    beside = AdapterSet(again)
    for name in ("ours", "rewritten"):
        beside.load(name, tmp_path / name)
    for name, wanted in (("rewritten", logits(theirs)), ("ours", expected), (None, plain)):
        beside.use(name)
        assert_close(logits(again), wanted, atol=1e-5, rtol=1e-5)
        assert not any(p.requires_grad for p in again.parameters())


EMBEDDING = "base_model.model.model.embed_tokens"
KEY = f"{EMBEDDING}.token_adapter.trainable_tokens_delta"
DAMAGES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "missing": (lambda tensors: tensors.pop(KEY), "missing"),
    "a row too few": (lambda tensors: tensors.update({KEY: torch.zeros(1, 16)}), "misshapen"),
    "a vector": (lambda tensors: tensors.update({KEY: torch.zeros(2)}), "misshapen"),
    "integers": (
        lambda tensors: tensors.update({KEY: torch.zeros(2, 16, dtype=torch.int32)}),
        "not floating-point",
    ),
    "no number": (
        lambda tensors: tensors.update({KEY: torch.full((2, 16), float("nan"))}),
        "not finite",
    ),
    "of a head, too": (
        lambda tensors: tensors.update(
            {KEY.replace("model.embed_tokens", "lm_head"): torch.ones(2, 16)}
        ),
        "unexpected",
    ),
    "of an adapted embedding": (
        lambda tensors: tensors.update(
            {
                f"{EMBEDDING}.lora_embedding_A": torch.ones(4, 48),
                f"{EMBEDDING}.lora_embedding_B": torch.ones(16, 4),
            }
        ),
        "unexpected",
    ),
}


@pytest.fixture
def trained(tiny: Tiny, tmp_path: Path) -> Path:
    """The folder of an adapter with rows of two tokens."""
    save_ours(tiny("llama"), tmp_path / "a", target_modules=["q_proj"], trainable_tokens=[3, 9])
    return tmp_path / "a"


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_rows_are_refused(tiny: Tiny, trained: Path, damage: str) -> None:
    change, finding = DAMAGES[damage]
    tensors = load_file(trained / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, trained / "adapter_model.safetensors")
    model = tiny("llama")
    for read in (lambda: read_adapter(trained), lambda: load_adapter(model, trained)):
        with pytest.raises(AdapterError, match=rf"(?s){finding} \(\d\): .*token"):
            read()
    assert not trained_anything(model)


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (None, r"unexpected \(1\): .*token_adapter"),
        ([3, 9, 11], r"misshapen \(1\): .*token_adapter"),
        ([9, 9], "names a token twice"),
        ([3, -9], "greater than or equal to 0"),
        ("q_proj", "expected numbers"),
    ],
)
def test_rows_of_other_tokens_are_refused(
    tiny: Tiny, trained: Path, value: object, named: str
) -> None:
    path = trained / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "trainable_token_indices": value}))
    for read in (lambda: read_adapter(trained), lambda: load_adapter(tiny("llama"), trained)):
        with pytest.raises(AdapterError, match=f"(?s){named}"):
            read()


def test_tokens_that_the_model_lacks_are_refused(tiny: Tiny, trained: Path) -> None:
    path = trained / "adapter_config.json"
    raw = {**json.loads(path.read_text()), "trainable_token_indices": [3, 48]}
    path.write_text(json.dumps(raw))
    with pytest.raises(AdapterError, match=r"at least 49 tokens, and the base has 48"):
        load_adapter(tiny("llama"), trained)


def test_what_is_saved_must_be_what_was_injected(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("llama-tied")
    config = save_ours(model, tmp_path / "a", trainable_tokens=[3, 9])
    for tokens in (None, [9, 3]):
        other = config.model_copy(update={"trainable_tokens": tokens})
        with pytest.raises(AdapterError, match=r"the model \[3, 9\]"):
            save_adapter(model, tmp_path / "b", config=other, base_model="", provenance={})
    model.model.embed_tokens.rows.data[1, 2] = float("inf")
    with pytest.raises(AdapterError, match=r"(?s)not finite \(1\): .*token_adapter"):
        save_adapter(model, tmp_path / "b", config=config, base_model="", provenance={})
    assert not (tmp_path / "b").exists()


def test_rows_are_no_updates_to_add(trained: Path) -> None:
    with pytest.raises(AdapterError, match=r"adapter 1 holds rows of trained tokens.*\(2\): 3, 9"):
        combine([read_adapter(trained)], [0.5])


NAMED: dict[str, tuple[str, dict[str, list[int]]]] = {
    "the embedding": ("llama", {"embed_tokens": [3, 9]}),
    "the head": ("llama", {"lm_head": [9, 3]}),
    "both": ("llama", {"embed_tokens": [3, 9], "lm_head": [9, 3]}),
    "both, by full names": ("llama", {"model.embed_tokens": [3], "lm_head": [40, 1]}),
    "a tied embedding": ("llama-tied", {"embed_tokens": [3, 9]}),
    "a tied head": ("llama-tied", {"lm_head": [3, 9]}),
    "tied, the same": ("llama-tied", {"embed_tokens": [3, 9], "lm_head": [3, 9]}),
    "tied, others": ("llama-tied", {"embed_tokens": [3, 9], "lm_head": [9, 5]}),
}


@quiet
@pytest.mark.parametrize("case", NAMED)
def test_tokens_of_named_modules(tiny: Tiny, logits: Logits, tmp_path: Path, case: str) -> None:
    """PEFT may say whose rows it means, both ways; a merge has them too."""
    family, tokens = NAMED[case]
    options = {"target_modules": ["q_proj"], "r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"}
    config = peft.LoraConfig(**options, trainable_token_indices=tokens)
    theirs = peft.get_peft_model(tiny(family), config).eval()
    randomise(every_trained(theirs))
    theirs.save_pretrained(str(tmp_path / "theirs"))
    model = tiny(family)
    base = model.save_pretrained(str(tmp_path / "base")) or tmp_path / "base"
    plain = logits(model)
    info = load_adapter(model, tmp_path / "theirs")
    assert_close(logits(model), logits(theirs), atol=1e-5, rtol=1e-5)
    with disabled(model):
        assert torch.equal(logits(model), plain)
    save_adapter(model, tmp_path / "ours", config=info.config, base_model="tiny", provenance={})
    write_adapter(read_adapter(tmp_path / "theirs"), tmp_path / "rewritten")
    for name in ("ours", "rewritten"):
        read = peft.PeftModel.from_pretrained(tiny(family), str(tmp_path / name))
        assert_close(logits(read), logits(theirs), atol=1e-5, rtol=1e-5)
    merge(base, read_adapter(tmp_path / "ours"), tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert_close(logits(merged), logits(theirs), atol=1e-5, rtol=1e-5)
    assert merged.config.tie_word_embeddings == (case in ("a tied embedding", "tied, the same"))


def test_rows_of_no_table_are_refused(tiny: Tiny, trained: Path) -> None:
    path = trained / "adapter_config.json"
    raw = json.loads(path.read_text())
    for tokens, named in (({"q_proj": [3, 9]}, "'q_proj' names none of them"),):
        path.write_text(json.dumps({**raw, "trainable_token_indices": tokens}))
        with pytest.raises(AdapterError, match=named):
            load_adapter(tiny("llama"), trained)


def trained_anything(model: torch.nn.Module) -> bool:
    return bool(lora_layers(model) or token_layers(model) or whole_parameters(model))


def test_what_cannot_be_trained_whole(tiny: Tiny) -> None:
    for options, named in (
        ({"modules_to_save": ["lm_haed"]}, "'lm_haed' matches no module"),
        ({"modules_to_save": ["q_proj"]}, "takes in model.layers.0.self_attn.q_proj"),
        ({"modules_to_save": ["layers.1"]}, "takes in model.layers.1.self_attn.q_proj"),
        ({"bias": "all"}, "no such bias"),
    ):
        model = tiny("llama")
        with pytest.raises(AdapterError) as caught:
            inject(model, LoraConfig(target_modules=["q_proj"], **options), seed=0)
        assert named in str(caught.value)
        assert not lora_layers(model)

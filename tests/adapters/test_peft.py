"""Our adapters in PEFT and PEFT's in ours: the same logits."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft_folders import (
    Logits,
    Tiny,
    randomise,
    renamed,
    save_ours,
    save_theirs,
    saves_embedding,
    tied_target,
    unknown_key,
)
from safetensors.torch import load_file
from torch.testing import assert_close

from lorikeet.adapters import load_adapter
from lorikeet.errors import AdapterError
from lorikeet.lora import (
    lora_layers,
    lora_parameters,
)

pytestmark = renamed

FAMILIES = ["llama", "llama-tied", "qwen2", "opt", "gemma", "gemma3", "phi"]
OURS: dict[str, dict[str, Any]] = {
    "all-linear": {},
    "all-linear in blocks": {"layers": [0, 2]},
    "names": {"target_modules": ["q_proj", "v_proj"], "rslora": True},
    "expression": {"target_modules": r".*\.1\..*(q|k)_proj"},
    "expression in blocks": {"target_modules": r".*_proj", "layers": [1]},
    "patterns": {
        "target_modules": ["q_proj", "k_proj", "v_proj"],
        "exclude_modules": [r"layers.0.self_attn.v_proj"],
        "rank_pattern": {r"layers\.1\..*": 2, "k_proj": 7},
        "alpha_pattern": {"q_proj": 3.5},
    },
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"target_modules": ["lm_head", "v_proj"]},
    "dora": {"dora": True},
    "dora in parts": {
        "target_modules": ["q_proj", "v_proj"],
        "dora": True,
        "rslora": True,
        "rank_pattern": {"v_proj": 7},
    },
}
# GPT-2 has other names, and layers that store their weights transposed.
OURS_GPT2: dict[str, dict[str, Any]] = {
    "all-linear": {},
    "all-linear in blocks": {"layers": [0, 2]},
    "names": {"target_modules": ["c_attn", "c_fc"], "rslora": True},
    "patterns": {"target_modules": ["c_attn", "c_proj"], "rank_pattern": {"mlp.c_proj": 2}},
    "expression": {"target_modules": r".*\.1\..*c_(attn|proj)"},
    "embeddings": {"target_modules": ["c_attn", "wte"]},
    "dora": {"dora": True},
}


@unknown_key
@tied_target
@pytest.mark.parametrize("family", [*FAMILIES, "gpt2"])
def test_peft_reads_ours(tiny: Tiny, logits: Logits, tmp_path: Path, family: str) -> None:
    plain = logits(tiny(family))
    for case, options in (OURS_GPT2 if family == "gpt2" else OURS).items():
        model = tiny(family)
        folder = tmp_path / case
        save_ours(model, folder, **options)
        expected = logits(model)
        assert not torch.allclose(expected, plain, atol=1e-3), case
        theirs = peft.PeftModel.from_pretrained(tiny(family), str(folder))
        assert_close(logits(theirs), expected, atol=1e-5, rtol=1e-5, msg=lambda m, c=case: c + m)
        again = tiny(family)
        load_adapter(again, folder)
        assert torch.equal(logits(again), expected), case


THEIRS: dict[str, dict[str, Any]] = {
    "all-linear": {"target_modules": "all-linear"},
    "names": {"target_modules": ["q_proj", "v_proj"], "use_rslora": True, "lora_dropout": 0.1},
    "expression": {"target_modules": r".*\.1\..*(q|k)_proj"},
    "blocks": {"target_modules": ["q_proj"], "layers_to_transform": [0, 2]},
    "one block": {
        "target_modules": ["q_proj"],
        "layers_to_transform": 1,
        "layers_pattern": "layers",
    },
    "patterns": {
        "target_modules": ["q_proj", "k_proj", "v_proj"],
        "exclude_modules": r".*layers\.0.*v_proj",
        # disjoint: PEFT sorts the keys on saving, and the first that matches wins
        "rank_pattern": {r"layers\.1\..*": 2, r"layers\.2\..*k_proj": 7},
        "alpha_pattern": {"q_proj": 3, "nothing": 4},
        "use_rslora": True,
    },
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"target_modules": ["lm_head", "v_proj"]},
    "unused entry": {"target_modules": ["q_proj", "query_key_value"]},
    "gaussian": {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
    "dora": {"target_modules": "all-linear", "use_dora": True},
    "dora in parts": {
        "target_modules": ["q_proj", "v_proj"],
        "use_dora": True,
        "use_rslora": True,
        "alpha_pattern": {"v_proj": 3},
    },
}
THEIRS_GPT2: dict[str, dict[str, Any]] = {
    "all-linear": {"target_modules": "all-linear"},
    "names": {"target_modules": ["c_attn", "c_fc"], "use_rslora": True},
    "patterns": {"target_modules": ["c_attn", "c_proj"], "rank_pattern": {"attn.c_proj": 2}},
    "blocks": {"target_modules": ["c_attn"], "layers_to_transform": [0, 2]},
    "embeddings": {"target_modules": ["c_attn", "wte"]},
    "dora": {"target_modules": ["c_attn", "c_proj", "c_fc"], "use_dora": True},
}


@tied_target
@saves_embedding
@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys did not match:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
@pytest.mark.parametrize("family", [*FAMILIES, "gpt2"])
def test_we_read_pefts(tiny: Tiny, logits: Logits, tmp_path: Path, family: str) -> None:
    for case, options in (THEIRS_GPT2 if family == "gpt2" else THEIRS).items():
        folder = tmp_path / case
        expected = logits(save_theirs(tiny(family), folder, **options))
        model = tiny(family)
        load_adapter(model, folder)
        assert_close(logits(model), expected, atol=1e-5, rtol=1e-5, msg=lambda m, c=case: c + m)


def test_half_precision_files_become_float32_masters(
    tiny: Tiny, logits: Logits, tmp_path: Path
) -> None:
    theirs = peft.get_peft_model(
        tiny("llama").bfloat16(),
        peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"),
        autocast_adapter_dtype=False,
    )
    randomise({n: p for n, p in theirs.named_parameters() if "lora_" in n})
    theirs.save_pretrained(str(tmp_path / "a"))
    saved = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert {t.dtype for t in saved.values()} == {torch.bfloat16}
    model = tiny("llama").bfloat16()
    load_adapter(model, tmp_path / "a")
    assert {p.dtype for p in lora_parameters(model).values()} == {torch.float32}
    assert_close(logits(model).float(), logits(theirs).float(), atol=0.02, rtol=0.02)


@saves_embedding
def test_a_changed_base_embedding_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    base = tiny("llama")
    torch.nn.init.normal_(base.model.embed_tokens.weight)
    save_theirs(base, tmp_path / "a", target_modules=["embed_tokens"])
    with pytest.raises(AdapterError, match=r"base weights that differ.*embed_tokens\.base_layer"):
        load_adapter(tiny("llama"), tmp_path / "a")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"lora_bias": True}, "lora_bias is True"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
        ({"trainable_token_indices": {"embed_tokens": 2}}, "valid list"),
        ({"layer_replication": [(0, 2), (1, 3)]}, "layer_replication is"),
    ],
)
def test_features_we_do_not_have_are_refused_by_name(
    tiny: Tiny, tmp_path: Path, options: dict[str, Any], named: str
) -> None:
    config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # which features PEFT itself warns about is its business
        peft.get_peft_model(tiny("llama"), config).save_pretrained(str(tmp_path / "a"))
    model = tiny("llama")
    with pytest.raises(AdapterError) as caught:
        load_adapter(model, tmp_path / "a")
    assert named in str(caught.value)
    assert not lora_layers(model)


def test_another_method_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    config = peft.IA3Config(
        target_modules=["q_proj"], feedforward_modules=[], task_type="CAUSAL_LM"
    )
    peft.get_peft_model(tiny("llama"), config).save_pretrained(str(tmp_path / "a"))
    with pytest.raises(AdapterError, match="peft_type is 'IA3'"):
        load_adapter(tiny("llama"), tmp_path / "a")


@saves_embedding
def test_the_base_embedding_is_not_saved(tiny: Tiny, tmp_path: Path) -> None:
    save_ours(tiny("llama"), tmp_path / "ours", target_modules=["embed_tokens"])
    save_theirs(tiny("llama"), tmp_path / "theirs", target_modules=["embed_tokens"])
    ours, theirs = (
        load_file(tmp_path / side / "adapter_model.safetensors") for side in ("ours", "theirs")
    )
    prefix = "base_model.model.model.embed_tokens."
    assert set(ours) == {f"{prefix}lora_embedding_A", f"{prefix}lora_embedding_B"}
    assert set(theirs) - set(ours) == {f"{prefix}base_layer.weight"}
    assert {name: t.shape for name, t in ours.items()} == {n: theirs[n].shape for n in ours}


def test_config_has_the_keys_of_peft(tiny: Tiny, tmp_path: Path) -> None:
    save_ours(tiny("llama"), tmp_path / "a")
    raw = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    own = raw.pop("lorikeet")
    assert own == {"version": "0.1.0", "base": {"fingerprint": "abc"}}
    known = peft.LoraConfig(target_modules=["q_proj"]).to_dict()
    assert set(raw) <= set(known)
    assert raw["lora_alpha"] == 8
    assert raw["target_modules"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['lorikeet'\]"):
        peft.PeftConfig.from_pretrained(str(tmp_path / "a"))

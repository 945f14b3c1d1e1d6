"""What an adapter folder may hold, and every way in which one can be wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel

from lorikeet.adapters import load_adapter, read_adapter_config, save_adapter
from lorikeet.config import LoraConfig
from lorikeet.errors import AdapterError
from lorikeet.lora import inject, lora_layers, lora_parameters

Tiny = Callable[[str], PreTrainedModel]
Logits = Callable[[nn.Module], torch.Tensor]
CONFIG = LoraConfig(r=2, alpha=5.5, dropout=0.1, target_modules=["q_proj", "embed_tokens"])
TENSORS = "adapter_model.safetensors"
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture
def folder(tiny: Tiny, tmp_path: Path) -> Path:
    model = tiny("llama")
    inject(model, CONFIG, seed=0)
    for parameter in lora_parameters(model).values():
        nn.init.normal_(parameter)
    path = tmp_path / "adapter"
    save_adapter(model, path, config=CONFIG, base_model="some/model", provenance={"a": [1, "é"]})
    return path


def refusal(tiny: Tiny, folder: Path) -> str:
    """The message of the error, after checking that the model is as it was."""
    model = tiny("llama")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(AdapterError) as caught:
        load_adapter(model, folder)
    assert not lora_layers(model)
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(p.requires_grad for p in after.values())
    return str(caught.value)


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = {name: t.clone() for name, t in load_file(folder / TENSORS).items()}
    changed = change(tensors)
    save_file(changed if isinstance(changed, dict) else tensors, folder / TENSORS)


def edit_config(folder: Path, **values: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_what_is_saved_is_what_is_read(tiny: Tiny, folder: Path) -> None:
    info = read_adapter_config(folder)
    assert info.config == CONFIG
    assert (info.base_model, info.provenance) == ("some/model", {"a": [1, "é"]})
    model = tiny("llama")
    assert load_adapter(model, folder) == info
    saved = load_file(folder / TENSORS)
    for name, parameter in lora_parameters(model).items():
        stem = f"base_model.model.{name}"
        key = stem.replace("lora_", "lora_embedding_") if "embed" in stem else f"{stem}.weight"
        assert torch.equal(parameter, saved.pop(key))
        assert parameter.requires_grad
    assert not saved
    with safe_open(folder / TENSORS, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_save_load_save_is_byte_identical(tiny: Tiny, folder: Path, tmp_path: Path) -> None:
    model = tiny("llama")
    info = load_adapter(model, folder)
    save_adapter(
        model,
        tmp_path / "again",
        config=info.config,
        base_model=info.base_model,
        provenance=info.provenance,
    )
    for name in ("adapter_config.json", TENSORS):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_names_that_would_match_more_are_written_in_full(tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.ModuleDict({"proj": nn.Linear(3, 3)})
            self.second = nn.ModuleDict({"proj": nn.LayerNorm(3)})

    model, config = Model(), LoraConfig(r=1)
    inject(model, config, seed=0)
    save_adapter(model, tmp_path / "a", config=config, base_model="", provenance={})
    assert read_adapter_config(tmp_path / "a").config.target_modules == ["first.proj"]
    load_adapter(Model(), tmp_path / "a")


def test_the_file_has_the_size_that_the_ranks_say(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(512, 384), nn.Linear(384, 512))
    config = LoraConfig(r=8, rank_pattern={"1": 4})
    inject(model, config, seed=0)
    save_adapter(model, tmp_path / "a", config=config, base_model="", provenance={})
    size = (tmp_path / "a" / TENSORS).stat().st_size
    assert size == pytest.approx(4 * (8 + 4) * (512 + 384), rel=0.02)


def test_another_key_prefix_is_an_error(tiny: Tiny, folder: Path) -> None:
    edit_tensors(
        folder, lambda ts: {k.replace("base_model.model.", "base_model."): t for k, t in ts.items()}
    )
    message = refusal(tiny, folder)
    assert "missing (8): base_model.model.model.embed_tokens.lora_embedding_A" in message
    assert "unexpected (8): base_model.model.embed_tokens.lora_embedding_A" in message


def test_every_misfit_is_listed(tiny: Tiny, folder: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{Q0}.extra"] = tensors.pop(f"{Q0}.lora_A.weight")
        tensors[f"{Q0}.lora_B.weight"] = torch.zeros(3, 4)
        one = Q0.replace("0", "1")
        tensors[f"{one}.lora_A.weight"][0, 0] = torch.nan
        tensors[f"{one}.lora_B.weight"] = tensors[f"{one}.lora_B.weight"].int()

    edit_tensors(folder, spoil)
    edit_config(folder, rank_pattern={"k_proj": 3})
    message = refusal(tiny, folder)
    for part in (
        f"missing (1): {Q0}.lora_A.weight",
        f"unexpected (1): {Q0}.extra",
        f"misshapen (1): {Q0}.lora_B.weight is [3, 4], needed is [16, 2]",
        "not finite (1): base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight",
        "not floating-point (1): base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight",
        "rank_pattern: 'k_proj' matches none of the targets",
    ):
        assert part in message


def test_long_lists_are_cut(tiny: Tiny, folder: Path) -> None:
    edit_tensors(folder, lambda ts: {f"x{i}": torch.zeros(1) for i in range(20)})
    assert "unexpected (20): x0, x1" in (message := refusal(tiny, folder))
    assert "and 12 more" in message


def test_an_adapter_for_another_model_is_an_error(tiny: Tiny, folder: Path) -> None:
    edit_config(folder, target_modules=["c_attn"])
    message = refusal(tiny, folder)
    assert "'c_attn' matches no module" in message
    assert "unexpected (8)" in message
    edit_config(folder, target_modules=["norm"])
    assert "is of class LlamaRMSNorm" in refusal(tiny, folder)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"use_qalora": True}, "use_qalora is True"),
        ({"target_parameters": ["experts.gate_up"]}, "target_parameters is"),
        ({"megatron_config": {"a": 1}}, "megatron_config is"),
        ({"a_feature_of_tomorrow": 3}, "a_feature_of_tomorrow is 3"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'"),
        ({"init_lora_weights": "eva"}, "init_lora_weights is 'eva'"),
        ({"init_lora_weights": "corda"}, "init_lora_weights is 'corda'"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights is 'loftq'"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is True"),
        ({"target_modules": None}, "target_modules is missing"),
        ({"lora_alpha": None}, "lora_alpha is null"),
        ({"r": None}, "r is null"),
        ({"r": 0}, "r: Input should be greater than or equal to 1 (found 0)"),
        ({"lora_alpha": -1, "bias": "all"}, "lora_alpha: Input should be greater than 0"),
        ({"bias": "some"}, "bias: Input should be 'none', 'all' or 'lora_only'"),
        ({"peft_type": None}, "peft_type is None"),
    ],
)
def test_configurations_we_cannot_honour(
    tiny: Tiny, folder: Path, values: dict[str, object], named: str
) -> None:
    edit_config(folder, **values)
    assert named in refusal(tiny, folder)


def test_keys_that_change_nothing_are_fine(tiny: Tiny, folder: Path) -> None:
    edit_config(
        folder, of_tomorrow=None, use_dora=False, eva_config={"rho": 2}, rank_pattern=None, x=[]
    )
    load_adapter(tiny("llama"), folder)


def test_no_folder_and_no_files(tiny: Tiny, folder: Path, tmp_path: Path) -> None:
    assert "there is no adapter folder" in refusal(tiny, tmp_path / "nowhere")
    message = refusal(tiny, tmp_path)  # a run folder rather than the adapter in it
    assert f"no file adapter_config.json; did you mean {folder}?" in message
    (folder / TENSORS).unlink()
    assert f"has no file {TENSORS}" in refusal(tiny, folder)


@pytest.mark.parametrize(
    ("text", "named"),
    [("{", "not valid JSON"), ("[1]", "must hold an object, found a list"), ("\xff", "JSON")],
)
def test_a_broken_config(tiny: Tiny, folder: Path, text: str, named: str) -> None:
    (folder / "adapter_config.json").write_bytes(text.encode())
    assert named in refusal(tiny, folder)


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_truncated_tensors(tiny: Tiny, folder: Path, kept: int) -> None:
    content = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(content[:kept])
    assert "is damaged or not a safetensors file" in refusal(tiny, folder)


@pytest.mark.parametrize("name", ["adapter_config.json", TENSORS])
def test_links_out_of_the_folder(tiny: Tiny, folder: Path, tmp_path: Path, name: str) -> None:
    shutil.move(folder / name, tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    assert "is a link out of the adapter folder" in refusal(tiny, folder)


def test_the_hub_cache_is_made_of_links(tiny: Tiny, folder: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "m" / "snapshots" / "1f", tmp_path / "m" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name in ("adapter_config.json", TENSORS):
        shutil.copy(folder / name, blobs / name)
        (snapshot / name).symlink_to(Path("../../blobs") / name)
    load_adapter(tiny("llama"), snapshot)


def test_a_pickle_of_tensors(tiny: Tiny, logits: Logits, folder: Path) -> None:
    model = tiny("llama")
    load_adapter(model, folder)
    torch.save(load_file(folder / TENSORS), folder / "adapter_model.bin")
    (folder / TENSORS).unlink()
    again = tiny("llama")
    load_adapter(again, folder)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize(
    ("content", "named"),
    [(Path("code"), "holds more than tensors"), ([1], "mapping from names to tensors")],
)
def test_a_pickle_of_anything_else(tiny: Tiny, folder: Path, content: object, named: str) -> None:
    (folder / TENSORS).unlink()
    torch.save(content, folder / "adapter_model.bin")
    assert named in refusal(tiny, folder)


def test_an_adapted_model_takes_no_second_adapter(tiny: Tiny, folder: Path) -> None:
    model = tiny("llama")
    load_adapter(model, folder)
    with pytest.raises(AdapterError, match="already carries"):
        load_adapter(model, folder)


def test_saving_refuses_what_could_not_be_loaded(tiny: Tiny, folder: Path) -> None:
    before = (folder / TENSORS).read_bytes()

    def save(model: nn.Module, config: LoraConfig = CONFIG) -> str:
        with pytest.raises(AdapterError) as caught:
            save_adapter(model, folder, config=config, base_model="", provenance={})
        assert (folder / TENSORS).read_bytes() == before
        return str(caught.value)

    assert "carries no adapter" in save(tiny("llama"))
    model = tiny("llama")
    inject(model, CONFIG, seed=0)
    assert "does not describe" in save(model, CONFIG.model_copy(update={"alpha": 1.0}))
    lora_layers(model)["model.embed_tokens"].lora_B.data[0, 0] = torch.inf
    assert "not finite (1): base_model.model.model.embed_tokens.lora_embedding_B" in save(model)


def test_the_tokenizer_travels_with_its_template(
    tiny: Tiny, tmp_path: Path, shared: Callable[[str], Path]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared("shapes/smollm2-135m-instruct"))
    model = tiny("llama")
    inject(model, CONFIG, seed=0)
    save_adapter(
        model,
        tmp_path / "a",
        config=CONFIG,
        base_model="",
        provenance={},
        tokenizer=tokenizer,
    )
    again = AutoTokenizer.from_pretrained(tmp_path / "a")
    assert again.chat_template == tokenizer.chat_template
    assert again("Hello").input_ids == tokenizer("Hello").input_ids

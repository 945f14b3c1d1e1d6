"""Loading a base model: what is refused, and in which words."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lorikeet.errors import ConfigError, ModelError
from lorikeet.model import (
    empty_model,
    fingerprint,
    init_model,
    load_model,
    load_tokenizer,
    peak_memory,
)

Build = Callable[[str], Any]


@pytest.fixture(scope="session")
def original(architecture: Build, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    architecture("llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A whole model folder, for a test to damage."""
    shutil.copytree(original, tmp_path / "model")
    return tmp_path / "model"


def load(folder: Path | str, **options: Any) -> Any:
    return load_model(folder, **{"dtype": "fp32", "device": "cpu", **options})


def refused(folder: Path | str) -> str:
    with pytest.raises(ModelError) as caught:
        load(folder)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_a_whole_folder(folder: Path, architecture: Build) -> None:
    base = load(folder)
    assert base.packing
    assert not base.model.training
    assert base.path == str(folder)
    assert base.machine.dtype_name == "fp32"
    expected = dict(architecture("llama").named_parameters())
    for name, parameter in base.model.named_parameters():
        assert torch.equal(parameter, expected[name]), name


def test_a_path_that_is_nothing(tmp_path: Path) -> None:
    assert "there is no model folder" in refused(tmp_path / "none")
    assert "or a hub id such as" in refused(tmp_path / "none")


def test_a_file_instead_of_a_folder(folder: Path) -> None:
    assert "is a file; expected a model folder" in refused(folder / "config.json")


def test_an_empty_folder(tmp_path: Path) -> None:
    assert "no config.json (it holds nothing)" in refused(tmp_path)


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    for number in range(10):
        (tmp_path / f"photo-{number}.jpg").touch()
    assert "(it holds photo-0.jpg, photo-1.jpg," in refused(tmp_path)


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    said = refused(folder)
    assert "has no weights: expected model.safetensors" in said
    assert "tokenizer.json" in said


def shard(folder: Path) -> list[str]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="6KB")
    names = sorted(path.name for path in folder.glob("model-*.safetensors"))
    assert len(names) > 1
    return names


def test_shards(folder: Path) -> None:
    before = load(folder).fingerprint
    shard(folder)
    assert load(folder).fingerprint == before


def test_a_missing_shard(folder: Path) -> None:
    names = shard(folder)
    (folder / names[1]).unlink()
    said = refused(folder)
    assert "lacks weight files that model.safetensors.index.json names" in said
    assert names[1] in said
    assert names[0] not in said


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": []}', '"text"', "{}"])
def test_a_broken_index(folder: Path, content: str) -> None:
    shard(folder)
    (folder / "model.safetensors.index.json").write_text(content)
    assert "model.safetensors.index.json" in refused(folder)


def test_the_index_of_something_else(folder: Path) -> None:
    """Mistral's repositories name their own shards in an index of another name."""
    (folder / "consolidated.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "consolidated-00001-of-00002.safetensors"}})
    )
    assert load(folder).packing


def test_a_truncated_file(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert f"cannot load {folder}" in refused(folder)
    file.write_bytes(b"")
    assert f"cannot load {folder}" in refused(folder)
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert f"cannot load {folder}" in refused(folder)


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_missing_tensors_are_not_made_up(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.layers.1.mlp.up_proj.weight"]
        del tensors["model.norm.weight"]

    rewrite(folder, change)
    said = refused(folder)
    assert "do not fit its config.json" in said
    assert "missing: model.layers.1.mlp.up_proj.weight" in said
    assert "missing: model.norm.weight" in said


def test_a_tensor_of_another_shape(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(3, 16)

    rewrite(folder, change)
    expected = "wrong shape: model.layers.0.mlp.up_proj.weight is [3, 16], expected [24, 16]"
    assert expected in refused(folder)


def test_tensors_left_over_are_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(16)

    before = load(folder).fingerprint
    assert capsys.readouterr().err == ""
    rewrite(folder, change)
    assert load(folder).fingerprint == before
    said = capsys.readouterr().err
    assert "1 tensors in" in said
    assert "no part of the model: model.layers.0.self_attn.q_proj.bias" in said


def test_no_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    said = refused(folder)
    assert f"{folder} has no tokenizer: expected tokenizer.json or tokenizer.model, found" in said
    with pytest.raises(ModelError, match="no tokenizer"):
        load_tokenizer(folder)


def test_a_run_folder_in_place_of_its_model(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    folder.rename(run / "model")
    assert f"is {run / 'model'} meant?" in refused(run)


def test_a_tokenizer_without_a_model(folder: Path) -> None:
    """As in the folder of an adapter with new tokens."""
    before = load_tokenizer(folder).get_vocab()
    (folder / "config.json").unlink()
    assert load_tokenizer(folder).get_vocab() == before


@pytest.mark.parametrize(
    "content", ["{", "[]", '"x"', '{"model_type": "no-such-model"}', "{}", '{"model_type": 5}']
)
def test_a_broken_config(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    assert f"cannot load {folder}" in refused(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [("hidden_size", "many"), ("num_attention_heads", 0), ("hidden_act", "nope"), ("dtype", "x")],
)
def test_a_config_of_nonsense(folder: Path, key: str, value: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config[key] = value
    (folder / "config.json").write_text(json.dumps(config))
    assert f"cannot load {folder}" in refused(folder)
    for make in (lambda: init_model(folder, seed=0, device="cpu"), lambda: empty_model(folder)):
        with pytest.raises(ModelError):
            make()


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"version": "1.0"}'])
def test_a_broken_tokenizer(folder: Path, content: str) -> None:
    (folder / "tokenizer.json").write_text(content)
    assert "no tokenizer could be loaded" in refused(folder)


def test_pickled_weights_load(folder: Path) -> None:
    before = load(folder).fingerprint
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    assert load(folder).fingerprint == before


class Attack:
    """Runs a command when it is unpickled carelessly."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self.proof}",))


@pytest.mark.parametrize("form", ["zip", "legacy", "plain pickle"])
def test_pickled_weights_run_no_code(folder: Path, tmp_path: Path, form: str) -> None:
    proof = tmp_path / "executed"
    (folder / "model.safetensors").unlink()
    file = folder / "pytorch_model.bin"
    content = {"model.norm.weight": Attack(proof)}
    if form == "plain pickle":
        file.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=form == "zip")
    assert zipfile.is_zipfile(file) == (form == "zip")
    pickle.loads(pickle.dumps(Attack(tmp_path / "attack-works")))
    assert (tmp_path / "attack-works").exists()
    assert "a pickle that is damaged or holds more than tensors" in refused(folder)
    assert not proof.exists()


def test_one_fingerprint_whatever_the_dtype(folder: Path) -> None:
    assert load(folder).fingerprint == load(folder, dtype="bf16").fingerprint
    assert load(folder, dtype="bf16").model.dtype == torch.bfloat16


def test_another_weight_is_another_fingerprint(folder: Path) -> None:
    before = load(folder).fingerprint

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.self_attn.o_proj.weight"] *= 1.1

    rewrite(folder, change)
    assert load(folder).fingerprint != before


def test_a_fingerprint_reads_names_and_shapes() -> None:
    prints = set()
    for out, name in ((4, "a"), (2, "a"), (4, "b")):
        model = torch.nn.ModuleDict({name: torch.nn.Linear(8 // out, out, bias=False)})
        torch.nn.init.ones_(model[name].weight)
        prints.add(fingerprint(model))
    assert len(prints) == 3


def test_random_weights_follow_the_seed(folder: Path) -> None:
    state = torch.get_rng_state()
    one, again, other = (init_model(folder, seed=seed, device="cpu") for seed in (1, 1, 2))
    assert one.fingerprint == again.fingerprint != other.fingerprint
    assert one.packing
    assert one.fingerprint != load(folder).fingerprint
    assert torch.equal(torch.get_rng_state(), state)


def test_a_structure_without_memory(shared: Callable[[str], Path]) -> None:
    before = peak_memory(torch.device("cpu"))
    model = empty_model(shared("shapes/llama-3.1-8b"))
    assert sum(p.numel() for p in model.parameters()) == 8_030_261_248
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert peak_memory(torch.device("cpu")) - before < 500e6


def test_fp16_on_a_cpu_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="fp16 was asked for on a CPU"):
        load(folder, dtype="fp16")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "unknown dtype 'int8'"),
        ({"device": "gpu"}, "unknown device 'gpu'"),
        ({"device": "mps"}, "unknown device 'mps'; expected auto, cpu, cuda or cuda:N"),
        ({"device": "meta"}, "unknown device 'meta'"),
        ({"device": "cuda:-1"}, "unknown device 'cuda:-1'"),
        ({"device": "cuda:99"}, "sees . GPUs here"),
        ({"device": "cuda:9999"}, "sees . GPUs here"),
        ({"threads": 1000 * (os.cpu_count() or 1)}, r"this machine has \d+ cores"),
    ],
)
def test_machines_that_are_not_here(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(folder, **options)


def test_nothing_is_fetched_for_a_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even with a network: every connection would raise."""

    def connect(*_: Any, **__: Any) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr("socket.socket.connect", connect)
    monkeypatch.setattr("socket.create_connection", connect)
    assert load(folder).packing
    init_model(folder, seed=0, device="cpu")
    empty_model(folder)

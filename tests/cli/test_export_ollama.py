"""`lorikeet export ollama` as a user meets it, on the embedded model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorikeet import starter
from lorikeet.adapters import save_adapter
from lorikeet.cli.main import main
from lorikeet.config import LoraConfig
from lorikeet.gguf.read import open_gguf
from lorikeet.lora import inject, lora_parameters
from lorikeet.model import load_model

SMALL = ["--data.limit", "6", "--prompts", "2"]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the embedded model, random and small, trained with a built-in template."""
    base = load_model(starter.folder(), dtype="fp32")
    config = LoraConfig(r=4, alpha=8.0)
    inject(base.model, config, seed=0)
    generator = torch.Generator().manual_seed(1)
    for parameter in lora_parameters(base.model).values():
        torch.nn.init.normal_(parameter, std=0.05, generator=generator)
    folder = tmp_path_factory.mktemp("run") / "adapter"
    save_adapter(
        base.model,
        folder,
        config=config,
        base_model=str(starter.folder()),
        provenance={"base_fingerprint": base.fingerprint, "template": "alpaca"},
    )
    return folder


def call(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    """Exit code, stdout, and stderr in one line."""
    code = main(["export", "ollama", *map(str, argv)])
    shown = capsys.readouterr()
    return code, shown.out, " ".join(shown.err.split())


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def stops(modelfile: str) -> set[str]:
    lines = modelfile.splitlines()
    return {line.split('"')[1] for line in lines if line.startswith("PARAMETER stop ")}


def test_a_folder_for_ollama(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "parrot"
    code, shown, said = call(capsys, "--model", starter.folder(), "--out", out)
    assert code == 0
    assert names(out) == ["Modelfile", "model-q4_k_m.gguf"]
    assert f"ollama create NAME -f {out / 'Modelfile'}" in shown.replace("\n", "")
    assert str(out / "model-q4_k_m.gguf") in shown.replace("\n", "")  # no name of a draft
    assert "warning" not in said
    assert open_gguf(out / "model-q4_k_m.gguf").tensors["blk.0.ffn_up.weight"].type == "Q4_K"
    text = (out / "Modelfile").read_text(encoding="utf-8")
    assert text.startswith('FROM ./model-q4_k_m.gguf\nTEMPLATE """')
    assert "<|im_start|>user\n{{ .Content }}<|im_end|>" in text
    assert stops(text) == {"<|im_end|>"}
    assert names(out.parent) == ["parrot"]  # and no draft beside it


def test_json_alone_on_stdout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "o"
    code, shown, _ = call(
        capsys, "--model", starter.folder(), "--out", out, "--type", "Q8_0", "--json"
    )
    found = json.loads(shown)
    assert code == 0
    assert found["out"] == str(out / "model-q8_0.gguf")
    assert found["modelfile"] == str(out / "Modelfile")
    assert found["bytes"] == (out / "model-q8_0.gguf").stat().st_size
    assert (found["type"], found["notes"], found["verify"]) == ("q8_0", [], None)


def test_an_adapter_brings_its_template(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Modelfile and GGUF file agree about how the model is spoken to."""
    out = tmp_path / "o"
    code, _, _ = call(capsys, "--adapter", adapter, "--out", out, "--type", "f16")
    text = (out / "Modelfile").read_text(encoding="utf-8")
    fields = open_gguf(out / "model-f16.gguf").metadata
    assert code == 0
    assert "### Instruction:\n{{ .Content }}" in text
    assert "<|im_start|>" not in text
    assert "### Instruction:" in fields["tokenizer.chat_template"].value


def test_a_template_that_nobody_has_named_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    shutil.copytree(starter.folder(), base)
    (base / "chat_template.jinja").unlink()
    argv = ["--model", base, "--type", "f16"]
    code, _, said = call(capsys, *argv, "--out", tmp_path / "a")
    assert code == 0
    assert "has no chat template: the Modelfile asks in the words of instruction-resp" in said
    code, _, said = call(capsys, *argv, "--out", tmp_path / "b", "--data.template", "alpaca")
    assert code == 0
    assert "no chat template" not in said
    assert "### Instruction:" in (tmp_path / "b" / "Modelfile").read_text(encoding="utf-8")


def test_parameters_of_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tmp_path / "base"
    shutil.copytree(starter.folder(), base)
    path = base / "generation_config.json"
    path.write_text(json.dumps({"do_sample": True, "temperature": 0.6, "top_k": 20}))
    assert call(capsys, "--model", base, "--out", tmp_path / "o", "--type", "f16")[0] == 0
    text = (tmp_path / "o" / "Modelfile").read_text(encoding="utf-8")
    assert "PARAMETER temperature 0.6\nPARAMETER top_k 20\n" in text
    path.write_text("[1]")
    code, _, said = call(capsys, "--model", base, "--out", tmp_path / "p", "--type", "f16")
    assert code == 2
    assert "generation_config.json must hold an object, found a list" in said
    assert not (tmp_path / "p").exists()


def test_an_earlier_export_is_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "o"
    for kind in ("q8_0", "q4_0", "q4_0"):
        argv = ["--model", starter.folder(), "--out", out, "--type", kind]
        assert call(capsys, *argv)[0] == 0
        assert names(out) == ["Modelfile", f"model-{kind}.gguf"]


@pytest.mark.parametrize("other", ["adapter.gguf", "README.md", "folder"])
def test_nothing_of_the_users_is_lost(
    other: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder is replaced as a whole, so what else is in it would be gone."""
    out = tmp_path / "o"
    argv = ["--model", starter.folder(), "--out", out, "--type", "f16"]
    assert call(capsys, *argv)[0] == 0
    (out / other).mkdir() if other == "folder" else (out / other).write_text("mine")
    before = names(out)
    code, _, said = call(capsys, *argv)
    assert code == 2
    assert f"holds what is no earlier export ({other}), which would be lost" in said
    assert names(out) == before


def test_other_places_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tmp_path / "base"
    shutil.copytree(starter.folder(), base)
    before = names(base)
    code, _, said = call(capsys, "--model", base, "--out", base)
    assert code == 2
    assert "no earlier export (chat_template.jinja, config.json" in said
    assert names(base) == before
    lone = tmp_path / "lone"
    lone.mkdir()
    (lone / "model-f16.gguf").write_text("by another verb")
    code, _, said = call(capsys, "--model", base, "--out", lone)
    assert code == 2
    assert "(model-f16.gguf), which would be lost" in said
    code, _, said = call(capsys, "--model", base, "--out", tmp_path / ("x" * 300))
    assert code == 2
    assert "File name too long" in said
    file = tmp_path / "file"
    file.write_text("mine")
    code, _, said = call(capsys, "--model", base, "--out", file)
    assert code == 2
    assert "is a file; expected the name of a folder" in said
    assert file.read_text() == "mine"


def test_what_fails_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights that are no numbers are met when half of the file is written."""
    base, out = tmp_path / "base", tmp_path / "o"
    shutil.copytree(starter.folder(), base)
    weights = load_file(base / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"][3, 5] = torch.nan
    (base / "model.safetensors").unlink()
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    code, _, said = call(capsys, "--model", base, "--out", out, "--type", "q8_0")
    assert code == 2
    assert "model.layers.2.mlp.up_proj.weight cannot be stored as Q8_0: row 3, column 5" in said
    assert names(tmp_path) == ["base"]


def test_a_template_that_ollama_cannot_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, out = tmp_path / "base", tmp_path / "o"
    shutil.copytree(starter.folder(), base)
    (base / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ loop.index }} {{ m.role }}: {{ m.content }}\n{% endfor %}"
    )
    code, _, said = call(capsys, "--model", base, "--out", out)
    assert code == 2
    assert "it does not write one turn as it writes the next" in said
    assert "write its TEMPLATE by hand" in said
    assert not out.exists()


def test_verified(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "o"
    argv = ["--adapter", adapter, "--out", out, "--type", "q8_0", "--verify", *SMALL, "--json"]
    code, shown, _ = call(capsys, *argv)
    verified = json.loads(shown)["verify"]
    assert code == 0
    assert [link["name"] for link in verified["links"]][:4] == ["base", "merged", "f16", "q8_0"]
    assert verified["problems"] == []


def test_a_check_that_does_not_hold_keeps_the_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The user may look at it; the exit code says that it is not to be trusted."""
    out = tmp_path / "o"
    argv = ["--model", starter.folder(), "--out", out, "--type", "q2_k", *SMALL]
    code, shown, said = call(capsys, *argv, "--verify", "--tolerance-kl", "1e-9")
    assert code == 3
    assert "q2_k: the mean KL is" in said
    assert str(out / "model-q2_k.gguf") in said
    assert "perplexity" in shown
    assert names(out) == ["Modelfile", "model-q2_k.gguf"]


def test_what_cannot_be_exported_is_not_calibrated_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Running a model takes minutes: the message comes before."""
    base = tmp_path / "base"
    shutil.copytree(starter.folder(), base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
    argv = ["--model", base, "--out", tmp_path / "o", "--calibrate", tmp_path / "nowhere.txt"]
    code, _, said = call(capsys, *argv)
    assert code == 2
    assert "the activation function is relu" in said


def test_threads_are_the_users(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = torch.get_num_threads()
    other = 2 if before == 1 else 1
    argv = ["--model", starter.folder(), "--out", tmp_path / "o", "--type", "f16"]
    try:
        assert call(capsys, *argv, "--model.threads", other)[0] == 0
        assert torch.get_num_threads() == other
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--type", "q9"], "--type: expected one of f32,"),
        (["--prompts", "3"], "--prompts does nothing without --verify"),
        (["--calibrate-rows", "3"], "--calibrate-rows does nothing without --calibrate"),
        (["--model.dtype", "bf16"], "--model.dtype does nothing without --verify or --calibrate"),
        (["--model.device", "cpu"], "--model.device does nothing without --verify"),
        (["--fast", "off"], "--model.fast does nothing here"),
        (["--verify", "--model.dtype", "bf16"], "--verify compares in fp32"),
        (["--adapter", "nowhere"], "there is no adapter in nowhere"),
        (["--model", "nowhere"], "there is no model folder nowhere"),
    ],
)
def test_flags_that_do_not_hold(
    argv: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "o"
    code, shown, said = call(capsys, "--model", starter.folder(), "--out", out, *argv)
    assert (code, shown) == (2, "")
    assert expected in said
    assert not out.exists()

"""`lorikeet export gguf --adapter-only`: what such a file cannot say, and a base beside it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from lorikeet import starter
from lorikeet.adapters import load_adapter, save_adapter
from lorikeet.cli.main import main
from lorikeet.config import LoraConfig
from lorikeet.data import Renderer
from lorikeet.export.llama_cpp import LlamaCpp, find
from lorikeet.gguf.read import open_gguf
from lorikeet.lora import inject, lora_parameters
from lorikeet.model import load_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model without a chat template."""
    folder = tmp_path_factory.mktemp("base") / "model"
    shutil.copytree(starter.folder(), folder)
    (folder / "chat_template.jinja").unlink()
    return folder


def make_adapter(base: Path, folder: Path, template: str) -> Path:
    """A random adapter that says which template it was trained with."""
    loaded = load_model(base, dtype="fp32")
    config = LoraConfig(r=4, alpha=8.0)
    inject(loaded.model, config, seed=0)
    generator = torch.Generator().manual_seed(1)
    for parameter in lora_parameters(loaded.model).values():
        torch.nn.init.normal_(parameter, std=0.05, generator=generator)
    provenance = {"base_fingerprint": loaded.fingerprint, "template": template}
    save_adapter(loaded.model, folder, config=config, base_model=str(base), provenance=provenance)
    return folder


def call(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str]:
    """Exit code, and stderr in one line."""
    code = main(["export", "gguf", *map(str, argv)])
    return code, " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("template", ["alpaca", "chat"])
def test_the_template_belongs_in_the_file_of_the_base(
    template: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = make_adapter(base, tmp_path / "a", template)
    out = tmp_path / "lora.gguf"
    code, said = call(capsys, "--adapter", adapter, "--adapter-only", "--out", out)
    assert code == 0
    assert "tokenizer.chat_template" not in open_gguf(out).metadata
    advised = "make BASE.gguf with --data.template alpaca" in said
    assert advised == (template == "alpaca")


@pytest.mark.skipif(find() is None, reason="needs xllamacpp or llama-cpp-python")
def test_as_advised_llama_cpp_answers_as_we_do(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = make_adapter(base, tmp_path / "a", "alpaca")
    lora, whole = tmp_path / "lora.gguf", tmp_path / "base.gguf"
    argv = ["--adapter", adapter, "--adapter-only", "--type", "f32", "--out", lora]
    assert call(capsys, *argv)[0] == 0
    argv = ["--model", base, "--type", "f32", "--out", whole, "--data.template", "alpaca"]
    assert call(capsys, *argv)[0] == 0
    loaded = load_model(base, dtype="fp32", fast="off")
    load_adapter(loaded.model, adapter, tokenizer=loaded.tokenizer)
    renderer = Renderer(loaded.tokenizer, template="alpaca", max_length=512, supervise="all")
    assert open_gguf(whole).metadata["tokenizer.chat_template"].value == renderer.template.text
    ids = renderer.prompt([{"role": "user", "content": "Who is there?"}])
    with torch.no_grad():
        expected = loaded.model(torch.tensor([ids])).logits[0]
    with LlamaCpp(whole, adapter=lora) as other:
        torch.testing.assert_close(other.logits(ids), expected, rtol=0, atol=1e-3)

"""`lorikeet export hf` is `lorikeet adapter merge` under another name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lorikeet import starter
from lorikeet.adapters import save_adapter
from lorikeet.cli.main import main
from lorikeet.config import LoraConfig
from lorikeet.lora import inject, lora_parameters
from lorikeet.model import load_model


def test_both_write_the_same_folder(tmp_path: Path) -> None:
    base = load_model(starter.folder(), dtype="fp32")
    config = LoraConfig(r=4, alpha=8.0)
    inject(base.model, config, seed=0)
    for parameter in lora_parameters(base.model).values():
        torch.nn.init.normal_(parameter, std=0.05)
    adapter = tmp_path / "adapter"
    named = str(starter.folder())
    save_adapter(base.model, adapter, config=config, base_model=named, provenance={})
    hf, merged = tmp_path / "hf", tmp_path / "merged"
    for verb, out in ((["export", "hf"], hf), (["adapter", "merge"], merged)):
        assert main([*verb, "--adapter", str(adapter), "--out", str(out)]) == 0
    contents = [{path.name: path.read_bytes() for path in out.iterdir()} for out in (hf, merged)]
    assert contents[0] == contents[1]
    assert contents[0]["model.safetensors"] != (
        (starter.folder() / "model.safetensors").read_bytes()
    )


def test_without_an_adapter_there_is_nothing_to_merge(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["export", "hf", "--model", str(starter.folder()), "--out", str(tmp_path / "o")]
    assert main(argv) == 2
    assert "give --adapter DIR" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "o").exists()

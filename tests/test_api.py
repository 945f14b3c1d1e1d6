"""The Python API: the whole way there and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lorikeet import starter
from lorikeet.api import (
    DataConfig,
    LoraConfig,
    TrainConfig,
    add_lora,
    answer,
    evaluate,
    fit,
    load_adapter,
    load_data,
    load_model,
    paired_difference,
    parameter_report,
    save_adapter,
)


def test_there_and_back(tmp_path: Path) -> None:
    base = load_model(starter.folder(), dtype="fp32")
    data = load_data(base, DataConfig(path=str(starter.data("pirate")), limit=60))
    before = evaluate(base, data.validation)
    lora = add_lora(base, LoraConfig(r=4, alpha=8), seed=3)
    assert evaluate(base, data.validation).nll == pytest.approx(before.nll)
    lines: list[dict[str, float]] = []
    fit(base, data.train, TrainConfig(max_steps=6, learning_rate=5e-3), record=lines.append)
    after = evaluate(base, data.validation)
    assert len(lines) == 6
    assert paired_difference(after, before).nll < 0
    assert parameter_report(base.model).trainable == sum(
        p.numel() for p in base.model.parameters() if p.requires_grad
    )
    save_adapter(base, tmp_path / "adapter", lora)

    again = load_model(starter.folder(), dtype="fp32")
    info = load_adapter(again, tmp_path / "adapter")
    assert info.provenance["base_fingerprint"] == again.fingerprint
    assert evaluate(again, data.validation).nll == pytest.approx(after.nll, rel=1e-6)
    assert answer(again, ["Count these: fig, plum."]) == answer(base, ["Count these: fig, plum."])


def test_full_fine_tuning_moves_every_weight() -> None:
    base = load_model(starter.folder(), dtype="fp32")
    before = {name: p.detach().clone() for name, p in base.model.named_parameters()}
    data = load_data(base, DataConfig(path=str(starter.data("json")), limit=40))
    fit(base, data.train, TrainConfig(method="full", max_steps=3, learning_rate=1e-3))
    after = dict(base.model.named_parameters())
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_new_tokens_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows.jsonl"
    words = ("plum", "pear", "fig", "gull") * 10
    lines = [f'{{"prompt": "Say {w}.", "completion": "<say>{w}</say>"}}\n' for w in words]
    rows.write_text("".join(lines))
    base = load_model(starter.folder(), dtype="fp32")
    early = load_data(base, DataConfig(path=str(rows)))
    lora = add_lora(base, LoraConfig(r=4, new_tokens=["<say>", "</say>"]))
    fit(base, early.train, TrainConfig(max_steps=1))
    assert "no training example has the new tokens <say> (1024)" in (
        " ".join(capsys.readouterr().err.split())
    )
    data = load_data(base, DataConfig(path=str(rows)))
    before = evaluate(base, data.validation)
    fit(base, data.train, TrainConfig(max_steps=20, learning_rate=5e-3))
    assert "no training example" not in capsys.readouterr().err
    after = evaluate(base, data.validation)
    assert after.nll < before.nll
    save_adapter(base, tmp_path / "adapter", lora)

    again = load_model(starter.folder(), dtype="fp32")
    identity = again.identity
    load_adapter(again, tmp_path / "adapter")
    assert again.identity == identity == base.identity
    assert evaluate(again, data.validation).nll == pytest.approx(after.nll, rel=1e-6)
    (text,) = answer(again, ["Say plum."])
    assert text == answer(base, ["Say plum."])[0]
    assert "<say>" in text

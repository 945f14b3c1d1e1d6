"""Healthy runs give no finding; folders of all ages and kinds are examined."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorikeet.errors import ConfigError
from lorikeet.study.doctor import diagnose, examine_folder, read_facts

Found = Callable[[Path], dict[str, Any]]
HEALTHY: dict[str, dict[str, Any]] = {
    "pirate": {"data__path": "pirate", "lora__alpha": 32},
    "json r 4": {"lora__r": 4, "lora__alpha": 8, "train__eval_every": 25},
    "pirate, all weights": {
        "data__path": "pirate",
        "train__method": "full",
        "train__learning_rate": 5e-4,
    },
    "json rsLoRA": {"lora__rslora": True, "lora__r": 8, "lora__alpha": 8, "lora__dropout": 0.05},
}


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_run(name: str, train: Callable[..., Path], distinct: dict[str, str]) -> None:
    options = {"data__limit": 450, "train__batch_size": 16, "train__epochs": 2, **HEALTHY[name]}
    options["data__path"] = distinct[options.get("data__path", "json")]
    run = train(**options)
    assert [finding.message for finding in diagnose(read_facts(run))] == []
    (diagnosis,) = examine_folder(run)
    assert diagnosis.healthy
    assert not any("over-fitting" in what or "moved" in what for what in diagnosis.unexamined)


@pytest.mark.parametrize(
    "options",
    [
        {"lora__alpha": 32, "train__learning_rate": 5e-3},
        {"train__method": "full", "train__learning_rate": 2e-3},
        {"lora__dora": True, "lora__alpha": 32, "train__learning_rate": 5e-3},
    ],
    ids=["LoRA", "all weights", "DoRA"],
)
def test_a_healthy_run_of_another_model(
    options: dict[str, Any], stories: dict[str, Any], train: Callable[..., Path]
) -> None:
    run = train(**{**stories, **options})
    assert [finding.message for finding in diagnose(read_facts(run))] == []


def test_a_folder_of_an_older_version(
    train: Callable[..., Path], altered: Callable[..., Path]
) -> None:
    run = altered(train(train__epochs=2, train__eval_every=20), {})
    receipt = json.loads((run / "receipt.json").read_text(encoding="utf-8"))
    before = read_facts(run)
    del receipt["training"], receipt["result"]["seen"], receipt["result"]["moved"]
    (run / "receipt.json").write_text(json.dumps(receipt), encoding="utf-8")
    (diagnosis,) = examine_folder(run)
    assert diagnosis.healthy
    (what,) = diagnosis.unexamined
    assert what.startswith("how far the weights moved")
    facts = read_facts(run)
    assert facts.examples == before.examples
    assert facts.supervised_tokens == pytest.approx(before.supervised_tokens, rel=0.05)


def test_the_runs_of_a_study(train: Callable[..., Path], tmp_path: Path) -> None:
    runs = tmp_path / "study" / "runs"
    short = {"train__epochs": 2, "train__eval_every": 20}
    few = {"train__max_steps": 12, "train__eval_every": 6}
    shutil.copytree(train(**short), runs / "b good")
    shutil.copytree(train(**few, train__learning_rate=1e-7), runs / "a low")
    shutil.copytree(train(**short), runs / "c damaged")
    (runs / "c damaged" / "receipt.json").write_text("{", encoding="utf-8")
    (runs / "no run").mkdir()
    found = {d.run.name: {f.id for f in d.findings} for d in examine_folder(tmp_path / "study")}
    assert list(found) == ["a low", "b good", "c damaged"]
    assert "not-learning" in found["a low"]
    assert found["b good"] == set()
    assert found["c damaged"] == {"unreadable"}


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no run: expected config"):
        examine_folder(tmp_path)
    with pytest.raises(ConfigError, match="is not a run folder"):
        read_facts(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("file", "text"),
    [("metrics.jsonl", "{\n"), ("receipt.json", "[1]"), ("samples.jsonl", '{"prompt": 1}\n')],
)
def test_a_damaged_file_is_named_as_such(
    file: str, text: str, train: Callable[..., Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(train(train__epochs=2, train__eval_every=20), run)
    (run / file).write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_facts(run)

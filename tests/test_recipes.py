"""Every recipe: its first steps, on the exact shape and tokenizer of its model.

The weights are random. In the normal run the models have two blocks; `-m slow` takes the whole of
those that fit into this machine.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lorikeet.cli.main import main
from lorikeet.config import load_config
from lorikeet.model import init_model
from lorikeet.study.plan import plan
from lorikeet.study.sweep_file import read_sweep
from lorikeet.train import read_metrics

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
SHAPES = {
    "smollm-135m": ("smollm-135m", 322_560),
    "smollm2-135m-instruct": ("smollm2-135m-instruct", 4_884_480),
    "tinyllama-dolly": ("tinyllama-1.1b-chat", 1_126_400),
    "llama-3.1-8b": ("llama-3.1-8b", 13_631_488),
}
SWEEPS = {"sweep-rank-rows": 12, "sweep-rank-targets": 90}

Shared = Callable[[str], Path]


def test_every_recipe_is_tested() -> None:
    assert {path.stem for path in RECIPES.glob("*.yaml")} == {*SHAPES, *SWEEPS}


@pytest.mark.parametrize("name", SWEEPS)
def test_every_sweep_has_its_trials(name: str) -> None:
    flags = {"model.path": "M", "data.path": "D", "train.learning_rate": "1e-2"}
    trials = read_sweep(RECIPES / f"{name}.yaml", flags).trials()
    assert len(trials) == SWEEPS[name]
    assert all(t.config.lora.alpha == 2 * t.config.lora.r for t in trials)
    assert {t.config.train.learning_rate for t in trials} == {1e-2}


@pytest.mark.parametrize("name", SHAPES)
def test_trainable_parameters(name: str, shared: Shared) -> None:
    shape, trainable = SHAPES[name]
    overrides = {"model.path": str(shared(f"shapes/{shape}")), "data.path": ""}
    found = plan(load_config(RECIPES / f"{name}.yaml", overrides))
    assert found.parameters.trainable == trainable


def first_steps(
    name: str, model: Path, data: Path, out: Path, *more: str
) -> list[dict[str, float]]:
    argv = ["train", str(RECIPES / f"{name}.yaml"), "--model", str(model), "--data", str(data)]
    argv += ["--out", str(out), "--train.max_steps", "2", *more]
    assert main(argv) == 0
    lines = read_metrics(out / "metrics.jsonl")
    return [line for line in lines if "loss" in line]


def random_model(shape: Path, folder: Path, *, layers: int | None) -> Path:
    """A model folder of this shape with random weights in bf16."""
    shutil.copytree(shape, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["num_hidden_layers"] = layers or config["num_hidden_layers"]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    init_model(folder, seed=0, dtype="bf16", device="cpu").model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["smollm-135m", "smollm2-135m-instruct"])
def test_first_steps_on_two_blocks(name: str, shared: Shared, tmp_path: Path) -> None:
    model = random_model(shared(f"shapes/{SHAPES[name][0]}"), tmp_path / "model", layers=2)
    data = shared("data/dolly-15k.jsonl")
    lines = first_steps(name, model, data, tmp_path / "run", "--data.limit", "40")
    vocabulary = json.loads((model / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    assert [line["loss"] for line in lines] == pytest.approx([math.log(vocabulary)] * 2, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("smollm-135m", None),
        ("smollm2-135m-instruct", None),
        ("tinyllama-dolly", None),
        ("llama-3.1-8b", 1),
    ],
)
def test_first_steps(name: str, layers: int | None, shared: Shared, tmp_path: Path) -> None:
    model = random_model(shared(f"shapes/{SHAPES[name][0]}"), tmp_path / "model", layers=layers)
    data = shared("data/dolly-15k.jsonl")
    lines = first_steps(name, model, data, tmp_path / "run", "--data.limit", "30")
    assert all(math.isfinite(line["loss"]) for line in lines)

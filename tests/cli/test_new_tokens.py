"""Whole runs with new tokens: trained, evaluated, asked, merged, shown; with good and bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lorikeet import starter
from lorikeet.cli.main import main

WORDS = ("plum", "pear", "fig", "gull", "boat", "lamp", "oar", "sail")
FLAGS = ("--lora.new_tokens", "<say>,</say>", "--train.learning_rate", "3e-3")
SHORT = ("--train.max_steps", "2", "--data.validation", "0")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows whose answers are marked."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [{"prompt": f"Say {w}.", "completion": f"<say>{w}</say>"} for w in WORDS * 5]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def run_folder(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learnt to mark its answers."""
    out = tmp_path_factory.mktemp("run") / "run"
    steps = ("--train.max_steps", 40, "--train.save_every", 20, "--model.dtype", "fp32")
    argv = ("train", "--model", starter.folder(), "--data", data, "--out", out, *FLAGS, *steps)
    assert main([str(arg) for arg in argv]) == 0
    return out


def call(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    """Exit code, stdout, and stderr in one line."""
    capsys.readouterr()
    code = main([str(arg) for arg in argv])
    shown = capsys.readouterr()
    return code, shown.out, " ".join(shown.err.split())


def found(capsys: pytest.CaptureFixture[str], *argv: object) -> Any:
    code, out, err = call(capsys, *argv, "--json")
    assert code == 0, err
    return json.loads(out)


def test_answers_show_the_new_tokens(
    run_folder: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (answer,) = found(capsys, "generate", "--adapter", run_folder, "--prompt", "Say fig.")[
        "answers"
    ]
    assert answer["answer"].startswith("<say>")
    assert answer["answer"].endswith("</say>")
    scored = found(capsys, "eval", "--adapter", run_folder, "--data", data, "--samples", "1")
    assert scored["tokens"] < 40 * 7  # one token each; the old tokenizer needs more
    assert scored["nll"] < scored["base"]["nll"] - 3
    assert scored["samples"][0]["reference"] == "<say>plum</say>"
    card = (run_folder / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "- new tokens: `<say> (1024)`, `</say> (1025)`" in card
    assert "base.resize_token_embeddings(1026)" in card
    inspected = found(capsys, "adapter", "inspect", run_folder)
    assert inspected["made_by"]["vocabulary"]["rows"] == 1026
    assert any("<say> (1024), </say> (1025)" in finding for finding in inspected["findings"])


def test_a_merged_model_is_the_same(
    run_folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "merged"
    argv = ("adapter", "merge", "--adapter", run_folder, "--out", out, "--verify", "--data", data)
    merged = found(capsys, *argv)
    assert merged["rows"] == 1026
    assert merged["verify"]["problems"] == []
    assert merged["verify"]["identical"] == 1
    with_adapter, alone = (
        found(capsys, "generate", *given, "--prompt", "Say oar.")
        for given in (("--adapter", run_folder), ("--model", out))
    )
    assert with_adapter == alone
    assert "<say>" in alone["answers"][0]["answer"]


def test_other_forms_of_it(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("--prompt", "Say oar.", "--model.dtype", "fp32")
    expected = found(capsys, "generate", "--adapter", run_folder, *asked)
    for verb in ("normalize", "combine"):
        out = tmp_path / verb
        found(capsys, "adapter", verb, run_folder, "--out", out)
        assert found(capsys, "generate", "--adapter", out, *asked) == expected
        merged = tmp_path / f"{verb} merged"
        found(capsys, "adapter", "merge", "--adapter", out, "--out", merged)
        assert (merged / "tokenizer.json").read_bytes() == (
            run_folder / "adapter" / "tokenizer.json"
        ).read_bytes()
    argv = (
        "adapter",
        "combine",
        run_folder,
        f"{tmp_path / 'normalize'}=0.5",
        "--out",
        tmp_path / "x",
    )
    code, _, err = call(capsys, *argv)
    assert code == 2
    assert "several bring some" in err


def test_resuming_is_bit_exact(
    run_folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that was stopped half-way, its tokenizer and rows made anew."""
    out = tmp_path / "again"
    options = ("--train.save_every", 20, "--model.dtype", "fp32", *FLAGS, "--train.max_steps", 40)
    argv = ("train", "--model", starter.folder(), "--data", data, "--out", out, *options)
    assert call(capsys, *argv)[0] == 0
    for gone in ("checkpoints/step-00000040/state.pt", "receipt.json"):
        (out / gone).unlink()
    for file in (out / "adapter").iterdir():
        file.unlink()
    code, _, err = call(capsys, "train", "--resume", "--out", out)
    assert code == 0, err
    assert "resumed after step 20" in err
    one, other = (load_file(f / "adapter" / "adapter_model.safetensors") for f in (run_folder, out))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    for _state in ("finished", "stopped"):
        code, _, err = call(capsys, "train", "--resume", "--out", out, "--lora.new_tokens", "<say>")
        assert code == 2
        assert "lora.new_tokens: started with" in err
        (out / "receipt.json").unlink(missing_ok=True)


def test_preview_and_plan(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ("--model", starter.folder(), "--data", data)
    shown = found(capsys, "preview", *model, "--rows", 1, *FLAGS[:2])["examples"][0]["tokens"]
    marked = [token["id"] for token in shown if token["text"] in ("<say>", "</say>")]
    assert marked == [1024, 1025]
    without, planned = (
        found(capsys, "plan", *model, "--data.max_length", 64, *more) for more in ((), FLAGS[:2])
    )
    assert planned["base"] == without["base"] + 2 * 256
    assert planned["trainable"] == without["trainable"] + 2 * 256
    assert planned["by_target"]["embed_tokens, single tokens"] == 512
    assert planned["tokens_per_step"] < without["tokens_per_step"]


def test_full_fine_tuning_of_a_grown_model(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ("train", "--model", starter.folder(), "--data", data, "--out", tmp_path / "run", *SHORT)
    assert call(capsys, *argv, *FLAGS[:2], "--method", "full")[0] == 0
    model = tmp_path / "run" / "model"
    assert json.loads((model / "config.json").read_text())["vocab_size"] == 1026
    scored = found(capsys, "eval", "--model", model, "--data", data)
    assert scored["tokens"] < 40 * 7


@pytest.mark.parametrize(
    ("flags", "code", "named"),
    [
        (("--lora.new_tokens", "a,<say>"), 2, "'a' is a token already, 67; to train its row"),
        (("--lora.new_tokens", "<say>,<say>"), 2, "lora.new_tokens names a text twice"),
        (("--lora.new_tokens", "<say>", "--lora.target_modules", "lm_head"), 2, "lm_head is adapt"),
        (("--lora.new_tokens", "<nowhere>"), 0, "no training example has the new tokens <nowhere>"),
        (("--lora.trainable_tokens", "{q_proj: [1]}"), 2, "'q_proj' names none of them"),
    ],
)
def test_what_is_said_of_other_tokens(
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: tuple[str, ...],
    code: int,
    named: str,
) -> None:
    argv = ("train", "--model", starter.folder(), "--data", data, "--out", tmp_path / "run", *SHORT)
    exit_code, _, err = call(capsys, *argv, *flags)
    assert exit_code == code, err
    assert named in err
    assert (tmp_path / "run").exists() == (code == 0)

"""What `lorikeet train` leaves after a few steps, exported and verified: as users try things out.

Small updates are lost most easily, and the embedded model finds the bundled text unlikely.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorikeet import starter
from lorikeet.cli.main import main
from lorikeet.export.llama_cpp import find
from lorikeet.gguf.read import open_gguf

STEPS = ["--train.max_steps", "3", "--train.batch_size", "4", "--data.validation", "0"]
SMALL = ["--data.limit", "24", "--prompts", "2"]
LLAMA = ["in llama.cpp"] if find() else []


def trained(out: Path, *more: str) -> Path:
    data = starter.folder().parent / "pirate.jsonl"
    argv = ["train", "--model", starter.folder(), "--data", data, "--out", out, *STEPS, *more]
    assert main(list(map(str, argv))) == 0
    return out


def verified(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[list[str], Any]:
    """The names of the links, and what was wrong."""
    capsys.readouterr()
    code = main(["export", "gguf", *map(str, argv), "--verify", *SMALL, "--json"])
    found = json.loads(capsys.readouterr().out)["verify"]
    assert code == (3 if found["problems"] else 0)
    return [link["name"] for link in found["links"]], found["problems"]


def test_an_adapter_of_three_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained(tmp_path / "run")
    for kind, between in (("bf16", []), ("q4_k_m", ["f16"])):
        argv = ["--adapter", run, "--type", kind, "--out", tmp_path / "x.gguf"]
        assert verified(capsys, *argv) == (["base", "merged", *between, kind, *LLAMA], [])


def test_new_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained(tmp_path / "run", "--lora.new_tokens", "<arr>,<ahoy>")
    argv = ["--adapter", run, "--type", "f32", "--out", tmp_path / "x.gguf"]
    assert verified(capsys, *argv) == (["base", "merged", "f32", *LLAMA], [])
    tokens = open_gguf(tmp_path / "x.gguf").metadata["tokenizer.ggml.tokens"].value
    assert list(tokens[1024:]) == ["<arr>", "<ahoy>"]


def test_a_model_of_full_fine_tuning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained(tmp_path / "run", "--method", "full")
    argv = ["--model", run / "model", "--type", "f32", "--out", tmp_path / "x.gguf"]
    assert verified(capsys, *argv) == (["f32", *LLAMA], [])

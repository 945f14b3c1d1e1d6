"""An adapter with the base, tokenizer and template that it belongs to, and with others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorikeet import starter
from lorikeet.cli.main import main

STEPS = ("--train.max_steps", "4", "--data.validation", "0", "--train.learning_rate", "2e-3")


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str]:
    """Exit code and stderr, in one line."""
    code = main([str(arg) for arg in argv])
    return code, " ".join(capsys.readouterr().err.split())


@pytest.fixture
def adapter(rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    out = tmp_path / "run"
    argv = ("train", "--model", starter.folder(), "--data", rows, "--out", out, *STEPS)
    assert run(capsys, *argv)[0] == 0
    return out / "adapter"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A copy of the embedded model, to be changed."""
    return Path(shutil.copytree(starter.folder(), tmp_path / "base"))


def other_weights(base: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    name = next(name for name in tensors if "q_proj" in name)
    tensors[name] = tensors[name] * 1.5
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})


def other_tokenizer(base: Path) -> None:
    content = json.loads((base / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = content["model"]["vocab"]
    one, two = [token for token in vocab if len(token) > 3][:2]
    vocab[one], vocab[two] = vocab[two], vocab[one]
    (base / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")


def test_its_own_base_elsewhere_is_no_mismatch(
    adapter: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, shown = run(
        capsys,
        "generate",
        "--model",
        base,
        "--adapter",
        adapter,
        "--prompt",
        "Hi",
        "--max-new-tokens",
        2,
    )
    assert code == 0
    assert "the adapter is applied: it moves the logits by" in shown
    assert "another" not in shown


@pytest.mark.parametrize(
    ("change", "what"),
    [(other_weights, "another base model"), (other_tokenizer, "another tokenizer")],
)
def test_another_base_is_refused_unless_it_is_allowed(
    adapter: Path,
    base: Path,
    rows: Path,
    capsys: pytest.CaptureFixture[str],
    change: object,
    what: str,
) -> None:
    assert callable(change)
    change(base)
    argv = ("eval", "--model", base, "--adapter", adapter, "--data", rows)
    code, shown = run(capsys, *argv)
    assert code == 2
    assert what in shown
    assert "--allow-mismatch" in shown
    code, shown = run(capsys, *argv, "--allow-mismatch")
    assert code == 0
    assert what in shown


def test_another_template_is_refused_unless_it_is_allowed(
    adapter: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ("eval", "--adapter", adapter, "--data", rows, "--data.template", "alpaca")
    code, shown = run(capsys, *argv)
    assert code == 2
    assert "another chat template" in shown
    assert run(capsys, *argv, "--allow-mismatch")[0] == 0


def test_an_adapter_that_changes_nothing_is_refused(
    adapter: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = adapter / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file({n: torch.zeros_like(t) if "lora_B" in n else t for n, t in tensors.items()}, weights)
    code, shown = run(capsys, "eval", "--adapter", adapter, "--data", rows)
    assert code == 2
    assert "changes nothing" in shown


VARIANTS: dict[str, tuple[tuple[str, ...], str]] = {
    "dora and lora+": (
        ("--lora.dora", "--train.loraplus_lr_ratio", "16"),
        "model.layers.0.self_attn.q_proj.lora_magnitude_vector",
    ),
    "pissa": (("--lora.init", "pissa"), "model.layers.0.self_attn.q_proj.lora_A.weight"),
    "a whole head": (("--lora.modules_to_save", "lm_head"), "lm_head.weight"),
    "a whole norm": (("--lora.modules_to_save", "norm"), "model.norm.weight"),
    "single tokens": (
        ("--lora.trainable_tokens", "5,9"),
        "model.embed_tokens.token_adapter.trainable_tokens_delta",
    ),
    "new tokens": (
        ("--lora.new_tokens", "plum!,gull!"),
        "model.embed_tokens.token_adapter.trainable_tokens_delta",
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_of_every_variant(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], variant: str
) -> None:
    """Trained, stopped in the middle, resumed, evaluated; in bf16 too."""
    flags, key = VARIANTS[variant]
    out = tmp_path / "run"
    argv = ("train", "--model", starter.folder(), "--data", rows, "--out", out, *STEPS, *flags)
    code, shown = run(capsys, *argv, "--train.save_every", 2, "--model.dtype", "bf16")
    assert code == 0, shown
    saved = load_file(out / "adapter" / "adapter_model.safetensors")
    assert f"base_model.model.{key}" in saved
    newest = max((out / "checkpoints").iterdir(), key=lambda path: path.name)
    shutil.rmtree(newest)
    shutil.rmtree(out / "adapter")
    (out / "receipt.json").unlink()
    code, shown = run(capsys, "train", "--resume", "--out", out)
    assert code == 0, shown
    assert "resumed after step 2" in shown
    again = load_file(out / "adapter" / "adapter_model.safetensors")
    assert saved.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in saved.items())
    code, shown = run(capsys, "eval", "--adapter", out, "--data", rows)
    assert code == 0, shown
    assert "moves the logits" in shown

"""`lorikeet adapter inspect` on adapters with known updates, and on one of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorikeet import starter
from lorikeet.adapters import Adapter, Update, read_adapter, write_adapter
from lorikeet.cli.main import main

NAMES = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj", "lm_head"]


@pytest.fixture
def made() -> Adapter:
    """Three modules of norms 1, 2 and 0."""
    generator = torch.Generator().manual_seed(1)
    updates = {}
    for name, norm in zip(NAMES, (1.0, 2.0, 0.0), strict=True):
        B = torch.randn(6, 3, generator=generator)
        plain = Update(torch.randn(3, 8, generator=generator), B, 0.5)
        updates[name] = Update(plain.A, B * (norm / plain.delta().norm()), 0.5)
    return Adapter(updates, base_model="org/base")


@pytest.fixture
def folder(made: Adapter, tmp_path: Path) -> Path:
    write_adapter(made, tmp_path / "adapter")
    return tmp_path / "adapter"


def call(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    code = main(["adapter", "inspect", *map(str, argv)])
    shown = capsys.readouterr()
    assert code == 0, shown.err
    return shown.out


def refusal(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    assert main(["adapter", "inspect", *map(str, argv)]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    return shown.err


def row(text: str, start: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(start)]
    return line.split()


def test_what_is_printed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = call(capsys, folder)
    assert row(shown, "  adapts")[1:3] == ["3", "modules:"]
    assert row(shown, "  rank") == ["rank", "3"]
    assert row(shown, "  alpha") == ["alpha", "1.5"]
    assert row(shown, "  base model")[2:] == ["org/base"]
    assert "another tool" in shown
    size = (folder / "adapter_model.safetensors").stat().st_size
    assert row(shown, "  file") == ["file", f"{size:,}", "bytes"]
    # Full names, the one that moved most first: 2 / sqrt(48) and 1 / sqrt(48).
    assert [shown.index(name) for name in (NAMES[1], NAMES[0])] == sorted(
        shown.index(name) for name in NAMES[:2]
    )
    assert row(shown, NAMES[1])[1:3] == ["0.29", "2"]
    assert row(shown, NAMES[0])[1:3] == ["0.14", "1"]
    assert row(shown, "other")[1:3] == ["0", "0"]
    # All together: sqrt(1 + 4) / sqrt(3 * 48).
    assert row(shown, "all")[1:5] == ["0.14", "0.29", "0", "0.19"]
    assert "B is all zero" in shown
    assert "lm_head" in shown.split("findings")[1]


def test_json_is_alone_on_stdout_and_complete(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    plot = tmp_path / "a.svg"
    found = json.loads(call(capsys, folder.parent, "--json", "--top", 2, "--plot", plot))
    assert plot.is_file()
    assert found["folder"] == str(folder)
    assert found["made_by"] is None
    assert found["base_model"] == "org/base"
    assert found["config"]["r"] == 3
    assert found["moved_by"] == "rms"
    assert [m["name"] for m in found["modules"]] == [NAMES[1], NAMES[0]]
    assert found["module_count"] == 3
    assert found["parameters"] == 3 * 3 * (6 + 8)
    assert found["total"]["norm"] == pytest.approx(5**0.5)
    assert len(found["findings"]) == 1


def test_norms_relative_to_the_base(
    made: Adapter, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    norms = dict(zip(NAMES, (4.0, 80.0, 1.0), strict=True))
    ones = torch.ones(6, 8) / 48**0.5
    weights = {f"{name}.weight": ones * norm for name, norm in norms.items()}
    save_file(weights, base / "model.safetensors")
    found = json.loads(call(capsys, folder, "--model", base, "--json"))
    assert found["moved_by"] == "relative"
    relative = {m["name"]: m["relative"] for m in found["modules"]}
    assert list(relative) == [NAMES[0], NAMES[1], NAMES[2]]
    assert relative[NAMES[0]] == pytest.approx(1 / 4)
    assert relative[NAMES[1]] == pytest.approx(2 / 80)
    shown = call(capsys, folder, "--model", base)
    assert row(shown, NAMES[0])[1] == "25"
    assert "% of ‖W‖" in shown
    message = refusal(capsys, folder, "--model", tmp_path / "none")
    assert "no model folder" in message


def test_an_adapter_of_a_run(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    argv = ["train", "--model", starter.folder(), "--data", rows, "--out", out]
    argv += ["--train.max_steps", 2, "--lora.r", 4, "--seed", 7]
    assert main([str(arg) for arg in argv]) == 0
    capsys.readouterr()
    shown = call(capsys, out, "--model", starter.folder())
    receipt = json.loads((out / "receipt.json").read_text(encoding="utf-8"))
    assert row(shown, "  fingerprint")[1] == receipt["base_fingerprint"]
    assert row(shown, "  data sha256")[2] == receipt["data_sha256"]
    assert row(shown, "  seed") == ["seed", "7"]
    assert "torch" in " ".join(row(shown, "  versions"))
    found = json.loads(call(capsys, out, "--model", starter.folder(), "--json", "--top", 99))
    update = read_adapter(out / "adapter").updates["model.layers.1.self_attn.v_proj"].delta()
    weight = load_file(starter.folder() / "model.safetensors")
    expected = update.norm() / weight["model.layers.1.self_attn.v_proj.weight"].float().norm()
    relative = {m["name"]: m["relative"] for m in found["modules"]}
    assert relative["model.layers.1.self_attn.v_proj"] == pytest.approx(expected.item(), rel=1e-4)

    card = (out / "adapter" / "README.md").read_text(encoding="utf-8")
    tuned = receipt["result"]["tuned"]
    error = tuned["perplexity"] * tuned["nll_stderr"]
    assert f"| with the adapter | {tuned['perplexity']:.3f} | {error:.3f} |" in card
    assert "- steps: 2\n" in card
    assert "- learning rate (peak): 0.0002\n" in card
    assert f"- trained on: {40 - tuned['documents']} rows\n" in card
    assert receipt["data_sha256"] in card
    assert str(tmp_path) not in card


def test_dora_shows_its_magnitudes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    update = Update(torch.randn(2, 8), torch.randn(6, 2), 1.0, magnitude=torch.linspace(1, 3, 6))
    write_adapter(Adapter({NAMES[0]: update}), tmp_path / "a")
    shown = call(capsys, tmp_path / "a")
    assert row(shown, NAMES[0])[-3:] == ["1", "..", "3"]
    assert "DoRA in 1 modules" in shown


def test_names_are_only_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "model.layers.0.[red]q[/x]\x1b[31m"
    update = Update(torch.randn(2, 8), torch.randn(6, 2), 1.0)
    write_adapter(Adapter({name: update}, base_model="\x1b]0;x\x07[bold]"), tmp_path / "a")
    shown = call(capsys, tmp_path / "a")
    assert "model.layers.0.[red]q[/x]?[31m" in shown
    assert "?]0;x?[bold]" in shown
    assert "\x1b" not in shown


def test_what_is_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "there is no adapter" in refusal(capsys, tmp_path / "none")
    assert "must end in .png or .svg" in refusal(capsys, folder, "--plot", "a.pdf")
    assert "--top is -1" in refusal(capsys, folder, "--top", -1)
    tensors = folder / "adapter_model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-4])
    assert "damaged" in refusal(capsys, folder)

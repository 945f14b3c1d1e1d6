"""`lorikeet export gguf` as a user meets it, on the embedded model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorikeet import starter
from lorikeet.adapters import read_adapter, save_adapter, write_adapter
from lorikeet.cli.main import main
from lorikeet.config import LoraConfig
from lorikeet.export.llama_cpp import LlamaCpp, find
from lorikeet.gguf.mixture import KINDS
from lorikeet.gguf.read import GGUFFile, open_gguf
from lorikeet.lora import inject, lora_parameters
from lorikeet.model import load_model

SMALL = ["--data.limit", "6", "--prompts", "2"]
LLAMA = ["in llama.cpp"] if find() else []


def make_adapter(folder: Path, **options: Any) -> Path:
    """A run folder with an adapter of the embedded model, random and small."""
    base = load_model(starter.folder(), dtype="fp32")
    config = LoraConfig(r=4, alpha=8.0, **options)
    inject(base.model, config, seed=0)
    generator = torch.Generator().manual_seed(1)
    for parameter in lora_parameters(base.model).values():
        noise = torch.randn(parameter.shape, generator=generator)
        with torch.no_grad():
            parameter.add_(0.05 * noise)
    save_adapter(
        base.model,
        folder / "adapter",
        config=config,
        base_model=str(starter.folder()),
        provenance={"base_fingerprint": base.fingerprint},
    )
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tmp_path_factory.mktemp("run"))


def call(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    code = main(["export", "gguf", *map(str, argv)])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def values(file: GGUFFile) -> dict[str, Any]:
    return {name: field.value for name, field in file.metadata.items()}


def test_a_base_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "x.gguf"
    code, shown, said = call(capsys, "--model", starter.folder(), "--out", out)
    assert code == 0
    assert "MB" in shown
    assert "bits a weight, q4_k_m (" in " ".join(shown.split())
    assert "warning" not in said
    file = open_gguf(out)
    assert file.tensors["blk.1.attn_q.weight"].type == "Q4_K"
    assert values(file)["general.architecture"] == "llama"
    assert "<|im_start|>" in values(file)["tokenizer.chat_template"]
    assert [path.name for path in tmp_path.iterdir()] == ["x.gguf"]


def test_json_alone_on_stdout(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "x.gguf"
    argv = ["--adapter", adapter, "--out", out, "--type", "Q5_K_M", "--json"]
    code, shown, _ = call(capsys, *argv)
    found = json.loads(shown)
    assert code == 0
    assert 0 < found.pop("seconds") < 60
    weights = sum(t.numel() for t in load_file(starter.folder() / "model.safetensors").values())
    size = out.stat().st_size
    assert found.pop("bits_per_weight") == pytest.approx(size * 8 / weights)
    assert found.pop("tensors") == {"Q5_K": 24, "F32": 9, "Q6_K": 5}
    assert found == {
        "out": str(out),
        "type": "q5_k_m",
        "architecture": "llama",
        "bytes": size,
        "weights": weights,
        "fallbacks": {},
        "calibrated": False,
        "notes": [],
        "verify": None,
    }


def test_the_adapter_is_in_the_file(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run folder or the adapter's own; the base is the one that it names."""
    for name, folder in (("a", adapter), ("b", adapter / "adapter")):
        argv = ["--adapter", folder, "--type", "f32", "--out", tmp_path / name]
        assert call(capsys, *argv)[0] == 0
    assert (
        call(capsys, "--model", starter.folder(), "--type", "f32", "--out", tmp_path / "c")[0] == 0
    )
    first, second, base = (open_gguf(tmp_path / name) for name in "abc")
    name = "blk.0.attn_v.weight"
    own, again, plain = (file.rows(name, 0, 128) for file in (first, second, base))
    assert torch.equal(own, again)
    update = read_adapter(adapter / "adapter").updates["model.layers.0.self_attn.v_proj"]
    torch.testing.assert_close(own - plain, update.delta(), rtol=0, atol=1e-6)
    assert update.delta().abs().max() > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_every_type_is_a_file(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--model", starter.folder(), "--type", kind, "--out", tmp_path / "x.gguf", "--json"]
    code, shown, _ = call(capsys, *argv)
    assert code == 0
    assert json.loads(shown)["type"] == kind
    assert len(open_gguf(tmp_path / "x.gguf").tensors) == 38


def test_fallbacks_are_said(
    shared: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--model", shared("models/stories260k"), "--out", tmp_path / "x.gguf"]
    code, _, said = call(capsys, *argv)
    assert code == 0
    assert "tensors have rows that are no multiple of 256" in " ".join(said.split())
    found = json.loads(call(capsys, *argv, "--json")[1])
    assert found["fallbacks"]["blk.0.attn_q.weight"] == ["Q5_0", "Q4_K"]


@pytest.mark.parametrize("kind", ["f16", "q4_k_m"])
def test_verified(
    kind: str, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "x.gguf"
    argv = ["--adapter", adapter, "--type", kind, "--out", out, "--verify", *SMALL]
    code, shown, _ = call(capsys, *argv, "--json")
    found = json.loads(shown)["verify"]
    assert code == 0
    assert found["problems"] == []
    assert found["reference"] == "adapter"
    names = [link["name"] for link in found["links"]]
    assert names == ["base", "merged", *(["f16"] * (kind != "f16")), kind, *LLAMA]
    for link in found["links"]:
        assert link["reference"]["documents"] == 6
        assert link["prompts"] == 2
        assert {"kl_mean", "kl_p99", "agreeing", "difference", "candidate"} <= set(link)
        assert (link["tolerance"] is None) == (link["name"] == "base")
    if LLAMA:
        assert found["spelling"] == {"conversations": 6, "equal": 6}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("who", ["starter", "adapter", "stories260k"])
def test_no_sound_file_is_refused(
    who: str,
    kind: str,
    adapter: Path,
    shared: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Small models, which lose most, on text that they have never seen."""
    folders = {"starter": ["--model", starter.folder()], "adapter": ["--adapter", adapter]}
    argv = folders.get(who) or ["--model", shared("models/stories260k")]
    argv += ["--type", kind, "--out", tmp_path / "x.gguf", "--verify", "--prompts", "0", "--json"]
    code, shown, _ = call(capsys, *argv)
    assert json.loads(shown)["verify"]["problems"] == []
    assert code == 0


def test_the_table(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--adapter", adapter, "--type", "q8_0", "--out", tmp_path / "x.gguf", "--verify"]
    code, shown, _ = call(capsys, *argv, *SMALL)
    assert code == 0
    cells = [line.split("│")[1].strip() for line in shown.splitlines() if "│" in line]
    assert [cell for cell in cells if cell] == ["base", "adapter", "merged", "f16", "q8_0", *LLAMA]
    assert "perplexity" in shown
    if LLAMA:
        assert "6 of 6 rendered conversations have the same token ids" in " ".join(shown.split())


def test_a_tolerance_that_nothing_meets(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "x.gguf"
    argv = ["--adapter", adapter, "--type", "q8_0", "--out", out, "--verify", *SMALL]
    code, shown, said = call(capsys, *argv, "--tolerance-kl", "0")
    assert code == 3
    assert "merged" in shown  # the table is there all the same
    assert "not every link holds" in " ".join(said.split())
    assert "at most 0e+00 is allowed" in " ".join(said.split())
    code, shown, _ = call(capsys, *argv, "--tolerance-kl", "0", "--json")
    assert code == 3
    assert json.loads(shown)["verify"]["problems"]
    assert out.exists()


def test_a_base_is_verified_on_rows_of_the_users(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--model", starter.folder(), "--type", "q8_0", "--out", tmp_path / "x.gguf"]
    argv += ["--verify", "--data", rows, "--prompts", "0", "--json"]
    code, shown, _ = call(capsys, *argv)
    found = json.loads(shown)["verify"]
    assert code == 0
    assert found["reference"] == "base"
    assert [link["name"] for link in found["links"]] == ["f16", "q8_0", *LLAMA]
    assert found["links"][0]["reference"]["documents"] == 40


def test_a_template_of_the_users(
    shared: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is written down without --verify too; what a base without one is spoken to in is not."""
    out = tmp_path / "x.gguf"
    argv = ["--model", shared("models/stories260k"), "--type", "q8_0", "--out", out]
    assert call(capsys, *argv)[0] == 0
    assert "tokenizer.chat_template" not in values(open_gguf(out))
    assert call(capsys, *argv, "--data.template", "alpaca")[0] == 0
    assert "### Instruction" in values(open_gguf(out))["tokenizer.chat_template"]


@pytest.mark.parametrize("name", ["words.txt", "rows.jsonl"])
def test_calibrated(
    name: str, rows: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "words.txt"
    text.write_text("Mina lives in the market and eats apples.\n" * 60, encoding="utf-8")
    argv = ["--adapter", adapter, "--type", "q3_k_m"]
    assert call(capsys, *argv, "--out", tmp_path / "plain.gguf")[0] == 0
    argv += ["--calibrate", tmp_path / name, "--calibrate-rows", "3", "--out", tmp_path / "x.gguf"]
    code, shown, _ = call(capsys, *argv)
    assert code == 0
    assert "with an importance matrix" in " ".join(shown.split())
    found = values(open_gguf(tmp_path / "x.gguf"))
    assert found["quantize.imatrix.file"] == name
    assert found["quantize.imatrix.entries_count"] == 28
    assert 1 <= found["quantize.imatrix.chunks_count"] <= 3
    plain, own = ((tmp_path / n).read_bytes() for n in ("plain.gguf", "x.gguf"))
    assert plain != own
    assert json.loads(call(capsys, *argv, "--json")[1])["calibrated"] is True


def test_an_adapter_alone(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "lora.gguf"
    argv = ["--adapter", adapter, "--out", out, "--adapter-only"]
    code, shown, _ = call(capsys, *argv)
    assert code == 0
    assert "28 modules (28 of rank 4), alpha 8, f16" in " ".join(shown.split())
    file = open_gguf(out)
    assert {info.type for info in file.tensors.values()} == {"F16"}
    assert values(file)["adapter.lora.alpha"] == 8
    code, shown, _ = call(capsys, *argv, "--type", "f32", "--json")
    assert code == 0
    found = json.loads(shown)
    assert (found["type"], found["modules"], found["ranks"]) == ("f32", 28, {"4": 28})
    assert {info.type for info in open_gguf(out).tensors.values()} == {"F32"}


@pytest.mark.skipif(not LLAMA, reason="needs xllamacpp or llama-cpp-python")
def test_an_adapter_alone_on_its_base_is_both_in_one(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, lora, both = (tmp_path / name for name in ("base.gguf", "lora.gguf", "both.gguf"))
    argv = ["--type", "f32", "--out"]
    assert call(capsys, "--model", starter.folder(), *argv, base)[0] == 0
    assert call(capsys, "--adapter", adapter, "--adapter-only", *argv, lora)[0] == 0
    assert call(capsys, "--adapter", adapter, *argv, both)[0] == 0
    ids = torch.randint(3, 1000, (40,)).tolist()
    with LlamaCpp(base, adapter=lora, threads=1) as parts, LlamaCpp(both, threads=1) as one:
        found, expected = parts.logits(ids), one.logits(ids)
    with LlamaCpp(base, threads=1) as alone:
        plain = alone.logits(ids)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    assert (plain - expected).abs().max() > 0.1 * expected.abs().max()


def test_what_the_format_for_adapters_cannot_carry(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_adapter(tmp_path / "run", dora=True)
    argv = ["--adapter", run, "--out", tmp_path / "x.gguf"]
    code, _, said = call(capsys, *argv, "--adapter-only")
    assert code == 2
    assert "DoRA: 28 modules have magnitudes" in " ".join(said.split())
    assert "lorikeet adapter normalize" in " ".join(said.split())
    assert not (tmp_path / "x.gguf").exists()
    assert call(capsys, *argv, "--type", "q8_0")[0] == 0


def other_base(folder: Path) -> Path:
    """The embedded model with one matrix that is not its own."""
    shutil.copytree(starter.folder(), folder)
    path = folder / "model.safetensors"
    weights = {name: t.clone() for name, t in load_file(path).items()}
    weights["model.layers.1.mlp.up_proj.weight"] *= 2
    path.unlink()
    save_file(weights, path, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("more", [[], ["--verify", *SMALL], ["--adapter-only"]])
def test_another_base_than_the_adapters(
    more: list[str], adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, out = other_base(tmp_path / "base"), tmp_path / "x.gguf"
    argv = ["--model", base, "--adapter", adapter, "--out", out, "--type", "f16", *more]
    code, _, said = call(capsys, *argv)
    assert code == 2
    assert "it was trained with another base model" in said
    assert "--allow-mismatch" in said
    assert not out.exists()
    code, _, said = call(capsys, *argv, "--allow-mismatch")
    assert code == 0
    assert "warning: the adapter: it was trained with another base model" in said
    assert out.exists()


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--type", "q7_k"], "--type: expected one of f32, f16, bf16, q8_0"),
        (["--prompts", "-1", "--verify"], "--prompts: expected a number from 0 on"),
        (["--tolerance-kl", "nan", "--verify"], "--tolerance-kl: expected a number from 0 on"),
        (["--data", "x.jsonl"], "--data.path does nothing without --verify"),
        (["--prompts", "3"], "--prompts does nothing without --verify"),
        (["--verify", "--data.validation", "0.5"], "--data.validation does nothing here"),
        (["--tolerance-kl", "3"], "--tolerance-kl does nothing without --verify"),
        (["--calibrate-rows", "3"], "--calibrate-rows does nothing without --calibrate"),
        (
            ["--calibrate", "x.txt", "--calibrate-rows", "0"],
            "--calibrate-rows: expected at least 1",
        ),
        (["--calibrate", "x.txt", "--type", "q8_0"], "--calibrate does nothing for q8_0"),
        (["--calibrate", "nowhere.txt"], "nowhere.txt"),
        (["--model", "no/where/at/all"], "there is no model folder no/where/at/all"),
        (["--adapter", "nowhere"], "there is no adapter in nowhere"),
        (["--typ", "f16"], "unknown argument --typ (did you mean --type?)"),
        (["--adapter-only", "--type", "q8_0"], "--type: an adapter alone is stored as f16 or f32"),
        (["--adapter-only", "--verify"], "--verify does not go with --adapter-only"),
        (["--adapter-only", "--prompts", "0"], "--prompts does not go with --adapter-only"),
        (["--adapter-only", "--tolerance-kl", "0"], "--tolerance-kl does not go with"),
        (["--adapter-only", "--data", "x.jsonl"], "--data.path does not go with --adapter-only"),
        (["--adapter-only", "--calibrate", "x"], "--calibrate does not go with --adapter-only"),
        (["--adapter-only", "--calibrate-rows", "3"], "--calibrate-rows does not go with"),
    ],
)
def test_bad_input(
    adapter: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    argv: Sequence[str],
    named: str,
) -> None:
    try:
        code, shown, said = call(capsys, "--adapter", adapter, "--out", tmp_path / "x.gguf", *argv)
    except SystemExit as end:  # argparse's own refusals
        shown, said = capsys.readouterr()
        code = int(str(end.code))
    assert code == 2
    assert named in " ".join(said.split())
    assert shown == ""
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_alone_needs_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--model", starter.folder(), "--adapter-only", "--out", tmp_path / "x.gguf"]
    code, _, said = call(capsys, *argv)
    assert code == 2
    assert "--adapter is missing: there is nothing to export" in said


def test_neither_model_nor_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, said = call(capsys, "--out", tmp_path / "x.gguf")
    assert code == 2
    assert "--model" in said


@pytest.mark.parametrize("more", [[], ["--adapter-only"]])
def test_out_is_a_file(
    more: list[str], adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, said = call(capsys, "--adapter", adapter, "--out", tmp_path, *more)
    assert code == 2
    assert "is a folder; expected the name of a file" in " ".join(said.split())


@pytest.mark.parametrize("more", [[], ["--adapter-only"]])
def test_nothing_but_a_gguf_file_is_replaced(
    more: list[str], adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "model.safetensors"
    out.write_bytes(b"years of work")
    argv = ["--adapter", adapter, "--type", "f16", "--out", out, *more]
    code, _, said = call(capsys, *argv)
    assert code == 2
    assert "is there and is no GGUF file" in " ".join(said.split())
    assert out.read_bytes() == b"years of work"
    out.write_bytes(b"")  # what mktemp leaves
    assert call(capsys, *argv)[0] == 0
    assert call(capsys, *argv)[0] == 0


@pytest.mark.parametrize("more", [[], ["--adapter-only"]])
def test_an_adapter_that_changes_nothing(
    more: list[str], adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As it is before its first step; told without a model that runs, too."""
    folder, file = tmp_path / "a", "adapter_model.safetensors"
    shutil.copytree(adapter / "adapter", folder)
    factors = load_file(folder / file)
    still = {key: t * 0 if "lora_B" in key else t for key, t in factors.items()}
    save_file(still, folder / file)
    out = tmp_path / "x.gguf"
    code, _, said = call(capsys, "--adapter", folder, "--type", "f16", "--out", out, *more)
    assert code == 2
    assert "the adapter changes nothing" in said
    assert not out.exists()


def test_a_name_that_the_system_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, said = call(capsys, "--model", starter.folder(), "--out", tmp_path / ("x" * 300))
    assert code == 2
    assert "File name too long" in " ".join(said.split())


def test_out_may_be_in_a_new_folder_and_replaces(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "deep" / "x.gguf"
    for kind in ("q8_0", "q4_0"):
        assert call(capsys, "--model", starter.folder(), "--type", kind, "--out", out)[0] == 0
    assert open_gguf(out).tensors["blk.0.attn_q.weight"].type == "Q4_0"
    (tmp_path / "file").write_text("x")
    code, _, said = call(capsys, "--model", starter.folder(), "--out", tmp_path / "file" / "x.gguf")
    assert code == 2
    assert "cannot write" in said


def test_an_adapter_with_scales_of_its_own(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An adapter that came from elsewhere has no fingerprint to be held to."""
    plain = read_adapter(adapter / "adapter")
    foreign = type(plain)(updates=plain.updates, base_model=plain.base_model)
    write_adapter(foreign, tmp_path / "foreign")
    argv = ["--model", other_base(tmp_path / "base"), "--adapter", tmp_path / "foreign"]
    assert call(capsys, *argv, "--type", "q8_0", "--out", tmp_path / "x.gguf")[0] == 0

"""`lorikeet adapter merge` as a user meets it, on the embedded model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorikeet import starter
from lorikeet.adapters import merge as merge_module
from lorikeet.adapters import save_adapter
from lorikeet.cli.main import main
from lorikeet.config import LoraConfig
from lorikeet.lora import inject, lora_parameters
from lorikeet.model import load_model


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the embedded model, random and small, in a run folder."""
    base = load_model(starter.folder(), dtype="fp32")
    config = LoraConfig(r=4, alpha=8.0)
    inject(base.model, config, seed=0)
    generator = torch.Generator().manual_seed(1)
    for parameter in lora_parameters(base.model).values():
        torch.nn.init.normal_(parameter, std=0.05, generator=generator)
    folder = tmp_path_factory.mktemp("run")
    save_adapter(
        base.model,
        folder / "adapter",
        config=config,
        base_model=str(starter.folder()),
        provenance={"base_fingerprint": base.fingerprint},
    )
    return folder


def call(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    code = main(["adapter", "merge", *map(str, argv)])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_a_merged_model_is_a_model(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "merged"
    code, shown, _ = call(capsys, "--adapter", adapter, "--out", out)
    assert code == 0
    assert "merged 28 of 38 tensors" in shown
    base = load_model(out)
    assert base.fingerprint != load_model(starter.folder()).fingerprint
    names = {path.name for path in out.iterdir()}
    assert names == {path.name for path in starter.folder().iterdir()} | {"lorikeet.json"}


def test_json_alone_on_stdout(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "merged"
    code, shown, _ = call(capsys, "--adapter", adapter, "--out", out, "--json")
    found = json.loads(shown)
    assert code == 0
    assert found.pop("seconds") > 0
    assert found == {"out": str(out), "tensors": 38, "merged": 28, "rows": None, "verify": None}


def test_verified(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "merged"
    code, shown, _ = call(capsys, "--adapter", adapter, "--out", out, "--verify", "--json")
    verified = json.loads(shown)["verify"]
    assert code == 0
    assert verified["problems"] == []
    assert verified["reference"]["documents"] == 64
    assert verified["prompts"] == 16
    assert 0 < verified["kl_mean"] < 1e-4  # bf16 weights: rounded, but only that
    assert verified["tolerance"]["kl"] == 5e-4
    assert verified["agreeing"] > 0.5


def test_verified_in_full_precision_on_data_of_the_users(
    adapter: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    shutil.copytree(starter.folder(), base)
    weights = {name: t.float() for name, t in load_file(base / "model.safetensors").items()}
    (base / "model.safetensors").unlink()
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    argv = ["--model", base, "--adapter", adapter, "--out", tmp_path / "o", "--data", rows]
    code, shown, _ = call(capsys, *argv, "--verify", "--prompts", 3, "--json")
    verified = json.loads(shown)["verify"]
    assert code == 0
    assert verified["reference"]["documents"] == 40
    assert verified["tolerance"] == {"kl": 1e-6, "nll": 1e-5}
    assert verified["kl_mean"] < 1e-8
    assert (verified["identical"], verified["prompts"]) == (1, 3)


def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    """One matrix of the merged model becomes that of another layer once it is on disk."""
    merge = merge_module.merge

    def wrong(base: Path, adapter: Any, out: Path, **options: Any) -> Any:
        report = merge(base, adapter, out, **options)
        path = out / "model.safetensors"
        weights = {name: t.clone() for name, t in load_file(path).items()}
        stem = "model.layers.{}.self_attn.v_proj.weight"
        weights[stem.format(2)] = weights[stem.format(1)].clone()
        save_file(weights, path, metadata={"format": "pt"})
        return report

    monkeypatch.setattr(merge_module, "merge", wrong)


def test_a_wrong_tensor_fails_the_check(
    adapter: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    planted(monkeypatch)
    argv = ["--adapter", adapter, "--out", tmp_path / "merged", "--verify"]
    code, shown, said = call(capsys, *argv)
    assert code == 3
    assert "base + adapter" in shown  # the table is there all the same
    assert "99th percentile" in shown
    assert "is not the base with the adapter" in said
    assert "the mean KL is" in said
    code, shown, _ = call(capsys, *argv, "--json")
    assert code == 3
    assert json.loads(shown)["verify"]["problems"]


def test_a_tolerance_of_the_users(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--adapter", adapter, "--out", tmp_path / "merged", "--verify", "--data.limit", 4]
    code, _, said = call(capsys, *argv, "--tolerance-kl", 1e-12)
    assert code == 3
    assert "at most 1e-12 is allowed" in said
    code, shown, _ = call(capsys, *argv, "--model.dtype", "bf16", "--prompts", 0)
    assert code == 0
    assert "(at most 1e-02)" in shown


@pytest.mark.parametrize("verify", [[], ["--verify", "--data.limit", "4", "--prompts", "0"]])
def test_another_base_than_the_adapters(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], verify: list[str]
) -> None:
    assert call(capsys, "--adapter", adapter, "--out", tmp_path / "once")[0] == 0
    argv = ["--model", tmp_path / "once", "--adapter", adapter, "--out", tmp_path / "o", *verify]
    code, _, said = call(capsys, *argv)
    assert code == 2
    assert "it was trained with another base model" in said
    assert "--allow-mismatch" in said
    assert not (tmp_path / "o").exists()
    code, _, said = call(capsys, *argv, "--allow-mismatch")
    assert code == 0
    assert "warning: the adapter: it was trained with another base model" in said


def test_a_base_in_another_type_is_the_same_base(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    shutil.copytree(starter.folder(), base)
    weights = {name: t.float() for name, t in load_file(base / "model.safetensors").items()}
    (base / "model.safetensors").unlink()
    torch.save(weights, base / "pytorch_model.bin")
    argv = ["--model", base, "--adapter", adapter, "--out", tmp_path / "o", "--shard-size", "2MB"]
    code, _, said = call(capsys, *argv)
    assert (code, said) == (0, "")
    shards = list((tmp_path / "o").glob("model-*.safetensors"))
    assert len(shards) >= 5
    assert max(path.stat().st_size for path in shards) <= 2_000_000


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--shard-size", "5 bananas"], "--shard-size: expected a size such as 5GB"),
        (["--prompts", "-1", "--verify"], "--prompts: expected a number from 0 on"),
        (["--tolerance-kl", "nan", "--verify"], "--tolerance-kl: expected a number from 0 on"),
        (["--data", "x.jsonl"], "--data.path does nothing without --verify"),
        (["--prompts", "3"], "--prompts does nothing without --verify"),
        (["--tolerance-kl", "3"], "--tolerance-kl does nothing without --verify"),
        (["--model", "no/where/at/all"], "there is no model folder no/where/at/all"),
        (["--adapter", "nowhere"], "there is no adapter in nowhere"),
    ],
)
def test_bad_input(
    adapter: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    argv: list[str],
    named: str,
) -> None:
    code, _, said = call(capsys, "--adapter", adapter, "--out", tmp_path / "o", *argv)
    assert code == 2
    assert named in said
    assert not (tmp_path / "o").exists()


def test_what_is_there_is_not_replaced(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    code, _, said = call(capsys, "--adapter", adapter, "--out", tmp_path)
    assert code == 2
    assert "is not an earlier merge" in said
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    code, _, said = call(capsys, "--out", tmp_path / "o")
    assert code == 2
    assert "give --adapter DIR" in said
    code, _, said = call(capsys, "--adapter", adapter, "--out", tmp_path / ("x" * 300))
    assert code == 2
    assert "File name too long" in said


def test_a_base_of_the_hubs_cache(adapter: Path, tmp_path: Path) -> None:
    """Links into the cache's own store, no network."""
    cache = tmp_path / "hub" / "models--org--name"
    snapshot, blobs = cache / "snapshots" / ("0" * 40), cache / "blobs"
    for folder in (snapshot, blobs, cache / "refs"):
        folder.mkdir(parents=True)
    (cache / "refs" / "main").write_text("0" * 40)
    for path in starter.folder().iterdir():
        shutil.copy(path, blobs / path.name)
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    argv = ["--model", "org/name", "--adapter", adapter, "--out", tmp_path / "o", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "lorikeet", "adapter", "merge", *map(str, argv)],
        env={**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["merged"] == 28
    assert not any(path.is_symlink() for path in (tmp_path / "o").iterdir())

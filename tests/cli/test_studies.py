"""`lorikeet compare` and `lorikeet sweep`, as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorikeet import starter
from lorikeet.cli.main import main


def _sweep(folder: Path) -> Path:
    rows = starter.data("pirate").read_text(encoding="utf-8").splitlines()[:40]
    data = folder / "rows.jsonl"
    data.write_text("\n".join(rows) + "\n", encoding="utf-8")
    path = folder / "sweep.yaml"
    tree = {
        "model": {"path": str(starter.folder())},
        "data": {"path": str(data)},
        "train": {"max_steps": 1},
        "sweep": {"lora.r": [1, 2]},
    }
    path.write_text(json.dumps(tree), encoding="utf-8")
    return path


def test_a_sweep_prints_its_figures_and_leaves_the_same_table_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = _sweep(tmp_path)
    tables = []
    for name in ("a", "b"):
        out = tmp_path / name
        assert main(["sweep", str(path), "--out", str(out), "--other", "none", "--json"]) == 0
        printed = json.loads(capsys.readouterr().out)
        assert [run["r"] for run in printed["runs"]] == [None, 1, 2]
        assert {
            "method",
            "rows",
            "seed",
            "trainable",
            "seconds",
            "nll_stderr",
            "perplexity",
        } <= set(printed["runs"][1])
        assert (out / "report.html").is_file()
        tables.append((out / "experiment_table.md").read_bytes())
    assert tables[0] == tables[1]


def test_a_dry_run_only_names_the_trials(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", str(_sweep(tmp_path)), "--dry-run"]) == 0
    assert capsys.readouterr().out.split() == ["r=1,seed=0", "r=2,seed=0"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["sweep", "SWEEP", "--out", "OUT", "--workers", "0"], "--workers must be at least 1"),
        (["sweep", "SWEEP"], "out (--out)"),
        (["sweep", "SWEEP", "--out", "OUT", "--lora.r", "4"], "given as a flag and varied"),
        (["sweep", "absent.yaml", "--out", "OUT"], "absent.yaml"),
        (["compare", "--model", "M", "--data", "D", "--out", "OUT", "--methods", "qlora"], "qlora"),
        (
            ["compare", "--model", "M", "--data", "D", "--out", "OUT", "--grid", "lora"],
            "--grid lora",
        ),
        (["compare", "--model", "M", "--data", "D", "--out", "OUT", "--seeds", "0"], "--seeds"),
        (["compare", "--out", "OUT"], "data.path"),
    ],
)
def test_what_does_not_hold_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    places = {"SWEEP": str(_sweep(tmp_path)), "OUT": str(tmp_path / "out")}
    assert main([places.get(argument, argument) for argument in arguments]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

"""`lorikeet doctor` as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorikeet import starter
from lorikeet.cli.main import main


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two runs, one of them at a learning rate that does nothing."""
    folder = tmp_path_factory.mktemp("study")
    for name, rate, epochs in (("good", "3e-3", 2), ("low", "1e-7", 0.4)):
        argv = ["train", "--model", starter.folder(), "--data", starter.data("json")]
        argv += ["--data.validation", starter.data("json-test"), "--data.limit", 300]
        argv += ["--out", folder / "runs" / name, "--model.threads", 1]
        argv += ["--train.epochs", epochs, "--train.learning_rate", rate]
        assert main([str(word) for word in argv]) == 0
    return folder


def test_a_healthy_run(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(study / "runs" / "good"), "--strict"]) == 0
    assert capsys.readouterr().out == f"{study}/runs/good: nothing found\n"
    assert main(["doctor", str(study / "runs" / "good"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["healthy"] is True
    assert found["findings"] == []


def test_a_run_with_problems(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(study / "runs" / "low")
    assert main(["doctor", run]) == 0  # findings are no failure
    shown = capsys.readouterr().out
    assert "problem  not-learning" in shown
    assert "What to do: " in shown
    assert main(["doctor", run, "--json", "--strict"]) == 3
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert (found["run"], found["healthy"]) == (run, False)
    keys = {"id", "severity", "message", "evidence", "advice"}
    assert all(set(finding) == keys for finding in found["findings"])
    assert found["findings"][0]["severity"] == "problem"  # these come first
    assert "1 problem in" in err


def test_a_study(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(study)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{study}: 2 runs, nothing found in 1"
    assert lines[1].split() == ["good", "-"]
    assert lines[2].split()[:3] == ["low", "problem:", "not-learning;"]
    assert main(["doctor", str(study), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [run["healthy"] for run in found["runs"]] == [True, False]
    assert main(["doctor", str(study), "--strict"]) == 3


def test_a_folder_that_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err

"""The orchestrator with real workers on a small model."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from benchmarks.__main__ import main
from benchmarks.contestants import CONTESTANTS
from benchmarks.process import BenchmarkError, Places, TimeUp, Worker
from benchmarks.protocol import Job
from benchmarks.roofline import Shape
from benchmarks.rounds import gemm_of, make_job
from benchmarks.scaling import repeat_rows
from benchmarks.workload import dense

ROOT = Path(__file__).resolve().parents[2]
PYTHON = Path(sys.executable)
PEERS = ROOT / ".venv-peers/bin/python"
SHAPE = Shape(linears=((2, 3, 4),), head=(2, 10), layers=2, attention_width=5, vocabulary=9)


NAMES = ["lorikeet", "peft-tuned", *(["trl-tuned"] if PEERS.exists() else [])]


class Played(NamedTuple):
    """What one run wrote and printed."""

    found: dict[str, Any]
    table: str


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory, stories: Path, questions: Path) -> Played:
    """One round that warms up and two that count. PEFT is in the main environment too."""
    out = tmp_path_factory.mktemp("run") / "out.json"
    arguments = ["run", "--workloads", "dolly", "--warmup", "1", "--rounds", "2", "--r", "4"]
    arguments += ["--model", str(stories), "--data", str(questions), "--threads", "1"]
    arguments += ["--contestants", ",".join(NAMES), "--out", str(out)]
    arguments += ["--peers-python", str(PEERS if PEERS.exists() else PYTHON)]
    printed = io.StringIO()
    with redirect_stdout(printed):
        assert main(arguments) == 0
    (found,) = json.loads(out.read_text(encoding="utf-8"))["results"]
    return Played(found, printed.getvalue())


def test_everybody_does_the_same_steps_in_turn(played: Played) -> None:
    found = played.found
    everybody = [*NAMES, "gemm"]
    assert found["orders"] == [everybody[k:] + everybody[:k] for k in range(3)]
    for answers in found["answers"].values():
        assert [answer["tokens"] for answer in answers] == found["tokens"]
        assert [answer["supervised"] for answer in answers] == found["supervised"]
        assert all(answer["seconds"] > 0 and answer["peak_bytes"] > 1e7 for answer in answers)
    assert found["facts"]["lorikeet"]["packing"]


def test_everybody_starts_from_the_same_weights_and_trains(played: Played) -> None:
    assert played.found["summary"]["warnings"] == []
    losses = [[answer["loss"] for answer in played.found["answers"][name]] for name in NAMES]
    for curve in losses:
        assert curve[0] == pytest.approx(losses[0][0], rel=5e-3)
        assert curve[2] < curve[0]


def test_the_table_has_a_line_for_everybody(played: Played) -> None:
    assert all(f"| {name} " in played.table for name in NAMES)
    assert "2 rounds" in played.table


def test_trl_runs_as_it_was_told_to(played: Played) -> None:
    if "trl-tuned" not in NAMES:
        pytest.skip("needs the peers' environment; build it with: make peers")
    facts = played.found["facts"]["trl-tuned"]
    assert "torch.bfloat16" in facts["weights"]
    assert (facts["checkpointing"], facts["autocast_bf16"]) == (False, True)


@pytest.fixture
def places(tmp_path: Path) -> Places:
    none = tmp_path / "none"
    return Places(
        python=PYTHON, peers_python=none, unsloth_python=none, folder=tmp_path, timeout=60
    )


@pytest.fixture
def job(tmp_path: Path, places: Places) -> Job:
    workload = dense(SHAPE.vocabulary, steps=2, examples=1, length=4)
    return make_job(tmp_path / "nowhere", workload, places, dtype="fp32", r=4)


def test_a_worker_that_ends_says_why(places: Places, job: Job) -> None:
    broken = replace(CONTESTANTS["lorikeet"], worker="no_such_worker")
    with (
        Worker(broken, job, places) as worker,
        pytest.raises(BenchmarkError, match=r"No module named benchmarks\.workers\.no_such_worker"),
    ):
        worker.wait_ready()


def test_a_worker_that_is_late_is_given_up(places: Places, job: Job) -> None:
    gemm = gemm_of(SHAPE)
    hasty = replace(places, timeout=0.01)
    with (
        Worker(gemm, replace(job, settings=gemm.settings), hasty) as worker,
        pytest.raises(TimeUp, match="gemm did not answer in 0 s"),
    ):
        worker.wait_ready()


def test_without_the_peers_it_says_how_to_build_them(places: Places, job: Job) -> None:
    with pytest.raises(BenchmarkError, match="make peers"):
        Worker(CONTESTANTS["trl-default"], job, places)


def test_an_unknown_contestant(capsys: pytest.CaptureFixture[str], stories: Path) -> None:
    assert main(["run", "--model", str(stories), "--contestants", "lorikeet,axolotl"]) == 2
    assert "unknown contestants axolotl; there are lorikeet," in capsys.readouterr().err


def test_the_peak_is_not_that_of_the_parent() -> None:
    """As `ru_maxrss` would be: this process, with torch in it, is larger than a bare child."""
    ballast = bytearray(300_000_000)
    code = "from benchmarks.protocol import peak_bytes; print(peak_bytes())"
    done = subprocess.run([PYTHON, "-c", code], capture_output=True, check=True, cwd=ROOT)
    assert 0 < int(done.stdout) < len(ballast) / 2


def test_rows_are_repeated(tmp_path: Path) -> None:
    (tmp_path / "few").write_text('{"a": 1}\n{"a": 2}\n\n{"a": "\u2028"}', encoding="utf-8")
    repeat_rows(tmp_path / "few", tmp_path / "many", 7)
    lines = (tmp_path / "many").read_text(encoding="utf-8").split("\n")
    assert lines == [*['{"a": 1}', '{"a": 2}', '{"a": "\u2028"}'] * 2, '{"a": 1}', ""]

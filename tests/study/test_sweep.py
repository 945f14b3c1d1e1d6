"""Whole sweeps: the same every time, whoever does the trials and whatever interrupts them."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from lorikeet.errors import ConfigError, InputError, StorageError
from lorikeet.files import only_here
from lorikeet.study.crew import gather
from lorikeet.study.prose import prose_file
from lorikeet.study.protocol import StudyFolder
from lorikeet.study.record import SEED, Study
from lorikeet.study.sweep import run_sweep
from lorikeet.study.sweep_file import read_sweep

SweepYaml = Callable[..., Path]
VARIED = {"lora.r": [1, 2], "seed": [0, 1]}


def _figures(study: Study) -> list[dict[str, object]]:
    """All that a clock has no part in."""
    return [{**trial.to_json(), "cost": None} for trial in study.trials]


class Swept(NamedTuple):
    """A sweep that one process has done: its file, its folder, what it found."""

    path: Path
    out: Path
    study: Study


@pytest.fixture(scope="module")
def swept(
    tmp_path_factory: pytest.TempPathFactory, sweep_yaml_in: Callable[[Path], SweepYaml]
) -> Swept:
    folder = tmp_path_factory.mktemp("swept")
    path = sweep_yaml_in(folder)(VARIED, model__threads=1, data__max_length=40)
    return Swept(path, folder / "a", run_sweep(read_sweep(path), folder / "a"))


def test_a_sweep_measures_every_combination_and_the_base(tmp_path: Path, swept: Swept) -> None:
    study = swept.study
    assert [trial.name for trial in study.trials] == [
        "base",
        *(f"r={r},seed={seed}" for r in (1, 2) for seed in (0, 1)),
    ]
    assert study.varied == {"lora.r": [1, 2], SEED: [0, 1]}
    assert [group.label for group in study.groups] == ["lora r=1", "lora r=2"]
    assert study.receipt["loads"] == {"base": 1, "data": 1}
    assert len(study.questions) == len(study.trials[0].answers) > 0
    assert any("lora.alpha is 16 at every rank" in note for note in study.notes)
    assert any("lose their end." in note for note in study.notes)  # what is odd about the data

    again = run_sweep(read_sweep(swept.path), swept.out)
    assert again.receipt["loads"] == {"base": 0, "data": 0}  # all was done: nothing is loaded
    assert _figures(again) == _figures(study)
    anew = run_sweep(read_sweep(swept.path), tmp_path / "b")
    assert _figures(anew) == _figures(study)


def test_several_processes_find_what_one_finds(tmp_path: Path, swept: Swept) -> None:
    hire = partial(gather, workers=2)
    together = run_sweep(read_sweep(swept.path), tmp_path / "b", hire=hire)
    assert _figures(together) == _figures(swept.study)
    assert together.receipt["loads"] == {"base": 2, "data": 2}


def test_a_process_that_is_killed_costs_its_trial_alone(
    tmp_path: Path, sweep_yaml: SweepYaml
) -> None:
    path = sweep_yaml({"seed": [0, 1, 2]}, model__threads=1, train__max_steps=60)
    out = tmp_path / "out"
    killer = _kill_whoever_writes(out / "runs" / "seed=1" / "metrics.jsonl")
    study = run_sweep(read_sweep(path), out, hire=partial(gather, workers=2))
    assert killer.wait(timeout=60) == 0
    assert [trial.name for trial in study.failed] == ["seed=1"]
    assert "SIGKILL" in (study.failed[0].error or "")
    whole = run_sweep(read_sweep(path), out)
    assert whole.failed == []


def _kill_whoever_writes(path: Path) -> subprocess.Popen[bytes]:
    """A process that waits for a file and then kills the worker of ours that writes it."""
    script = f"""
import os, signal, sys, time
from pathlib import Path
path, deadline = Path({str(path)!r}), time.monotonic() + 60
while not (path.is_file() and path.stat().st_size > 300):
    if time.monotonic() > deadline: sys.exit(1)
    time.sleep(0.01)
def parent(pid):
    return int(Path(f"/proc/{{pid}}/stat").read_text().rsplit(")", 1)[1].split()[1])
for entry in Path("/proc").iterdir():
    if not entry.name.isdigit(): continue
    try:
        line = (entry / "cmdline").read_bytes()
        if b"multiprocessing" not in line or b"spawn_main" not in line: continue
        if parent(entry.name) != {os.getpid()}: continue
        files = [os.readlink(link) for link in (entry / "fd").iterdir()]
        log = next(Path(name) for name in files if "worker-" in name)
        if "seed=1 " in log.read_text().splitlines()[-1]:
            os.kill(int(entry.name), signal.SIGKILL)
            sys.exit(0)
    except (OSError, StopIteration, IndexError):
        continue
sys.exit(2)
"""
    return subprocess.Popen([sys.executable, "-c", script])


@pytest.mark.slow
def test_a_sweep_that_is_killed_ten_times_finds_what_it_would_have_found(
    tmp_path: Path, sweep_yaml: SweepYaml
) -> None:
    path = sweep_yaml(VARIED, train__max_steps=60, train__save_every=1, train__eval_every=20)
    whole = run_sweep(read_sweep(path), tmp_path / "whole")
    out = tmp_path / "killed"
    script = (
        "from lorikeet.study.sweep import run_sweep\n"
        "from lorikeet.study.sweep_file import read_sweep\n"
        f"run_sweep(read_sweep({str(path)!r}), {str(out)!r})\n"
    )
    generator = random.Random(0)
    kills, reached = 0, 0
    while kills < 10:
        process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
        before = _steps(out)
        deadline = time.monotonic() + 120
        wanted = before + generator.randint(5, 20)
        while _steps(out) < wanted and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        assert process.poll() is None, "the sweep ended before it could be killed ten times"
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
        saved = _saved(out)
        assert saved >= reached - 1  # no finished step is lost but the one that was being saved
        reached = saved
    resumed = run_sweep(read_sweep(path), out)
    assert _figures(resumed) == _figures(whole)


def _steps(out: Path) -> int:
    """Steps that are written down, over all trials."""
    logs = out.glob("runs/*/metrics.jsonl")
    return sum(log.read_bytes().count(b'"loss"') for log in logs)


def _saved(out: Path) -> int:
    """Steps whose state is saved, over all trials."""
    total = 0
    for run in out.glob("runs/*"):
        if StudyFolder(out).done(run.name):
            total += 60
        else:
            steps = [int(p.parent.name[5:]) for p in run.glob("checkpoints/step-*/state.pt")]
            total += max(steps, default=0)
    return total


def test_a_folder_is_one_studys_and_one_processs(tmp_path: Path, sweep_yaml: SweepYaml) -> None:
    out = tmp_path / "out"
    sweep = read_sweep(sweep_yaml({"lora.r": [1]}, train__max_steps=1))
    run_sweep(sweep, out)
    described = yaml.safe_load((out / "study.yaml").read_text(encoding="utf-8"))
    assert described["varied"]["lora.r"] == [{"value": 1}]
    assert described["other"] is None
    with pytest.raises(ConfigError, match="holds another study"):
        run_sweep(sweep, out, other=str(prose_file()))
    with pytest.raises(ConfigError, match="holds another study"):
        run_sweep(read_sweep(sweep_yaml({"lora.r": [2]}, train__max_steps=1)), out)
    held = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from pathlib import Path; from lorikeet.files import only_here\n"
            f"with only_here(Path({str(out)!r})): print('held', flush=True); sys.stdin.read()",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert held.stdout is not None
    assert held.stdout.readline() == b"held\n"
    with pytest.raises(StorageError, match="another process"):
        run_sweep(sweep, out)
    held.kill()
    held.communicate()
    with only_here(out):
        pass
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="not empty"):
        run_sweep(sweep, other)


@pytest.mark.parametrize("workers", [1, 2])
def test_what_no_trial_can_do_without_is_an_error_of_the_sweep(
    tmp_path: Path, sweep_yaml: SweepYaml, workers: int
) -> None:
    path = sweep_yaml({"lora.r": [1, 2]})
    tree = json.loads(path.read_text(encoding="utf-8"))
    tree["model"]["path"] = str(tmp_path / "no-model")
    path.write_text(json.dumps(tree), encoding="utf-8")
    with pytest.raises(InputError, match="no model folder"):
        run_sweep(read_sweep(path), tmp_path / "out", hire=partial(gather, workers=workers))
    other = read_sweep(sweep_yaml({"lora.r": [3]}, train__max_steps=1))
    assert run_sweep(other, tmp_path / "out").failed == []  # the folder was not taken


def test_nobody_is_no_crew(tmp_path: Path, sweep_yaml: SweepYaml) -> None:
    with pytest.raises(ValueError, match="at least one worker"):
        run_sweep(
            read_sweep(sweep_yaml({"lora.r": [1]})), tmp_path / "a", hire=partial(gather, workers=0)
        )


def test_failed_trials_are_told_and_tried_again(tmp_path: Path, sweep_yaml: SweepYaml) -> None:
    path = sweep_yaml({"lora.target_modules": ["q_proj", "nothing_like_it"]}, train__max_steps=1)
    for _ in range(2):
        study = run_sweep(read_sweep(path), tmp_path / "out")
        assert [trial.error is None for trial in study.trials] == [True, True, False]
        assert "nothing_like_it" in str(study.failed[0].error)

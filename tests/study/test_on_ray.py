"""Trials on a Ray cluster that is begun here."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from lorikeet.errors import ConfigError, InputError
from lorikeet.study.on_ray import on_ray
from lorikeet.study.sweep import run_sweep
from lorikeet.study.sweep_file import read_sweep

ray = pytest.importorskip("ray")
# Ray leaves sockets and files to the end of the process.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
SweepYaml = Callable[..., Path]


def test_ray_finds_what_one_process_finds(tmp_path: Path, sweep_yaml: SweepYaml) -> None:
    varied = {"lora.r": [1, 2], "lora.target_modules": ["q_proj", "nothing_like_it"]}
    path = sweep_yaml(varied, model__threads=1, train__max_steps=2)
    alone = run_sweep(read_sweep(path), tmp_path / "a")
    there = run_sweep(read_sweep(path), tmp_path / "b", hire=partial(on_ray, workers=2))
    assert [{**t.to_json(), "cost": None} for t in there.trials] == [
        {**t.to_json(), "cost": None} for t in alone.trials
    ]
    assert len(there.failed) == 2
    assert (tmp_path / "b" / "runs" / "r=1,target_modules=q_proj,seed=0" / "adapter").is_dir()
    assert not ray.is_initialized()

    broken = sweep_yaml({"lora.r": [1]}, model__path=str(tmp_path / "none"))
    with pytest.raises(InputError, match="no model folder"):
        run_sweep(read_sweep(broken), tmp_path / "c", hire=partial(on_ray, workers=1))


def test_a_cluster_that_does_not_answer_is_the_users_to_begin(
    tmp_path: Path, sweep_yaml: SweepYaml, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ConfigError, match="ray start --head"):
        run_sweep(
            read_sweep(sweep_yaml({"lora.r": [1]})),
            tmp_path / "out",
            hire=partial(on_ray, address="auto"),
        )

"""Nothing is sent or fetched unless a hub id was given."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lorikeet import starter

MOST_ATTEMPTS = 3
"""Two to find the hub, and one of transformers' own; every retry of a file would be one more."""

_WATCH = """
import os, socket

def _refuse(self, address, *rest):
    if self.family != socket.AF_UNIX:
        with open(os.environ["WATCH_LOG"], "a") as log:
            log.write(repr(address) + "\\n")
        raise OSError("no network in this test")

socket.socket.connect = socket.socket.connect_ex = _refuse
_resolve = socket.getaddrinfo

def _no_name(host, *rest, **more):
    with open(os.environ["WATCH_LOG"], "a") as log:
        log.write(repr(host) + "\\n")
    raise socket.gaierror("no network in this test")

socket.getaddrinfo = _no_name
"""


@pytest.fixture
def watched(tmp_path: Path) -> dict[str, str]:
    """An environment whose Python writes every attempt to reach a network to WATCH_LOG."""
    (tmp_path / "watch").mkdir()
    (tmp_path / "watch" / "sitecustomize.py").write_text(_WATCH, encoding="utf-8")
    path = os.pathsep.join([str(tmp_path / "watch"), os.environ.get("PYTHONPATH", "")])
    # What would hide an attempt must be off.
    keep = {
        k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    }
    return {**keep, "PYTHONPATH": path, "WATCH_LOG": str(tmp_path / "watch.log")}


def attempts(watched: dict[str, str]) -> list[str]:
    log = Path(watched["WATCH_LOG"])
    return log.read_text(encoding="utf-8").splitlines() if log.exists() else []


def lorikeet(watched: dict[str, str], *args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lorikeet", *map(str, args)],
        env=watched,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_a_local_run_touches_no_network(tmp_path: Path, watched: dict[str, str]) -> None:
    rows = [{"prompt": f"Say {word}.", "completion": "Arr!"} for word in "abcdefgh"]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    run = lorikeet(
        watched,
        "train",
        "--model",
        starter.folder(),
        "--data",
        data,
        "--out",
        tmp_path / "run",
        "--train.max_steps",
        1,
    )
    assert run.returncode == 0, run.stderr
    assert not Path(watched["WATCH_LOG"]).exists()


def test_a_hub_id_without_a_network_says_so(tmp_path: Path, watched: dict[str, str]) -> None:
    watched["HF_HOME"] = str(tmp_path / "cache")
    data = tmp_path / "rows.jsonl"
    data.write_text('{"text": "a b c"}\n', encoding="utf-8")
    run = lorikeet(
        watched, "train", "--model", "some/model", "--data", data, "--out", tmp_path / "run"
    )
    assert run.returncode == 2
    assert "some/model" in run.stderr
    assert "Traceback" not in run.stderr
    assert "couldn't connect to 'https://huggingface.co'" in run.stderr
    # The watch does see attempts.
    assert 1 <= len(attempts(watched)) <= MOST_ATTEMPTS
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("offline", ["1", ""])
def test_a_hub_id_in_the_cache(tmp_path: Path, watched: dict[str, str], offline: str) -> None:
    repository = tmp_path / "cache" / "hub" / "models--some--model"
    commit = "0" * 40
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit, encoding="utf-8")
    for file in starter.folder().iterdir():
        (snapshot / file.name).write_bytes(file.read_bytes())
    watched |= {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": offline}
    run = lorikeet(watched, "generate", "--model", "some/model", "--prompt", "Count: fig, plum.")
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip()
    assert len(attempts(watched)) <= MOST_ATTEMPTS
    assert ("cannot be reached" in run.stderr) == (not offline)

"""Whole runs in processes of their own, which may meet their end at a chosen moment."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from lorikeet.cli.main import main

STEPS = 6
OPTIONS = {
    "model.dtype": "fp32",
    "model.device": "cpu",
    "model.threads": "1",
    "lora.r": "4",
    "lora.dropout": "0.1",
    "data.validation": "0.2",
    "train.batch_size": "4",
    "train.learning_rate": "0.02",
    "train.save_every": "1",
    "train.eval_every": "2",
    "train.patience": "9",
}
# What changes a file or a folder; the system call follows the event.
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "open"}

# A process of its own for every run, forked from one that has torch imported already.
_server = get_context("forkserver")
_server.set_forkserver_preload(["lorikeet.study", "lorikeet.cli.train", "tokenizers"])


Straight = Callable[[str], dict[str, Any]]


@dataclass(frozen=True)
class Task:
    """A model folder and a data file."""

    model: Path
    data: Path

    def arguments(
        self, out: Path, method: str, *, steps: int = STEPS, resume: bool = False
    ) -> list[str]:
        words = ["train", "--model", str(self.model), "--data", str(self.data), "--out", str(out)]
        words += ["--method", method, "--train.max_steps", str(steps)]
        words += [word for name, value in OPTIONS.items() for word in (f"--{name}", value)]
        return [*words, "--resume"] if resume else words


def result(out: Path) -> dict[str, Any]:
    """Everything that a run leaves, but times."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    receipt = json.loads((out / "receipt.json").read_text())
    left = {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.suffix in (".safetensors", ".jsonl")
        if path.name != "metrics.jsonl"
    }
    left["files"] = sorted(str(path.relative_to(out)) for path in out.rglob("*"))
    left["metrics"] = [{k: v for k, v in line.items() if k != "seconds"} for line in lines]
    left["result"] = {
        k: v for k, v in receipt["result"].items() if k not in ("seconds", "peak_memory")
    }
    return left


@dataclass(frozen=True)
class Fate:
    """What happens right before the change number `number` (from 1) below `folder`."""

    number: int
    folder: Path
    end: Callable[[], None]


def kill() -> None:
    """kill -9."""
    os.kill(os.getpid(), signal.SIGKILL)


def fill_disk() -> None:
    """From now on no file takes a byte more."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))


def child(arguments: Sequence[str], log: Path, fate: Fate | None) -> None:
    """Run the command until its end or its fate; stdout and stderr go to `log`."""
    pipe = subprocess.Popen(["tee", "-a", log], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    assert pipe.stdin is not None
    for stream in (1, 2):  # a pipe still takes bytes when the disk does not
        os.dup2(pipe.stdin.fileno(), stream)
    if fate:
        sys.addaudithook(_watch(fate))
    code = main(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    pipe.stdin.close()
    pipe.wait()  # whoever reads the log finds all of it
    sys.exit(code)


def _watch(fate: Fate) -> Callable[[str, tuple[Any, ...]], None]:
    seen = 0
    folder = str(fate.folder)

    def watch(event: str, values: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in CHANGES and isinstance(values[0], str | os.PathLike):
            if event == "open" and not values[2] & (os.O_WRONLY | os.O_RDWR):
                return
            if folder in os.fspath(values[0]):
                seen += 1
                if seen == fate.number:
                    fate.end()

    return watch


def run(arguments: Sequence[str], log: Path, fate: Fate | None = None) -> int:
    """Run the command in a forked process; return its exit code."""
    process = _server.Process(target=child, args=(arguments, log, fate))
    process.start()
    process.join(120)
    assert process.exitcode is not None
    return process.exitcode


class Forked:
    """A run in a process that has torch imported already."""

    def __init__(self, arguments: Sequence[str], log: Path) -> None:
        self._process = _server.Process(target=child, args=(arguments, log, None))
        self._process.start()

    def alive(self) -> bool:
        return self._process.is_alive()

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    def wait(self) -> int | None:
        self._process.join(120)
        return self._process.exitcode


class Command:
    """The command as users run it."""

    def __init__(self, arguments: Sequence[str], log: Path) -> None:
        with log.open("a") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "lorikeet", *arguments], stdout=file, stderr=file
            )

    def alive(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def wait(self) -> int | None:
        return self._process.wait(120)

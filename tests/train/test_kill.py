"""kill -9 at any moment: what is resumed ends in the same bytes as what was never killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

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


@pytest.fixture(scope="module")
def task(tiny: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Task:
    folder = tmp_path_factory.mktemp("task")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:57]
    tokens = ["<s>", "</s>", "<unk>", *alphabet]
    bpe = models.BPE({token: i for i, token in enumerate(tokens)}, [], unk_token="<unk>")
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(folder / "model")
    tiny(tied=True).save_pretrained(folder / "model")
    draw = random.Random(0)
    rows = [
        {"prompt": f"{a} PLUS {b}", "completion": str(a + b)}
        for a, b in ((draw.randrange(50), draw.randrange(50)) for _ in range(25))
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Task(folder / "model", folder / "rows.jsonl")


@pytest.fixture(scope="module")
def straight(task: Task, tmp_path_factory: pytest.TempPathFactory) -> Straight:
    """What a run that nobody kills ends in."""

    @cache
    def found(method: str) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp("straight")
        assert run(task.arguments(folder / "run", method), folder / "log") == 0
        return result(folder / "run")

    return found


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


def child(arguments: Sequence[str], log: Path, folder: str, doomed: int) -> None:
    """Run the command; die right before the change number `doomed` below `folder`."""
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    seen = 0

    def watch(event: str, values: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in CHANGES and isinstance(values[0], str | os.PathLike):
            if event == "open" and not values[2] & (os.O_WRONLY | os.O_RDWR):
                return
            if folder in os.fspath(values[0]):
                seen += 1
                if seen == doomed:
                    os.kill(os.getpid(), signal.SIGKILL)

    if doomed:
        sys.addaudithook(watch)
    sys.exit(main(arguments))


def run(arguments: Sequence[str], log: Path, folder: str = "", doomed: int = 0) -> int:
    process = _server.Process(target=child, args=(arguments, log, folder, doomed))
    process.start()
    process.join(120)
    assert process.exitcode is not None
    return process.exitcode


def finish(task: Task, out: Path, method: str, log: Path) -> None:
    code = run(task.arguments(out, method, resume=True), log)
    assert code == 0, log.read_text()


def die_everywhere(
    task: Task, out: Path, method: str, numbers: Iterator[int], expected: dict[str, Any]
) -> int:
    """A run for each number, killed before that change and resumed; return how many died."""
    for deaths, doomed in enumerate(numbers):
        here = out / f"at {doomed}"
        log = out / f"log {doomed}"
        code = run(task.arguments(here, method), log, str(here), doomed)
        if code == 0:
            return deaths
        assert code == -signal.SIGKILL, log.read_text()
        finish(task, here, method, log)
        assert result(here) == expected, f"killed before change {doomed}"
    raise AssertionError("the run has more changes than numbers were given")


def test_killed_before_some_changes(task: Task, tmp_path: Path, straight: Straight) -> None:
    numbers = iter([*range(1, 90, 16), 10_000])
    assert die_everywhere(task, tmp_path, "lora", numbers, straight("lora")) >= 5


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_killed_before_every_change(
    task: Task, tmp_path: Path, straight: Straight, method: str
) -> None:
    numbers = iter(range(1, 1000))
    assert die_everywhere(task, tmp_path, method, numbers, straight(method)) > 60


@pytest.mark.slow
def test_killed_again_and_again(task: Task, tmp_path: Path, straight: Straight) -> None:
    """The same run dies while it recovers, at every change of the first forty."""
    out, log = tmp_path / "run", tmp_path / "log"
    for doomed in range(1, 41):
        resume = (out / "config.yaml").is_file()
        code = run(task.arguments(out, "lora", resume=resume), log, str(out), doomed)
        if code == 0:
            break
        assert code == -signal.SIGKILL, log.read_text()
    finish(task, out, "lora", log)
    assert result(out) == straight("lora")


class Forked:
    """A run in a process that has torch imported already."""

    def __init__(self, arguments: Sequence[str], log: Path) -> None:
        self._process = _server.Process(target=child, args=(arguments, log, "", 0))
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


@pytest.mark.parametrize(
    ("kind", "kills", "inside_a_save"),
    [
        pytest.param(Forked, 3, 1, id="3 kills"),
        pytest.param(Command, 10, 4, id="10 kills of the command", marks=pytest.mark.slow),
    ],
)
def test_killed_from_outside(
    task: Task, tmp_path: Path, kind: type[Forked | Command], kills: int, inside_a_save: int
) -> None:
    """Every life gets a step or more further; the first ones end inside a save."""
    steps, log = 12 * kills, tmp_path / "log"
    assert run(task.arguments(tmp_path / "straight", "lora", steps=steps), log) == 0
    out = tmp_path / "run"
    draw = random.Random(7)
    for number in range(kills):
        before = newest(out)
        resume = (out / "config.yaml").is_file()
        process = kind(task.arguments(out, "lora", steps=steps, resume=resume), log)
        wait_until(lambda: newest(out) > before or not process.alive())  # noqa: B023
        if number < inside_a_save:
            wait_until(lambda: any(out.glob("checkpoints/.*.part")) or not process.alive())  # noqa: B023
        else:
            time.sleep(draw.uniform(0, 0.1))
        assert process.alive(), "the run was over before it could be killed\n" + log.read_text()
        process.kill()
    assert kind(task.arguments(out, "lora", steps=steps, resume=True), log).wait() == 0
    assert result(out) == result(tmp_path / "straight")


def newest(out: Path) -> str:
    return max((path.parent.name for path in out.glob("checkpoints/step-*/state.pt")), default="")


def wait_until(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.0005)

"""kill -9 at any moment: what is resumed ends in the same bytes as what was never killed."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from whole_runs import Command, Fate, Forked, Straight, Task, kill, result, run


def finish(task: Task, out: Path, method: str, log: Path) -> None:
    code = run(task.arguments(out, method, resume=True), log)
    assert code == 0, log.read_text()


def dies_and_recovers(
    task: Task, folder: Path, method: str, number: int, expected: dict[str, Any]
) -> bool:
    """Kill a run right before that change, resume it; False if it has fewer changes."""
    out, log = folder / f"at {number}", folder / f"log {number}"
    code = run(task.arguments(out, method), log, Fate(number, out, kill))
    if code == 0:
        return False
    assert code == -signal.SIGKILL, log.read_text()
    finish(task, out, method, log)
    assert result(out) == expected, f"killed before change {number}"
    return True


# As the code stands: before the configuration is in place, inside the removal of a checkpoint,
# between the two renames of a replacement, before a removal, inside the adapter's folder.
@pytest.mark.parametrize("number", [3, 30, 37, 64, 71])
def test_killed_before_a_change(
    task: Task, tmp_path: Path, straight: Straight, number: int
) -> None:
    assert dies_and_recovers(task, tmp_path, "lora", number, straight("lora"))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_killed_before_every_change(
    task: Task, tmp_path: Path, straight: Straight, method: str
) -> None:
    expected = straight(method)
    deaths = 0
    while dies_and_recovers(task, tmp_path, method, deaths + 1, expected):
        deaths += 1
    assert deaths > 70


@pytest.mark.slow
def test_killed_again_and_again(task: Task, tmp_path: Path, straight: Straight) -> None:
    """The same run dies while it recovers, at every change of the first forty."""
    out, log = tmp_path / "run", tmp_path / "log"
    for doomed in range(1, 41):
        resume = (out / "config.yaml").is_file()
        code = run(task.arguments(out, "lora", resume=resume), log, Fate(doomed, out, kill))
        if code == 0:
            break
        assert code == -signal.SIGKILL, log.read_text()
    finish(task, out, "lora", log)
    assert result(out) == straight("lora")


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

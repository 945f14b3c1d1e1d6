"""A full disk: said in plain words, nothing half-written, and the run goes on afterwards."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from whole_runs import Fate, Straight, Task, fill_disk, result, run


def hidden(out: Path) -> list[Path]:
    """Drafts that should have been cleared away."""
    return list(out.rglob(".*"))


def fails_and_recovers(
    task: Task, folder: Path, method: str, number: int, straight: Straight
) -> bool:
    """Fill the disk right before that change; False if nothing is written after it."""
    out, log = folder / f"at {number}", folder / f"log {number}"
    code = run(task.arguments(out, method), log, Fate(number, out, fill_disk))
    if code == 0:
        return False
    said = log.read_text()
    assert code == 2, said
    assert "error: cannot write" in said
    assert "File too large; free some space and run the same command again" in said
    assert "Traceback" not in said
    assert hidden(out) == []
    started = (out / "config.yaml").is_file()
    assert run(task.arguments(out, method, resume=started), log) == 0, log.read_text()
    assert result(out) == straight(method), f"full from change {number}"
    return True


# As the code stands: nothing is there yet, a checkpoint, the metrics, the adapter.
@pytest.mark.parametrize("number", [1, 27, 45, 69])
def test_the_disk_fills_up(task: Task, tmp_path: Path, straight: Straight, number: int) -> None:
    assert fails_and_recovers(task, tmp_path, "lora", number, straight)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_disk_fills_up_at_every_moment(
    task: Task, tmp_path: Path, straight: Straight, method: str
) -> None:
    failures = 0
    while fails_and_recovers(task, tmp_path, method, failures + 1, straight):
        failures += 1
    assert failures > 70


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 800 KiB: room for a few checkpoints."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=800k", "tmpfs", str(disk)]
    try:
        done = subprocess.run(mount, capture_output=True)
    except FileNotFoundError:
        pytest.skip("needs the command mount")
    if done.returncode:
        pytest.skip("needs the right to mount a file system")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_is_really_full(
    task: Task, tmp_path: Path, small_disk: Path, straight: Straight
) -> None:
    out, log = small_disk / "run", tmp_path / "log"
    words = [*task.arguments(out, "lora"), "--train.keep_last", "99"]
    (small_disk / "ballast").write_bytes(bytes(600 * 1024))
    assert run(words, log) == 2
    assert "No space left on device; free some space" in log.read_text()
    assert hidden(out) == []
    kept = sorted(path.name for path in (out / "checkpoints").glob("step-*"))
    assert "step-00000001" in kept
    assert "step-00000006" not in kept
    (small_disk / "ballast").unlink()
    words = [*task.arguments(out, "lora", resume=True), "--train.keep_last", "2"]
    assert run(words, log) == 0, log.read_text()
    assert f"resumed after step {len(kept)} of 6" in log.read_text()
    assert result(out) == straight("lora")

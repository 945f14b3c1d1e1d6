"""Whatever is in a file, the readers of GGUF and safetensors give a sound file or our error."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import fuzzing
import pytest


@pytest.mark.parametrize("reader", ["gguf", "safetensors"])
def test_sound_files_are_read(reader: str, tmp_path: Path) -> None:
    tally = fuzzing.Tally()
    for data in fuzzing.sound(reader):
        tally.judge(reader, tmp_path / "x", data)
    assert (tally.read, tally.refused) == (len(fuzzing.sound(reader)), 0)


@pytest.mark.parametrize("reader", ["gguf", "safetensors"])
def test_damaged_files_are_answered(reader: str, tmp_path: Path) -> None:
    tally = fuzzing.attack(reader, examples=300, seed=0, folder=tmp_path)
    assert tally.read > 20
    assert tally.refused > 100


@pytest.mark.slow
@pytest.mark.parametrize("reader", ["gguf", "safetensors"])
def test_damaged_files_are_answered_for_minutes(reader: str) -> None:
    """Five minutes each, in a process that may grow by half a gigabyte at the most."""
    seconds = os.environ.get("LORIKEET_FUZZ_SECONDS", "300")
    done = subprocess.run(
        [sys.executable, fuzzing.__file__, reader, seconds, "1"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-5000:]
    tally = json.loads(done.stdout)
    print(tally)
    assert tally["read"] > 100
    assert tally["refused"] > 1000

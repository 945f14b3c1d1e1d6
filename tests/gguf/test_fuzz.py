"""Whatever is in a file, the readers of GGUF and safetensors give a sound file or our error."""

from __future__ import annotations

import json
import os
import struct
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


def _text(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data


def _json(unit: bytes) -> bytes:
    return _text(b'{"a":[' + unit * (1_000_000 // (len(unit) + 1)) + b"0]}")


def _strings(unit: bytes) -> bytes:
    count = 1_000_000 // (len(unit) + 8)
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + _text(b"k")
    return head + struct.pack("<IIQ", 9, 8, count) + _text(unit) * count


def _tensors() -> bytes:
    described = [
        _text(b"%x" % i) + struct.pack("<IQIQ", 1, 0, 0, 0) for i in range(1_000_000 // 37)
    ]
    head = b"GGUF" + struct.pack("<IQQ", 3, len(described), 0)
    return head + b"".join(described) + bytes(32)


@pytest.mark.parametrize(
    ("reader", "data"),
    [
        ("safetensors", _json(b"{},")),
        ("safetensors", _json(b"[],")),
        ("safetensors", _json(b'"ab",')),
        ("gguf", _strings(b"")),
        ("gguf", _strings("語".encode())),
        ("gguf", _strings(b"\xff")),
        ("gguf", _tensors()),
    ],
    ids=["objects", "lists", "words", "nothing", "letters", "no UTF-8", "tensors"],
)
def test_what_grows_most_when_it_is_read(reader: str, data: bytes, tmp_path: Path) -> None:
    tally = fuzzing.Tally()
    tally.judge(reader, tmp_path / "x", data)
    assert tally.peak > len(data) // 2

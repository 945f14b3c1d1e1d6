"""The conversation between orchestrator and workers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks.protocol import Job

ROOT = Path(__file__).resolve().parents[2]

METERED = """
import sys
from benchmarks.protocol import Channel, Meter
said = lambda word, answer=None: lambda: (print(word, file=sys.stderr), answer)[1]
channel = Channel(Meter(said("settle"), said("restart"), said("peak", 7)))
channel.hello(threads=1, device="cuda", packages=[])
channel.wait()
print("works", file=sys.stderr)
channel.stop()
print("reads", file=sys.stderr)
channel.answer(loss=1.0, tokens=2, supervised=1)
"""


def test_the_clock_waits_for_the_device_and_the_peak_starts_after_loading() -> None:
    done = subprocess.run(
        [sys.executable, "-c", METERED],
        input="go\n",
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    expected = "settle peak restart settle works settle reads peak"
    assert done.stderr.split() == expected.split()
    assert '"peak_bytes": 7' in done.stdout.splitlines()[-1]


def test_a_job_remembers_its_device(tmp_path: Path) -> None:
    job = Job("model", "rows", steps=1, step_examples=1, micro_examples=1, device="cuda")
    job.write(tmp_path / "job.json")
    assert Job.read(tmp_path / "job.json") == job

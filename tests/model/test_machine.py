"""What is asked of the machine: memory that is kept, and the process's own figures."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch

from lorikeet.model.machine import memory_held, memory_limit, peak_memory

_FAULTS = """
import resource, sys
import torch
from lorikeet.model import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
for _ in range(3):
    torch.ones(8, 1 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    rows = [torch.ones(1 << 20) for _ in range(24)]  # 96 MB, beyond what is kept by default
    del rows
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(
    platform.system() != "Linux" or platform.libc_ver()[0] != "glibc", reason="it is glibc's memory"
)
def test_freed_memory_is_touched_once() -> None:
    def faults(how: str) -> int:
        command = [sys.executable, "-c", _FAULTS, how]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert faults("keep") < faults("leave") / 5


def test_main_memory_has_no_limit_of_its_own() -> None:
    assert memory_limit(torch.device("cpu")) is None


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_the_peak_is_the_process_own() -> None:
    """A child of a large process does not inherit its peak."""
    large = bytearray(800 << 20)
    own = peak_memory(torch.device("cpu"))
    assert own >= memory_held(torch.device("cpu")) - (1 << 20) and own > len(large)
    code = (
        "import torch; from lorikeet.model.machine import peak_memory;"
        "print(peak_memory(torch.device('cpu')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < len(large)

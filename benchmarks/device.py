"""The device that everybody runs on: whether it is there, and what it is."""

from __future__ import annotations

import os
import subprocess
from typing import Any

import torch

from benchmarks.process import BenchmarkError
from lorikeet.model import describe

DEVICES = ["cpu", "cuda"]


def check_device(device: str) -> None:
    """Refuse a GPU that is not there, before anything is made or loaded.

    Raises:
        BenchmarkError: cuda was asked for, and torch sees none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise BenchmarkError(
            f"--device cuda needs a GPU, and {_why_none()}; use --device cpu, or run it where there"
            " is one"
        )


def _why_none() -> str:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return "CUDA_VISIBLE_DEVICES hides all there are"
    return f"torch {torch.__version__} sees none here"


def describe_machine(device: str) -> dict[str, Any]:
    """The machine for a report; on a GPU also that, its driver, and what torch is built on."""
    found = {**describe(), "device": device, "torch": torch.__version__}
    if device == "cpu":
        return found
    gpu = torch.cuda.get_device_properties(0)
    return {
        **found,
        "gpu": gpu.name,
        "gpu_memory_bytes": gpu.total_memory,
        "gpu_capability": f"{gpu.major}.{gpu.minor}",
        "driver": driver_version(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def driver_version() -> str | None:
    """NVIDIA's driver as its own tool names it; None where the tool is not there."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, check=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.split()), None)


def gpu_line(machine: dict[str, Any]) -> str:
    """What stands above the tables of a GPU."""
    return (
        f"{machine['gpu']}, {machine['gpu_memory_bytes'] / 2**30:.0f} GiB,"
        f" driver {machine['driver'] or 'unknown'}, CUDA {machine['cuda']},"
        f" torch {machine['torch']}"
    )

"""What this machine has, and the device, dtype and threads that follow from it."""

from __future__ import annotations

import ctypes
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorikeet.errors import ConfigError

_USABLE = 0.95  # of a GPU's free memory: the rest is lost to fragments
_CROWD = 32  # threads per core at most: beyond, they wait for each other for minutes

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


@dataclass(frozen=True)
class Machine:
    """Where a model runs.

    Attributes:
        device: the torch device.
        dtype: compute type of the frozen weights and the activations.
        reason: why this dtype, as a sentence part for the user.
    """

    device: torch.device
    dtype: torch.dtype
    reason: str

    @property
    def dtype_name(self) -> str:
        """The option's word for the dtype."""
        return next(name for name, dtype in DTYPES.items() if dtype == self.dtype)


def choose(*, device: str = "auto", dtype: str = "auto", threads: int | None = None) -> Machine:
    """Resolve `auto` by what the machine has, and set the number of CPU threads if asked to.

    Raises:
        ConfigError: the device is not there, the dtype cannot be used on it, or the threads are far
            more than the cores.
    """
    if threads is not None:
        cores = os.cpu_count() or 1
        if threads > _CROWD * cores:
            raise ConfigError(
                f"model.threads is {threads}, and this machine has {cores} cores; more threads than"
                f" cores only slow it down, and more than {_CROWD} a core are refused: give"
                f" --model.threads {cores}, or leave it out"
            )
        torch.set_num_threads(threads)
    where = _device(device)
    if dtype == "auto":
        return Machine(where, *_native_dtype(where))
    if dtype not in DTYPES:
        raise ConfigError(f"unknown dtype {dtype!r}; expected auto, {', '.join(DTYPES)}")
    if dtype == "fp16" and where.type == "cpu":
        raise ConfigError(
            "fp16 was asked for on a CPU, where it is hundreds of times slower;"
            " use --model.dtype bf16 or fp32"
        )
    return Machine(where, DTYPES[dtype], "as asked")


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    known = re.fullmatch(r"cpu|cuda(?::(?P<number>\d+))?", name)
    if known is None:  # also what torch has a name for: mps, xpu, meta, ...
        raise ConfigError(f"unknown device {name!r}; expected auto, cpu, cuda or cuda:N")
    if name != "cpu" and int(known["number"] or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device {name} was asked for, but torch {torch.__version__} sees"
            f" {torch.cuda.device_count()} GPUs here; use --model.device cpu"
        )
    return torch.device(name)


def _native_dtype(device: torch.device) -> tuple[torch.dtype, str]:
    if device.type == "cuda":
        # Emulated bf16 (before Ampere) is slower than fp32.
        if torch.cuda.get_device_capability(device)[0] >= 8:
            return torch.bfloat16, "this GPU multiplies bf16 natively"
        return torch.float32, "this GPU has no native bf16"
    if cpu_has_bf16():
        return torch.bfloat16, "this processor multiplies bf16 natively"
    return torch.float32, "this processor has no native bf16"


def cpu_has_bf16() -> bool:
    """Whether the CPU has bf16 dot products (AVX512-BF16 or AMX); without, bf16 is emulated."""
    capabilities = torch.cpu.get_capabilities()
    return any(bool(capabilities.get(name)) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def describe() -> dict[str, Any]:
    """The machine for a receipt: processor, cores, threads, GPU, versions."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "system": platform.system(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "python": platform.python_version(),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:  # noqa: PTH123 (not a file of ours)
            names = [
                line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
            ]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def memory_held(device: torch.device) -> int:
    """What this process holds of a device's memory now, in bytes.

    On a CPU its peak where only that is known.
    """
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    except OSError:  # not Linux
        return peak_memory(device)
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def memory_limit(device: torch.device) -> int | None:
    """What this process can hold of a GPU's memory, in bytes; None for main memory.

    A CPU's processes share theirs and swap; a GPU's allocator fails.
    """
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return memory_held(device) + int(_USABLE * (free + cached))


def keep_freed_memory() -> None:
    """Have the C library keep what a step frees for the next one, where it is glibc.

    By default it gives large blocks back to the system and gets them again as fresh pages, each
    zeroed at its first touch: tens of thousands of page faults a step. What the process holds at
    its peak stays the same, it only holds it until its end. Nothing happens elsewhere.
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # the names of malloc.h
    for parameter, value in ((mmap_max, 0), (trim_threshold, 2**31 - 1), (top_pad, 1 << 26)):
        libc.mallopt(parameter, value)


def forget_peak_memory(device: torch.device) -> bool:
    """Let `peak_memory` count from now on, freed memory given back; False where that cannot be."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return True
    if platform.system() != "Linux":
        return False
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # 5: reset VmHWM
    except OSError:
        return False
    return True


def can_multiply_int8() -> bool:
    """Whether the CPU has int8 dot products (VNNI); without, int8 is no faster."""
    capabilities = torch.cpu.get_capabilities()
    return any(bool(capabilities.get(name)) for name in ("avx512_vnni", "amx_int8"))


def peak_memory(device: torch.device) -> int:
    """The most memory this process has held so far, in bytes: GPU memory on a GPU, else RSS."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:  # Linux: a child's ru_maxrss begins at that of its parent, VmHWM does not
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, IndexError):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024

"""On a GPU, chains of element-wise operations as one pass over memory, written by TorchInductor.

On a CPU nothing is compiled here: `native` does there what pays.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

DEVICES = {"cuda"}
"""Types of the devices that are compiled for."""


def fused(function: Callable[P, R]) -> Callable[P, R]:
    """The same function of tensors, compiled where its first argument lies on a GPU.

    It must not read the value of a tensor. Where the compiler is missing it runs as it stands.
    """
    compiled: list[Callable[P, R]] = []  # made at the first use: the import alone takes seconds

    @wraps(function)
    def run(*args: P.args, **options: P.kwargs) -> R:
        first = args[0]
        if not isinstance(first, Tensor) or first.device.type not in DEVICES:
            return function(*args, **options)
        if missing(first.device.type) is not None:
            return function(*args, **options)
        if not compiled:
            compiled.append(torch.compile(function))
        return compiled[0](*args, **options)

    return run


@cache
def missing(device: str) -> str | None:
    """Why nothing can be compiled for a type of device, found by trying; None if it can."""
    try:
        torch.compile(lambda x: x.exp() + 1)(torch.zeros(64, device=device))
    except Exception as error:  # whatever a missing Triton, C compiler or driver comes out as
        lines = str(error).strip().splitlines()
        return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return None

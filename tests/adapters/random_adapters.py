"""Adapters of random numbers, and sums of them as dense matrices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lorikeet.adapters import Adapter, Update

Dense = dict[str, Tensor]

SHAPES = {"a": (7, 5), "b": (4, 9), "c": (6, 6), "d": (1, 8)}
KINDS: dict[str, Any] = {"a": "linear", "b": "conv1d", "c": "embedding", "d": "linear"}


def make(seed: int, modules: str = "abc", r: int = 3, factor: float = 1.5) -> Adapter:
    """An adapter of random numbers."""
    generator = torch.Generator().manual_seed(seed)
    updates = {}
    for module in modules:
        out, fan_in = SHAPES[module]
        A = torch.randn(r, fan_in, generator=generator)
        B = torch.randn(out, r, generator=generator)
        updates[module] = Update(A, B, factor, KINDS[module])
    return Adapter(updates, base_model=f"base {seed}")


def dense(adapter: Adapter) -> Dense:
    """The updates as float64 matrices."""
    return {m: u.scale * (u.B.double() @ u.A.double()) for m, u in adapter.updates.items()}


def plus(parts: list[tuple[float, Dense]]) -> Dense:
    """The weighted sum, matrix by matrix."""
    total: Dense = {}
    for weight, matrices in parts:
        for module, matrix in matrices.items():
            total[module] = total.get(module, torch.zeros_like(matrix)) + weight * matrix
    return total


def assert_same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], size: float) -> None:
    """Equal up to float32 rounding of terms whose norms add up to `size`."""
    assert set(found) == set(wanted)
    for module, matrix in wanted.items():
        assert float((found[module].double() - matrix).norm()) <= 1e-6 * size, module


def norm(*matrices: Dense) -> float:
    return sum(float(m.norm()) for each in matrices for m in each.values())

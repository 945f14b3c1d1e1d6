"""Ranks that are not used, or used up."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Found = Callable[[Path], dict[str, Any]]


def test_a_rank_that_the_task_does_not_need(
    train: Callable[..., Path], found: Found, tmp_path: Path
) -> None:
    """An adapter of rank 64 whose updates are of rank 2, as a very easy task leaves it."""
    run = tmp_path / "run"
    shutil.copytree(train(lora__r=64, lora__alpha=64, train__max_steps=30), run)
    assert "rank-unused" not in found(run)
    file = run / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if "lora_B" in name]:
        U, S, V = torch.linalg.svd(tensors[name], full_matrices=False)
        S[2:] *= 1e-4
        tensors[name] = (U * S) @ V
    save_file(tensors, file)
    finding = found(run)["rank-unused"]
    assert finding.severity == "hint"
    assert finding.evidence["effective_rank"] < 4
    assert finding.evidence["r"] == 64


def test_a_rank_that_is_too_small_for_dolly(
    stories: dict[str, Any], train: Callable[..., Path], found: Found
) -> None:
    options = {**stories, "train__learning_rate": 1e-2, "train__epochs": 1}
    small = found(train(**options, lora__r=2, lora__alpha=4))
    assert set(small) == {"rank-exhausted"}
    assert small["rank-exhausted"].evidence["share"] > 0.9

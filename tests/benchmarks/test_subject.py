"""The model that all contestants load."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.subject import make_subject, random_model
from lorikeet.model import init_model


def test_eight_billion_weights_are_made_on_the_device(shared: Callable[[str], Path]) -> None:
    """On the meta device: had one been made elsewhere or in float32, it would be seen."""
    model = random_model(shared("shapes/llama-3.1-8b"), dtype="bf16", device="meta")
    weights = list(model.parameters())
    assert sum(weight.numel() for weight in weights) > 8e9
    assert {weight.dtype for weight in weights} == {torch.bfloat16}
    assert {tensor.device.type for tensor in [*weights, *model.buffers()]} == {"meta"}


def test_random_weights_are_seeded(stories: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in stories.iterdir():
        if file.suffix == ".json":
            (bare / file.name).write_bytes(file.read_bytes())
    subject = make_subject(bare, tmp_path / "scratch", dtype="bf16", device="cpu")
    assert subject.random
    first, second = (random_model(bare, dtype="bf16", device="cpu") for _ in range(2))
    expected = init_model(bare, seed=0, dtype="bf16", device="cpu").model.state_dict()
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, second.state_dict()[name])
        assert torch.equal(weight, expected[name])

"""From examples and options to what `fit` takes."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from lorikeet.config import TrainConfig
from lorikeet.data import Example
from lorikeet.errors import ConfigError
from lorikeet.model import FastNll, can_multiply_int8, measure, token_nll
from lorikeet.train import set_up


@pytest.fixture
def model(tiny: Callable[..., Any], adapted: Callable[..., nn.Module]) -> nn.Module:
    return adapted(tiny())


def test_only_adapters_are_trained(model: nn.Module, ragged: Callable[..., list[Example]]) -> None:
    optimizer = set_up(model, ragged(4), TrainConfig()).optimizer
    assert all("lora_" in name for name in optimizer.parameters)
    assert len(optimizer.parameters) == 2 * 2 * 7


def test_tied_weights_are_trained_once(tiny: Callable[..., Any]) -> None:
    untied, tied = (
        len(set_up(tiny(tied=tied), [_example()], TrainConfig()).optimizer.parameters)
        for tied in (False, True)
    )
    assert untied == tied + 1


def _example() -> Example:
    return Example((1, 2), (False, True), 1, "row")


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"epochs": 1}, 4),
        ({"epochs": 2.5}, 10),
        ({"epochs": 0.1}, 1),
        ({"epochs": 3, "max_steps": 7}, 7),
        ({"batch_size": 10}, 1),
    ],
)
def test_how_many_steps(
    model: nn.Module, ragged: Callable[..., list[Example]], options: dict[str, Any], steps: int
) -> None:
    setup = set_up(model, ragged(10), TrainConfig(**{"batch_size": 3, **options}))
    assert setup.total_steps == setup.schedule.total_steps == steps


def test_an_epoch_shows_every_example_once(
    model: nn.Module, ragged: Callable[..., list[Example]]
) -> None:
    examples = ragged(10)
    for max_tokens, packing in ((8, True), (30, True), (4096, True), (4096, False)):
        config = TrainConfig(batch_size=3, max_tokens=max_tokens)
        steps = set_up(model, examples, config, packing=packing).steps
        batches = [batch for step in range(4) for batch in steps(step)]
        seen = [tuple(ids) for b in batches for ids in _documents(b)]
        assert sorted(seen) == sorted(example.ids for example in examples)
        assert packing or all(len(batch.lengths) == 1 for batch in batches)
        assert all(b.tokens <= max_tokens or len(b.lengths) == 1 for b in batches)


def _documents(batch: Any) -> list[list[int]]:
    return [ids.tolist() for ids in batch.ids.split(batch.lengths)]


def test_the_layout_is_no_part_of_the_experiment(
    model: nn.Module, ragged: Callable[..., list[Example]]
) -> None:
    examples = ragged(10)
    wide, narrow = (
        set_up(model, examples, TrainConfig(batch_size=4, max_tokens=size)).steps
        for size in (4096, 8)
    )
    for step in range(6):
        shown = [
            sorted(tuple(ids) for batch in steps(step) for ids in _documents(batch))
            for steps in (wide, narrow)
        ]
        assert shown[0] == shown[1]


def test_the_seed_is_everything(model: nn.Module, ragged: Callable[..., list[Example]]) -> None:
    drawn = []
    for seed in (4, 4, 5):
        torch.manual_seed(random.randrange(1000))
        steps = set_up(model, ragged(10), TrainConfig(batch_size=4, seed=seed)).steps
        drawn.append((steps.order.indices(0), torch.rand(2).tolist(), random.random()))
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(("method", "peak"), [("lora", 2e-4), ("full", 2e-5)])
def test_default_learning_rates(
    model: nn.Module, ragged: Callable[..., list[Example]], method: Any, peak: float
) -> None:
    assert set_up(model, ragged(4), TrainConfig(method=method)).schedule.peak == peak


def test_fp16_scales_its_losses(tiny: Callable[..., Any]) -> None:
    optimizer = set_up(tiny(dtype=torch.float16), [_example()], TrainConfig()).optimizer
    assert optimizer.state_dict()["scaler"]["scale"] == 65536
    optimizer = set_up(tiny(dtype=torch.bfloat16), [_example()], TrainConfig()).optimizer
    assert optimizer.state_dict()["scaler"] == {}


def test_every_block_computed_twice_keeps_its_input_alone(
    model: nn.Module,
) -> None:
    found = measure(model, FastNll())
    assert found.blocks == 2
    assert 0 < found.block < found.token
    rest = found.token - found.blocks * found.block
    assert rest < found.token / 2
    assert measure(model, token_nll).blocks == 0


def test_a_limit_changes_the_layout_and_not_the_gradients(
    model: nn.Module,
    ragged: Callable[..., list[Example]],
) -> None:
    examples = ragged(6)
    found = []
    for config in (TrainConfig(batch_size=6), TrainConfig(batch_size=6, max_memory="64GB")):
        setup = set_up(model, examples, config, nll=FastNll())
        tight = replace(FastNll(), recompute=2) if setup.fit else setup.loss
        model.zero_grad()
        for batch in setup.steps(0):
            tight(model, batch).sum().backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for ours, expected in zip(found[1], found[0], strict=True):
        assert torch.equal(ours, expected)


def test_int8_needs_the_fast_path(model: nn.Module, ragged: Callable[..., list[Example]]) -> None:
    with pytest.raises(ConfigError, match="needs the fast path"):
        set_up(model, ragged(4), TrainConfig(int8=True))


def test_int8_is_for_cpus(tiny: Callable[..., Any], ragged: Callable[..., list[Example]]) -> None:
    with pytest.raises(ConfigError, match="is for CPUs, and the model is on meta"):
        set_up(tiny().to("meta"), ragged(4), TrainConfig(int8=True), nll=FastNll())


@pytest.mark.skipif(not can_multiply_int8(), reason="this CPU has no VNNI")
def test_dora_in_int8(
    tiny: Callable[..., Any],
    adapted: Callable[..., nn.Module],
    ragged: Callable[..., list[Example]],
) -> None:
    model = adapted(tiny(), dora=True)
    setup = set_up(model, ragged(4), TrainConfig(int8=True), nll=FastNll())
    model.train()
    (batch,) = setup.steps(0)
    with torch.no_grad():
        rounded, exact = setup.loss(model, batch), FastNll()(model, batch)
    assert not torch.equal(rounded, exact)
    assert float(rounded.mean()) == pytest.approx(float(exact.mean()), rel=1e-2)


def test_int8_rounds_what_is_frozen(model: nn.Module, ragged: Callable[..., list[Example]]) -> None:
    loss = set_up(model, ragged(4), TrainConfig(int8=True), nll=FastNll()).loss
    assert isinstance(loss, FastNll)
    assert len(loss.rounded) == 2 * 7 + 1  # the head too
    assert all(not weight.requires_grad for weight in loss.rounded)

"""AdamW on float32 masters: against torch's own, in bf16, under fp16's loss scaling."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from torch import Tensor, nn
from torch.testing import assert_close

from lorikeet.data import pack
from lorikeet.errors import TrainingError
from lorikeet.model import token_nll
from lorikeet.train import Optimizer


def parameters(dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"matrix": (5, 3), "vector": (7,)}
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        for name, shape in shapes.items()
    }


def bowl(held: dict[str, nn.Parameter], step: int) -> Tensor:
    """A loss whose gradients differ in every step and every entry."""
    return sum(((p.float() * (1 + step % 3)).cos() * 4).sum() for p in held.values())


def test_it_is_adamw() -> None:
    ours, theirs = parameters(), parameters()
    optimizer = Optimizer(ours, weight_decay=0.1, max_grad_norm=1.0)
    groups = [
        {"params": [theirs["matrix"]], "weight_decay": 0.1},
        {"params": [theirs["vector"]], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=0.0)
    for step in range(25):
        rate = 1e-2 / (1 + step)
        optimizer.backward(bowl(ours, step))
        norm = optimizer.step(rate)
        bowl(theirs, step).backward()
        expected = torch.nn.utils.clip_grad_norm_(theirs.values(), 1.0)
        for group in reference.param_groups:
            group["lr"] = rate
        reference.step()
        reference.zero_grad()
        assert norm == pytest.approx(float(expected))
        assert norm > 1.0  # clipped
    for name in ours:
        assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-6)


def test_vectors_do_not_decay() -> None:
    held = parameters()
    start = {name: p.detach().clone() for name, p in held.items()}
    optimizer = Optimizer(held, weight_decay=0.5)
    optimizer.backward(sum((p * 0).sum() for p in held.values()))
    optimizer.step(0.1)
    assert_close(held["matrix"], start["matrix"] * (1 - 0.1 * 0.5))
    assert torch.equal(held["vector"], start["vector"])


def test_loraplus_is_pefts() -> None:
    """B learns so many times as fast as A: beside PEFT's optimizer on the same layer."""

    def layer() -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)).requires_grad_(False)

    config = peft.LoraConfig(target_modules=["0", "1"], r=2, init_lora_weights=False)
    theirs = peft.get_peft_model(layer(), config)
    reference = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=16.0, loraplus_weight_decay=0.1
    )
    factors = {n: p for n, p in theirs.named_parameters() if "lora_" in n}
    ours = {
        name.replace(".default.weight", ""): nn.Parameter(p.detach().clone())
        for name, p in factors.items()
    }
    optimizer = Optimizer(ours, weight_decay=0.1, max_grad_norm=0.0, loraplus_lr_ratio=16.0)
    for step in range(5):
        optimizer.backward(bowl(ours, step))
        optimizer.step(1e-2)
        bowl(factors, step).backward()
        reference.step()
        reference.zero_grad()
    assert any(name.endswith("lora_B") for name in ours)
    for mine, other in zip(ours.values(), factors.values(), strict=True):
        assert_close(mine, other)


@pytest.mark.parametrize(("limit", "expected"), [(0.0, 5.0), (2.5, 2.5), (100.0, 5.0)])
def test_clipping(limit: float, expected: float) -> None:
    """The first moment after one step is a tenth of the clipped gradient."""
    weight = nn.Parameter(torch.zeros(1, 2))
    optimizer = Optimizer({"w": weight}, max_grad_norm=limit)
    optimizer.backward((weight * torch.tensor([3.0, 4.0])).sum())
    assert optimizer.step(0.1) == pytest.approx(5.0)
    moment = optimizer.state_dict()["adamw"]["state"][0]["exp_avg"]
    assert float(moment.norm()) == pytest.approx(expected / 10, rel=1e-4)


def test_bf16_weights_have_float32_masters() -> None:
    """A hundred updates of 1e-5, each a hundred times below what bf16 resolves at 1."""
    weight = nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    assert torch.equal(weight - 1e-5, weight)
    optimizer = Optimizer({"w": weight})
    first_moved = None
    for step in range(600):
        optimizer.backward(weight.float().sum())
        optimizer.step(1e-5)
        if step == 99:
            assert optimizer.masters["w"].mean().item() == pytest.approx(0.999, abs=1e-5)
        if first_moved is None and (weight != 1).all():
            first_moved = step
    assert optimizer.masters["w"].dtype == torch.float32
    assert first_moved is not None
    assert first_moved > 100
    assert torch.equal(weight, optimizer.masters["w"].bfloat16())


def test_bf16_gradients_add_up_in_float32() -> None:
    """256 + 1 is 256 in bf16: four micro-batches must still count."""
    weight = nn.Parameter(torch.ones(1, 1, dtype=torch.bfloat16))
    optimizer = Optimizer({"w": weight}, max_grad_norm=0.0)
    for gradient in (256.0, 1.0, 1.0, 1.0):
        optimizer.backward((weight * gradient).sum())
        assert weight.grad is None
    assert optimizer.step(1e-3) == 259.0


def test_full_fine_tuning_in_bf16_learns_below_bf16s_resolution(
    tiny: Callable[..., Any], ragged: Callable[..., Any]
) -> None:
    model = tiny(dtype=torch.bfloat16)
    optimizer = Optimizer(dict(model.named_parameters()))
    batch = pack(ragged(6))
    losses = []
    for _ in range(100):
        loss = token_nll(model, batch).mean()
        optimizer.backward(loss)
        optimizer.step(2e-5)
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.01
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.bfloat16, name
        assert torch.equal(parameter, optimizer.masters[name].bfloat16()), name


def test_adapters_are_updated_in_place(
    tiny: Callable[..., Any], adapted: Callable[..., nn.Module]
) -> None:
    model = adapted(tiny(dtype=torch.bfloat16))
    held = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = Optimizer(held)
    assert all(optimizer.masters[name] is parameter for name, parameter in held.items())
    assert {p.dtype for p in held.values()} == {torch.float32}


def test_loss_scaling_changes_nothing_but_the_range() -> None:
    plain, scaled = parameters(), parameters()
    without, with_scaling = Optimizer(plain), Optimizer(scaled, loss_scaling=True)
    for step in range(5):
        without.backward(bowl(plain, step))
        with_scaling.backward(bowl(scaled, step))
        assert without.step(1e-2) == pytest.approx(with_scaling.step(1e-2), rel=1e-5)
    for name in plain:
        assert_close(scaled[name], plain[name])


def test_loss_scaling_keeps_small_fp16_gradients() -> None:
    """1e-9 is zero in fp16; scaled by 65536 it is not."""
    assert torch.tensor(1e-9).half() == 0
    for scaling, expected in ((False, 0.0), (True, 1e-9)):
        weight = nn.Parameter(torch.ones(1, 1, dtype=torch.float16))
        optimizer = Optimizer({"w": weight}, loss_scaling=scaling)
        optimizer.backward((weight.float() * 1e-9).sum())
        assert optimizer.step(1e-3) == pytest.approx(expected, rel=1e-2, abs=1e-12)


def test_an_overflow_under_loss_scaling_skips_the_step() -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    optimizer = Optimizer({"w": weight}, loss_scaling=True)
    scale = optimizer.state_dict()["scaler"]["scale"]
    optimizer.backward((weight * torch.tensor(1e38)).sum())  # infinite once scaled
    assert not math.isfinite(optimizer.step(1.0))
    assert torch.equal(weight, torch.ones(2, 2))
    assert optimizer.updates == 0
    assert optimizer.state_dict()["scaler"]["scale"] == scale / 2
    optimizer.backward(weight.sum())
    assert optimizer.step(0.1) == pytest.approx(2.0)
    assert optimizer.updates == 1
    assert_close(weight.detach(), torch.full((2, 2), 0.9))


def test_a_gradient_that_is_not_finite_updates_nothing() -> None:
    weight = nn.Parameter(torch.zeros(2, 2))
    optimizer = Optimizer({"w": weight})
    optimizer.backward(weight.sqrt().sum())  # the slope at zero is infinite, the loss is zero
    with pytest.raises(TrainingError, match="gradient is not finite"):
        optimizer.step(0.1)
    assert torch.equal(weight, torch.zeros(2, 2))


def test_which_parameters_moved() -> None:
    held = parameters()
    optimizer = Optimizer(held)
    optimizer.backward(held["matrix"].sum() + 0 * held["vector"].sum())
    optimizer.step(0.1)
    assert optimizer.moved == {"matrix"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_goes_on_bit_by_bit(dtype: torch.dtype) -> None:
    straight = parameters(dtype)
    optimizer = Optimizer(straight, weight_decay=0.01)
    for step in range(10):
        if step == 4:
            saved = {k: _copy(v) for k, v in optimizer.state_dict().items()}
        optimizer.backward(bowl(straight, step))
        optimizer.step(1e-2)
    resumed = parameters(dtype, seed=9)
    again = Optimizer(resumed, weight_decay=0.01)
    again.load_state_dict(saved)
    for step in range(4, 10):
        again.backward(bowl(resumed, step))
        again.step(1e-2)
    for name in straight:
        assert torch.equal(resumed[name], straight[name])
        assert torch.equal(again.masters[name], optimizer.masters[name])


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value

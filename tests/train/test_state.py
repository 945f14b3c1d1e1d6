"""Checkpoints: a run that is resumed from any of them ends in the same bits."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorikeet.config import TrainConfig
from lorikeet.data import Example
from lorikeet.errors import TrainingError
from lorikeet.evaluate import evaluate
from lorikeet.model import token_nll
from lorikeet.train import Checkpoints, Hooks, Setup, TrainState, fit, set_up

STEPS = 9
TRAIN = TrainConfig(
    batch_size=3,  # seven examples: three steps an epoch, the last of one example
    max_steps=STEPS,
    learning_rate=1e-2,
    max_tokens=30,
    eval_every=2,
    seed=5,
)
Build = Callable[[], nn.Module]
Lines = list[dict[str, Any]]


@pytest.fixture(params=["lora with dropout", "full in bf16"])
def build(
    request: pytest.FixtureRequest, tiny: Callable[..., Any], adapted: Callable[..., nn.Module]
) -> Build:
    if request.param == "full in bf16":
        return lambda: tiny(dtype=torch.bfloat16)
    return lambda: adapted(tiny(), moved=False, dropout=0.2)


def train(
    model: nn.Module, examples: list[Example], folder: Path, *, save_every: int = 1
) -> tuple[Setup, TrainState, Lines]:
    """Start, or go on from the newest checkpoint in `folder`."""
    setup = set_up(model, examples, TRAIN)
    checkpoints = Checkpoints(folder, keep_last=99)
    state = checkpoints.restore(setup.optimizer)
    lines: Lines = []
    state = fit(
        model,
        setup.optimizer,
        setup.steps,
        learning_rate=setup.schedule,
        total_steps=STEPS,
        loss=token_nll,
        state=state,
        hooks=Hooks(
            record=lines.append,
            validate=lambda: evaluate(model, examples[:2]).nll,
            eval_every=TRAIN.eval_every,
            save=lambda state: checkpoints.save(state, setup.optimizer),
            save_every=save_every,
        ),
    )
    return setup, state, [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def tensors(setup: Setup) -> list[Tensor]:
    optimizer = setup.optimizer
    moments = [
        value
        for entry in optimizer.state_dict()["adamw"]["state"].values()
        for value in entry.values()
    ]
    return [*optimizer.parameters.values(), *optimizer.masters.values(), *moments]


def test_resuming_from_every_checkpoint(
    build: Build, ragged: Callable[..., list[Example]], tmp_path: Path
) -> None:
    examples = ragged(7)
    setup, state, lines = train(build(), examples, tmp_path / "straight")
    expected = [tensor.detach().clone() for tensor in tensors(setup)]
    noise = torch.rand(4)
    for step in range(1, STEPS + 1):
        folder = tmp_path / f"from {step}"
        folder.mkdir()
        shutil.copytree(tmp_path / "straight" / f"step-{step:08d}", folder / f"step-{step:08d}")
        torch.manual_seed(1000 + step)  # whatever was drawn before the restore
        again, resumed, rest = train(build(), examples, folder)
        assert resumed == state
        assert rest == [line for line in lines if line["step"] > step]
        for got, want in zip(tensors(again), expected, strict=True):
            assert torch.equal(got, want), step
        assert torch.equal(torch.rand(4), noise)


def test_dropout_is_at_work(
    tiny: Callable[..., Any],
    adapted: Callable[..., nn.Module],
    ragged: Callable[..., list[Example]],
    tmp_path: Path,
) -> None:
    """Otherwise the test above would not notice generators that are not restored."""
    runs = [
        train(adapted(tiny(), moved=False, dropout=p), ragged(7), tmp_path / str(p), save_every=99)
        for p in (0.0, 0.2)
    ]
    assert runs[0][2][-1]["eval_nll"] != runs[1][2][-1]["eval_nll"]


@pytest.fixture
def setup(
    tiny: Callable[..., Any],
    adapted: Callable[..., nn.Module],
    ragged: Callable[..., list[Example]],
) -> Setup:
    return set_up(adapted(tiny()), ragged(4), TRAIN)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_last_ones_are_kept(setup: Setup, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    for step in (2, 4, 6, 8, 100):
        checkpoints.save(TrainState(step=step), setup.optimizer)
    assert names(tmp_path) == ["step-00000008", "step-00000100"]
    assert checkpoints.restore(setup.optimizer) == TrainState(step=100)


def test_nothing_to_restore(setup: Setup, tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "none").restore(setup.optimizer) is None


def test_what_a_kill_left_is_not_restored(setup: Setup, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(TrainState(step=3), setup.optimizer)
    (tmp_path / "step-00000001").mkdir()  # between the two moves of pruning
    half = tmp_path / ".step-00000006.abcdefgh.part"
    half.mkdir()
    (half / "state.pt").write_bytes(b"half a file")
    assert checkpoints.restore(setup.optimizer) == TrainState(step=3)
    assert names(tmp_path) == ["step-00000003"]
    checkpoints.save(TrainState(step=6), setup.optimizer)
    assert checkpoints.restore(setup.optimizer) == TrainState(step=6)


def test_a_damaged_checkpoint_is_named(setup: Setup, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    for step in (3, 6):
        checkpoints.save(TrainState(step=step), setup.optimizer)
    file = tmp_path / "step-00000006" / "state.pt"
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(TrainingError, match=r"step-00000006.*damaged; remove the folder"):
        checkpoints.restore(setup.optimizer)
    shutil.rmtree(file.parent)
    assert checkpoints.restore(setup.optimizer) == TrainState(step=3)


def test_the_checkpoint_of_another_run_is_refused(
    setup: Setup, tiny: Callable[..., Any], adapted: Callable[..., nn.Module], tmp_path: Path
) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(TrainState(step=3), setup.optimizer)
    other = set_up(adapted(tiny(), r=2), setup.steps.examples, TRAIN)
    before = [p.clone() for p in other.optimizer.parameters.values()]
    with pytest.raises(TrainingError, match="other trainable parameters"):
        checkpoints.restore(other.optimizer)
    after = other.optimizer.parameters.values()
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_the_best_weights_come_back(setup: Setup, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    best = {n: p.detach().clone() for n, p in setup.optimizer.parameters.items()}
    checkpoints.save_best(setup.optimizer)
    checkpoints.save(TrainState(step=1), setup.optimizer)
    with torch.no_grad():
        for parameter in setup.optimizer.parameters.values():
            parameter.add_(1.0)
    checkpoints.restore_best(setup.optimizer)
    for name, parameter in setup.optimizer.parameters.items():
        assert torch.equal(parameter, best[name])
    assert checkpoints.restore(setup.optimizer) == TrainState(step=1)  # `best` is no checkpoint


def test_a_checkpoint_runs_no_code(setup: Setup, tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "executed",))

    folder = tmp_path / "step-00000001"
    folder.mkdir()
    torch.save({"state": Attack()}, folder / "state.pt")
    with pytest.raises(TrainingError, match="damaged"):
        Checkpoints(tmp_path).restore(setup.optimizer)
    assert not (tmp_path / "executed").exists()

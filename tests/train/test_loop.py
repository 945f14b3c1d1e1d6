"""What `fit` does along the way, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorikeet.config import LoraConfig, TrainConfig
from lorikeet.data import Batch, Example, pack
from lorikeet.errors import TrainingError
from lorikeet.lora import LoraLinear, inject, lora_parameters
from lorikeet.model import token_nll
from lorikeet.train import Hooks, Optimizer, TrainState, fit, set_up

Lines = list[dict[str, Any]]


class Run:
    """A model, its optimizer, and one step's worth of data."""

    def __init__(self, model: nn.Module, examples: list[Example]) -> None:
        self.model = model
        self.batches = [pack(examples[:3]), pack(examples[3:])]
        self.optimizer = Optimizer({n: p for n, p in model.named_parameters() if p.requires_grad})
        self.lines: Lines = []

    def fit(
        self,
        steps: int,
        *,
        loss: Callable[[nn.Module, Batch], Tensor] = token_nll,
        state: TrainState | None = None,
        **hooks: Any,
    ) -> TrainState:
        return fit(
            self.model,
            self.optimizer,
            lambda step: self.batches,
            learning_rate=lambda step: 1e-2,
            total_steps=steps,
            loss=loss,
            state=state,
            hooks=Hooks(record=self.lines.append, **hooks),
        )

    def weights(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.optimizer.parameters.items()}


@pytest.fixture
def run(
    tiny: Callable[..., Any],
    adapted: Callable[..., nn.Module],
    ragged: Callable[..., list[Example]],
) -> Run:
    return Run(adapted(tiny(), moved=False), ragged(6))


def same(before: dict[str, Tensor], after: dict[str, Tensor]) -> bool:
    return all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_step_line_has_exactly_these_keys(run: Run) -> None:
    state = run.fit(4)
    assert state.step == 4
    assert [line["step"] for line in run.lines] == [1, 2, 3, 4]
    for line in run.lines:
        assert set(line) == {
            "step",
            "loss",
            "learning_rate",
            "grad_norm",
            "tokens",
            "supervised_tokens",
            "seconds",
        }
    first = run.lines[0]
    assert first["tokens"] == sum(batch.tokens for batch in run.batches)
    assert first["supervised_tokens"] == sum(batch.supervised_tokens for batch in run.batches)
    assert first["learning_rate"] == 1e-2
    assert 0 < first["seconds"] < 60
    assert run.lines[3]["loss"] < first["loss"]


def test_the_loss_is_per_supervised_token(run: Run) -> None:
    with torch.no_grad():
        losses = torch.cat([token_nll(run.model, batch) for batch in run.batches])
    run.fit(1)
    assert run.lines[0]["loss"] == pytest.approx(losses.mean().item(), rel=1e-6)


def test_an_evaluation_line_has_exactly_these_keys(run: Run) -> None:
    run.fit(5, validate=lambda: 1.5, eval_every=2)
    evaluations = [line for line in run.lines if "eval_nll" in line]
    assert evaluations == [
        {"step": step, "eval_nll": 1.5, "eval_perplexity": math.exp(1.5)} for step in (2, 4, 5)
    ]


@pytest.mark.parametrize(
    ("steps", "every", "expected"),
    [(6, 2, [2, 4, 6]), (7, 3, [3, 6, 7]), (3, None, [3]), (3, 9, [3])],
)
def test_when_it_validates_and_saves(
    run: Run, steps: int, every: int | None, expected: list[int]
) -> None:
    saved: list[int] = []
    run.fit(
        steps,
        validate=lambda: 1.0,
        eval_every=every,
        save=lambda state: saved.append(state.step),
        save_every=every,
    )
    assert saved == expected
    assert [line["step"] for line in run.lines if "eval_nll" in line] == expected


def test_a_checkpoint_knows_the_evaluation_of_its_step(run: Run) -> None:
    seen: list[tuple[int, float]] = []
    values = iter([3.0, 2.0, 2.5])
    run.fit(
        6,
        validate=lambda: next(values),
        eval_every=2,
        save=lambda state: seen.append((state.best_step, state.best_nll)),
        save_every=2,
    )
    assert seen == [(2, 3.0), (4, 2.0), (4, 2.0)]


def test_training_mode_is_on_only_inside(run: Run) -> None:
    modes: list[bool] = []

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        modes.append(model.training)
        return token_nll(model, batch)

    run.fit(1, loss=loss)
    assert modes == [True, True]
    assert not any(module.training for module in run.model.modules())


def test_early_stopping(run: Run) -> None:
    values = iter([3.0, 2.0, 2.1, 1.9, 1.95, 2.0, 1.0])
    improved: list[int] = []
    saved: list[int] = []
    state = run.fit(
        70,
        validate=lambda: next(values),
        eval_every=10,
        improved=lambda state: improved.append(state.step),
        patience=2,
        save=lambda state: saved.append(state.step),
    )
    assert state.stopped
    assert (state.step, state.best_step, state.best_nll, state.worse) == (60, 40, 1.9, 2)
    assert improved == [10, 20, 40]
    assert saved == [60]
    assert run.fit(70, state=state).step == 60  # a stopped run stays stopped


def explode(at: int, factor: float) -> Callable[[nn.Module, Batch], Tensor]:
    """The loss times `factor` from the call `at` on."""
    calls: Iterator[int] = iter(range(1000))

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        nats = token_nll(model, batch)
        return nats * factor if next(calls) >= at else nats

    return loss


@pytest.mark.parametrize("factor", [math.inf, math.nan])
def test_a_loss_that_is_not_finite_leaves_the_weights(run: Run, factor: float) -> None:
    run.fit(2)
    before = run.weights()
    with pytest.raises(TrainingError, match=r"loss is not finite.*lower learning rate"):
        run.fit(4, loss=explode(1, factor))  # the second micro-batch
    assert same(before, run.weights())
    assert all(p.grad is None for p in run.model.parameters())
    assert len(run.lines) == 2
    assert not run.model.training


def test_a_gradient_that_is_not_finite_leaves_the_weights(run: Run) -> None:
    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return token_nll(model, batch) + (lora_B(model) * 0).sqrt().sum()

    before = run.weights()
    with pytest.raises(TrainingError, match="gradient is not finite"):
        run.fit(4, loss=loss)
    assert same(before, run.weights())


def lora_B(model: nn.Module) -> Tensor:  # noqa: N802 (the field's name)
    return next(p for n, p in lora_parameters(model).items() if n.endswith("lora_B"))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_validation_loss_that_is_not_finite(run: Run, value: float) -> None:
    with pytest.raises(TrainingError, match="validation loss of step 1 is not finite"):
        run.fit(3, validate=lambda: value, eval_every=1)


def test_a_perplexity_beyond_floats_is_infinite(run: Run) -> None:
    run.fit(1, validate=lambda: 1000.0)
    assert run.lines[-1]["eval_perplexity"] == math.inf


def test_a_step_without_supervision(run: Run) -> None:
    run.batches = [pack([Example((3, 4, 5), (False, False, False), 0, "row")])]
    before = run.weights()
    with pytest.raises(TrainingError, match="no supervised token"):
        run.fit(1)
    assert same(before, run.weights())


def test_a_micro_batch_without_supervision_counts_nothing(run: Run) -> None:
    silent = pack([Example((3, 4, 5), (False, False, False), 0, "row")])
    with torch.no_grad():
        expected = torch.cat([token_nll(run.model, batch) for batch in run.batches]).mean().item()
    run.batches = [*run.batches, silent]
    run.fit(1)
    assert run.lines[0]["loss"] == pytest.approx(expected, rel=1e-6)


class Forgetful(nn.Module):
    """Two linear layers, one of which its forward never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.used = LoraLinear(nn.Linear(4, 3), r=2, scale=1.0)
        self.forgotten = LoraLinear(nn.Linear(4, 3), r=2, scale=1.0)
        for layer in (self.used, self.forgotten):
            layer.base.requires_grad_(False)
            layer.reset(torch.Generator().manual_seed(0))

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def test_tensors_that_never_learn_are_refused(ragged: Callable[..., list[Example]]) -> None:
    run = Run(Forgetful(), ragged(6))
    x = torch.randn(5, 4)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return model(x).square().sum()[None]

    with pytest.raises(TrainingError) as caught:
        run.fit(10, loss=loss)
    assert caught.value.problems == ("forgotten.lora_A", "forgotten.lora_B")
    assert "2 of 4 trainable tensors" in str(caught.value)
    assert len(run.lines) == 3


def test_rows_of_a_rare_token_may_wait(tiny: Callable[..., Any]) -> None:
    """An untied embedding's row has its first gradient when its token first comes up."""
    model = tiny(tied=False)
    rare = model.config.vocab_size - 1
    inject(model, LoraConfig(r=2, trainable_tokens=[rare]), seed=0)
    rows = [Example((5, 6, 7, 8), (False, True, True, True), i, "row") for i in range(6)]
    rows[5] = Example((5, rare, 7, 8), (False, True, True, True), 5, "row")
    setup = set_up(model, rows, TrainConfig(batch_size=1, max_steps=6))
    embedding = model.get_input_embeddings()
    before = embedding.rows.detach().clone()
    fit(
        model,
        setup.optimizer,
        lambda step: [pack([rows[step]])],
        learning_rate=lambda step: 1e-2,
        total_steps=6,
        loss=setup.loss,
    )
    assert not torch.equal(embedding.rows, before)
    assert len(setup.optimizer.sparse) == 1


def test_all_of_loras_tensors_move_within_three_steps(run: Run) -> None:
    run.fit(3)
    assert run.optimizer.moved == set(run.optimizer.parameters)


def test_going_on_where_a_state_stands(run: Run) -> None:
    state = run.fit(5, state=TrainState(step=3))
    assert state.step == 5
    assert [line["step"] for line in run.lines] == [4, 5]

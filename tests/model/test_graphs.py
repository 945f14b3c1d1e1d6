"""Recorded passes. No GPU is needed: what a CUDA graph does to memory is done by running it again.

What only a GPU can show - that a capture succeeds, and what it saves - is not shown here. What a
capture would refuse is: on the meta device no value can be read, and nothing can wait for one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen3Config

from lorikeet.config import LoraConfig, TrainConfig
from lorikeet.data import Example, pack
from lorikeet.data.batch import Batch
from lorikeet.kernels import attention, native
from lorikeet.lora import inject, lora_parameters
from lorikeet.model import graphed, graphs
from lorikeet.model.attention import IMPLEMENTATION
from lorikeet.model.fast import FastNll
from lorikeet.model.graphs import GraphedNll
from lorikeet.model.row import coarse, dropout_keys, recordable
from lorikeet.train import fit, set_up
from lorikeet.train.loop import Hooks

_SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 52,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "tie_word_embeddings": True,
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**_SIZES),
    "llama with biases": lambda: LlamaConfig(**_SIZES, attention_bias=True, mlp_bias=True),
    "mistral": lambda: MistralConfig(**_SIZES, sliding_window=8),
    "qwen3": lambda: Qwen3Config(**{**_SIZES, "tie_word_embeddings": False}),
}

compiled = pytest.mark.skipif(
    native.missing() is not None, reason="needs attention that reads documents from a tensor"
)
Said = pytest.CaptureFixture[str]


def build(
    name: str = "llama",
    *,
    adapted: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    **options: Any,
) -> Any:
    """A random model in training; `options` are those of its adapters."""
    torch.manual_seed(4)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            CONFIGS[name](), dtype=dtype, attn_implementation=IMPLEMENTATION
        )
    if adapted:
        inject(model, LoraConfig(r=4, **options), seed=3)
        for parameter in lora_parameters(model).values():
            nn.init.normal_(parameter, std=0.2)
    return model.train()


def packed(*lengths: int, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for length in lengths:
        ids = torch.randint(61, (length,), generator=generator).tolist()
        counted = (torch.rand(length, generator=generator) < 0.6).tolist()
        examples.append(Example(tuple(ids), (False, *counted[1:]), 0, "test"))
    return pack(examples)


def run_again(run: Callable[[], None]) -> Callable[[], None]:
    """What a replay does: the same operations on the same memory."""
    run()
    return run


def gradients(loss: Callable[..., Tensor], model: Any, batch: Batch) -> tuple[Tensor, list[Tensor]]:
    """The losses [S], and the gradients of their sum."""
    torch.manual_seed(7)  # the keys of dropout
    losses = loss(model, batch)
    trained = [p for p in model.parameters() if p.requires_grad]
    return losses.detach(), list(torch.autograd.grad(losses.sum(), trained))


def replayed(model: Any, batch: Batch) -> GraphedNll:
    """A loss that has recorded rows of the batch's sizes, from other rows."""
    loss = GraphedNll(model, FastNll(), record=run_again)
    lengths = batch.lengths
    for seed in (11, 12):
        gradients(loss, model, packed(*lengths[::-1], seed=seed))
    return loss


def assert_replayed(model: Any, batch: Batch) -> None:
    """A replay has the bits of the pass itself over the same row, and is near the batch's own."""
    loss = replayed(model, batch)
    before = loss.replays
    losses, found = gradients(loss, model, batch)
    assert loss.replays == before + 1

    def over_the_row(model: Any, batch: Batch) -> Tensor:
        row = recordable(batch, coarse(batch), dropout_keys(model))
        return FastNll().of_row(model, row)[: batch.supervised_tokens]

    bits, expected = gradients(over_the_row, model, batch)
    assert torch.equal(losses, bits)
    assert all(torch.equal(own, other) for own, other in zip(found, expected, strict=True))
    near, expected = gradients(FastNll(), model, batch)
    assert_close(losses, near, rtol=3e-2, atol=3e-2)
    for own, other in zip(found, expected, strict=True):
        assert float((own - other).norm() / other.norm()) < 3e-2


@compiled
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("adapted", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_replay_is_the_pass_itself(name: str, adapted: bool, dropout: float) -> None:
    model = build(name, adapted=adapted, dropout=dropout)
    assert_replayed(model, packed(17, 2, 1, 29, 23))


@compiled
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_adapters_on_everything(name: str) -> None:
    options = {"target_modules": ".*(_proj|lm_head|embed_tokens)", "dropout": 0.2}
    assert_replayed(build(name, **options), packed(17, 2, 1, 29, 23))


@compiled
@pytest.mark.parametrize("lengths", [(127,), (128,), (64, 64), (2,) * 9, (300, 2), (513,)])
def test_rows_at_the_edges_of_the_grid(lengths: tuple[int, ...]) -> None:
    assert_replayed(build(), packed(*lengths))


@compiled
def test_every_replay_has_other_masks() -> None:
    model, batch = build(dropout=0.4), packed(30, 40)
    loss = replayed(model, batch)
    torch.manual_seed(1)
    first, second = loss(model, batch).detach(), loss(model, batch).detach()
    assert not torch.allclose(first, second)
    torch.manual_seed(1)
    assert torch.equal(loss(model, batch).detach(), first)


@compiled
def test_sizes_are_recorded_at_second_sight() -> None:
    model = build()
    loss = GraphedNll(model, FastNll(), record=run_again)
    for batch in (packed(30), packed(200), packed(40)):  # the first and the last share their sizes
        gradients(loss, model, batch)
    assert loss.replays == 1 + 1  # the trial, and the pass itself


@compiled
def test_no_more_graphs_than_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MOST", 1)
    model = build()
    loss = GraphedNll(model, FastNll(), record=run_again)
    for batch in (packed(30), packed(30), packed(200), packed(200), packed(30)):
        gradients(loss, model, batch)
    assert loss.replays == 3


@compiled
def test_answers_and_evaluation_are_not_recorded() -> None:
    model, batch = build(), packed(30, 40)
    loss = replayed(model, batch)
    before = loss.replays
    with torch.no_grad():
        loss(model, batch)
    loss(model.eval(), batch)
    assert loss.replays == before


def test_a_recording_that_fails_is_told_once(capsys: Said) -> None:
    def refuse(run: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    model, batch = build(), packed(30, 40)
    loss = GraphedNll(model, FastNll(), record=refuse)
    results = [gradients(loss, model, batch) for _ in range(4)]
    exact, expected = gradients(FastNll(), model, batch)
    for losses, found in results:
        assert_close(losses, exact, rtol=1e-5, atol=1e-5)
        assert all(torch.isfinite(g).all() for g in found) and len(found) == len(expected)
    said = capsys.readouterr().err
    assert said.count("not recorded as CUDA graphs") == 1
    assert "operation not permitted" in said and "and more" not in said


@pytest.mark.parametrize("spoilt", ["losses", "gradients"])
def test_a_recording_that_replays_something_else_is_not_used(spoilt: str, capsys: Said) -> None:
    model, batch = build(), packed(30, 40)

    def wrong(run: Callable[[], None]) -> Callable[[], None]:
        def replay() -> None:
            run()
            graph = run.__self__  # type: ignore[attr-defined]
            if spoilt == "losses":
                graph.losses.mul_(1.1)
            else:
                graph.gradients[0].add_(1.0)

        return replay

    loss = GraphedNll(model, FastNll(), record=wrong)
    exact, expected = gradients(FastNll(), model, batch)
    for _ in range(3):
        losses, found = gradients(loss, model, batch)
        assert_close(losses, exact, rtol=1e-5, atol=1e-5)
        assert_close(found[0], expected[0], rtol=1e-4, atol=1e-6)
    assert "off (at most" in capsys.readouterr().err


@compiled
def test_gradients_that_a_recording_does_not_have() -> None:
    model, batch = build(), packed(30, 40)
    loss = replayed(model, batch)
    losses = loss(model, batch)
    with pytest.raises(RuntimeError, match="sum alone"):
        (losses * torch.arange(len(losses))).sum().backward()
    early = loss(model, batch).sum()
    loss(model, batch)
    with pytest.raises(RuntimeError, match="a later one"):
        early.backward()


@compiled
def test_a_whole_run_is_the_same_run() -> None:
    examples = [
        Example(tuple(range(1, 3 + n)), (False,) + (True,) * (n + 1), n, "row") for n in range(40)
    ]
    results = []
    for recorded in (False, True):
        model = build(dropout=0.1)
        config = TrainConfig(batch_size=8, max_steps=12, max_tokens=64, learning_rate=1e-3)
        setup = set_up(model, examples, config, nll=FastNll())
        loss: Any = GraphedNll(model, FastNll(), record=run_again) if recorded else setup.loss
        lines: list[dict[str, Any]] = []
        fit(
            model,
            setup.optimizer,
            setup.steps,
            learning_rate=setup.schedule,
            total_steps=setup.total_steps,
            loss=loss,
            hooks=Hooks(record=lines.append),
        )
        results.append((lines, [p.detach().clone() for p in lora_parameters(model).values()]))
        assert not recorded or loss.replays > 12
    for plain, again in zip(results[0][0], results[1][0], strict=True):
        assert plain["loss"] == pytest.approx(again["loss"], rel=1e-3)
        # In bf16 the gradients of so small a model are a tenth off the truth, either way.
        assert plain["grad_norm"] == pytest.approx(again["grad_norm"], rel=0.2)
    for plain_weight, weight in zip(results[0][1], results[1][1], strict=True):
        assert float((plain_weight - weight).norm() / weight.norm()) < 1e-2


def test_on_a_cpu_nothing_is_recorded() -> None:
    fast = FastNll()
    assert graphed(build(dtype=torch.bfloat16), fast) is fast


class _Watch(TorchDispatchMode):
    """Refuses what a capture refuses and the meta device lets pass: copies from the CPU."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        for argument in torch.utils._pytree.tree_leaves((args, kwargs or {})):
            if isinstance(argument, Tensor) and argument.device.type == "cpu":
                raise AssertionError(f"{func} takes a tensor on the CPU")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def _flash(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """PyTorch's FlashAttention by shapes alone, as if the meta device were a GPU."""
    if attention._flash() is None:
        pytest.skip("this PyTorch has no FlashAttention for packed documents")
    monkeypatch.setattr(attention, "_on_flash", lambda query: query.dtype == torch.bfloat16)
    yield


@pytest.mark.usefixtures("_flash")
@pytest.mark.parametrize("recompute", [0, 1])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("adapted", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("name", CONFIGS)
def test_no_pass_waits_for_a_value(
    name: str, adapted: bool, dropout: float, recompute: int
) -> None:
    """Every operation of a GPU's pass in bf16, forward and backward, by shapes."""
    model = build(name, adapted=adapted, dtype=torch.bfloat16, dropout=dropout, device="meta")
    batch = packed(17, 2, 200, 29).to("meta")
    fast = FastNll(recompute=recompute)
    loss = GraphedNll(model, fast, record=run_again)
    row = recordable(batch, coarse(batch), dropout_keys(model))
    graph = graphs._Graph(loss, row)
    with _Watch():
        graph._run()
    assert graph.losses.shape == row.targets.shape
    for gradient, parameter in zip(graph.gradients, loss.parameters, strict=True):
        assert gradient is not None and gradient.shape == parameter.shape
        assert gradient.dtype == parameter.dtype

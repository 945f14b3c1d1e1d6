"""The GPU's side on a GPU: attention, compiled kernels, recorded steps, memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen3Config

from lorikeet.config import LoraConfig, TrainConfig
from lorikeet.data import Example, pack
from lorikeet.data.batch import Batch
from lorikeet.kernels import attend, attention, fused, head_nll
from lorikeet.lora import inject, lora_parameters
from lorikeet.model import token_nll
from lorikeet.model.agreement import choose_nll
from lorikeet.model.fast import FastNll
from lorikeet.model.graphs import GraphedNll
from lorikeet.model.machine import memory_held, memory_limit
from lorikeet.model.packing import enable_packing
from lorikeet.train import Hooks, fit, set_up

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")

GPU = torch.device("cuda")
_SIZES: dict[str, Any] = {
    "vocab_size": 997,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "pad_token_id": 0,
    "tie_word_embeddings": True,
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**_SIZES),
    "llama with biases": lambda: LlamaConfig(**_SIZES, attention_bias=True, mlp_bias=True),
    "mistral": lambda: MistralConfig(**_SIZES, sliding_window=33),
    "qwen3": lambda: Qwen3Config(**_SIZES),
}

Said = pytest.CaptureFixture[str]


@pytest.fixture
def _flash() -> None:
    if (reason := attention.flash_missing()) is not None:
        pytest.skip(reason)


def build(name: str, dtype: torch.dtype, *, adapted: bool = True, **options: Any) -> Any:
    torch.manual_seed(4)
    model = AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=dtype).to(GPU)
    assert enable_packing(model, device=GPU)
    if adapted:
        inject(model, LoraConfig(r=8, **options), seed=3)
        for parameter in lora_parameters(model).values():
            torch.nn.init.normal_(parameter, std=0.05)
    return model.train()


def examples(count: int = 64) -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number in range(count):
        length = int(torch.randint(2, 300, (), generator=generator))
        ids = torch.randint(997, (length,), generator=generator).tolist()
        supervised = [False, *(torch.rand(length - 1, generator=generator) < 0.6).tolist()]
        supervised[-1] = True
        rows.append(Example(tuple(ids), tuple(supervised), number, "row"))
    return rows


def gradients(loss: Callable[..., Tensor], model: Any, batch: Batch) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(7)
    losses = loss(model, batch)
    trained = [p for p in model.parameters() if p.requires_grad]
    return losses.detach(), list(torch.autograd.grad(losses.sum(), trained))


def distance(found: list[Tensor], expected: list[Tensor]) -> float:
    """Of all gradients, taken as one vector."""
    squares = sum(
        float((a - b).double().square().sum()) for a, b in zip(found, expected, strict=True)
    )
    return (squares / sum(float(b.double().square().sum()) for b in expected)) ** 0.5


@pytest.mark.usefixtures("_flash")
@pytest.mark.parametrize("window", [None, 1, 40])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
def test_attention(heads: tuple[int, int], window: int | None) -> None:
    bounds = [0, 5, 5, 133, 134, 334, 334]
    torch.manual_seed(0)
    shapes = [(334, heads[0], 64), (334, heads[1], 64), (334, heads[1], 64)]
    given = [torch.randn(s, device=GPU, dtype=torch.bfloat16, requires_grad=True) for s in shapes]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=GPU)
    output = attend(*given, cu_seqlens, scale=0.1, window=window)
    wide = [t.detach().double().requires_grad_() for t in given]
    document = torch.bucketize(torch.arange(334, device=GPU), cu_seqlens[1:], right=True)
    distance_back = torch.arange(334, device=GPU)[:, None] - torch.arange(334, device=GPU)
    seen = (document[:, None] == document) & (distance_back >= 0)
    seen &= distance_back < (window or 334)
    key, value = (t.repeat_interleave(heads[0] // heads[1], 1) for t in wide[1:])
    scores = torch.einsum("qhd,khd->hqk", wide[0], key) * 0.1
    exact = torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), value)
    assert (output.double() - exact).norm() < 1e-2 * exact.norm()
    upstream = torch.randn_like(exact)
    found = torch.autograd.grad(output, given, upstream.to(output.dtype))
    for own, other in zip(found, torch.autograd.grad(exact, wide, upstream), strict=True):
        assert (own.double() - other).norm() < 2e-2 * other.norm() + 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_head(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(300, 64, device=GPU, dtype=dtype, requires_grad=True)
    weight = torch.randn(997, 64, device=GPU, dtype=dtype, requires_grad=True)
    targets = torch.randint(997, (300,), device=GPU)
    targets[::7] = -100
    found = head_nll(hidden, weight, None, targets)
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    logits = wide[0] @ wide[1].T
    exact = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    assert (found - exact).norm() < 1e-2 * exact.norm()
    own = torch.autograd.grad(found.sum(), [hidden, weight])
    for slope, other in zip(own, torch.autograd.grad(exact.sum(), wide), strict=True):
        assert (slope.double() - other).norm() < 2e-2 * other.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("adapted", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_fast_path_agrees(name: str, adapted: bool, dtype: torch.dtype, capsys: Said) -> None:
    model = build(name, dtype, adapted=False)
    loss, path = choose_nll(model.eval(), asked="auto", packing=True)
    assert loss == FastNll(), capsys.readouterr().err
    assert path.startswith("fast path")
    model = build(name, dtype, adapted=adapted)
    batch = pack(examples(6)).to(GPU)
    losses, found = gradients(FastNll(), model, batch)
    exact, expected = gradients(token_nll, model, batch)
    near = 1e-4 if dtype == torch.float32 else 5e-2
    assert_close(losses, exact, rtol=near, atol=near)
    assert distance(found, expected) < near


@pytest.mark.usefixtures("_flash")
@pytest.mark.parametrize("options", [{}, {"dropout": 0.1}, {"dora": True}], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_recorded_steps(name: str, options: dict[str, Any], capsys: Said) -> None:
    """Rows of the same sizes, with other documents, are what they are unrecorded."""
    model = build(name, torch.bfloat16, **options)
    loss = GraphedNll(model, FastNll())
    for seed in range(5):
        rows = examples(40)[seed * 6 : seed * 6 + 6]
        batch = pack(rows).to(GPU)
        for _ in range(3):
            losses, found = gradients(loss, model, batch)
        exact, expected = gradients(FastNll(), model, batch)
        assert_close(losses, exact, rtol=3e-2, atol=3e-2)
        assert distance(found, expected) < 3e-2
    assert loss.replays > 5
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("method", ["lora", "full"])
def test_training_learns(method: str, capsys: Said) -> None:
    model = build("llama", torch.bfloat16, adapted=method == "lora")
    if method == "full":
        model.requires_grad_(True)
    config = TrainConfig(batch_size=8, max_steps=40, learning_rate=3e-3, method=method)
    loss, _ = choose_nll(build("llama", torch.bfloat16, adapted=False), asked="auto", packing=True)
    setup = set_up(model, examples(16), config, nll=loss)
    assert setup.fit is not None  # a GPU's memory is a limit
    lines: list[dict[str, Any]] = []
    fit(
        model,
        setup.optimizer,
        setup.steps,
        learning_rate=setup.schedule,
        total_steps=setup.total_steps,
        loss=setup.loss,
        hooks=Hooks(record=lines.append),
    )
    assert lines[-1]["loss"] < 0.9 * lines[0]["loss"]
    assert capsys.readouterr().err == ""


def test_what_is_compiled() -> None:
    reason = fused.missing("cuda")
    if reason is not None:
        pytest.skip(reason)
    doubled = fused.fused(lambda x: (x + x).exp())
    x = torch.randn(100, device=GPU)
    assert_close(doubled(x), (x + x).exp())


def test_memory() -> None:
    before = memory_held(GPU)
    held = torch.zeros(1 << 26, dtype=torch.uint8, device=GPU)
    assert memory_held(GPU) - before >= held.numel()
    limit = memory_limit(GPU)
    assert limit is not None
    assert memory_held(GPU) < limit <= torch.cuda.get_device_properties(GPU).total_memory

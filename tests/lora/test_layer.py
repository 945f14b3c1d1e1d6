from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

from lorikeet.lora import LoraEmbedding, LoraLayer, LoraLinear

sizes = st.integers(1, 9)


def randomised(layer: LoraLayer) -> LoraLayer:
    with torch.no_grad():
        layer.lora_A.normal_()
        layer.lora_B.normal_()
    return layer


def linear(*, r: int = 3, dropout: float = 0.0, bias: bool = True) -> LoraLinear:
    layer = LoraLinear(nn.Linear(6, 5, bias=bias), r=r, scale=0.5, dropout=dropout)
    layer.base.requires_grad_(False)
    return randomised(layer)


@settings(deadline=None, max_examples=25, derandomize=True)
@given(fan_in=sizes, fan_out=sizes, r=sizes, rows=sizes, bias=st.booleans())
def test_linear_is_its_formula(fan_in: int, fan_out: int, r: int, rows: int, bias: bool) -> None:
    base = nn.Linear(fan_in, fan_out, bias=bias)
    layer = randomised(LoraLinear(base, r=r, scale=1.7))
    x = torch.randn(2, rows, fan_in)
    y = base(x).double() + 1.7 * (x.double() @ layer.lora_A.T.double() @ layer.lora_B.T.double())
    assert_close(layer(x).double(), y, atol=1e-4, rtol=1e-5)
    assert_close(layer.merged()(x), layer(x), atol=1e-4, rtol=1e-4)
    assert_close(layer.merged().weight, base.weight + layer.delta())
    assert layer.delta().shape == (fan_out, fan_in)
    assert (layer.in_features, layer.out_features, layer.r) == (fan_in, fan_out, r)
    assert layer.weight is base.weight
    assert layer.bias is base.bias


def by_hand(layer: LoraLinear, weight: torch.Tensor) -> torch.Tensor:
    """DoRA's weight [out, in] of W [out, in], equation 5, the norm a constant."""
    assert layer.magnitude is not None
    direction = weight.double() + layer.scale * (layer.lora_B @ layer.lora_A).double()
    norm = torch.stack([row.detach().square().sum().sqrt() for row in direction])
    return layer.magnitude.double()[:, None] * direction / norm[:, None]


@settings(deadline=None, max_examples=25, derandomize=True)
@given(fan_in=sizes, fan_out=sizes, r=sizes, bias=st.booleans(), transposed=st.booleans())
def test_dora_is_its_formula(
    fan_in: int, fan_out: int, r: int, bias: bool, transposed: bool
) -> None:
    base: nn.Module = nn.Linear(fan_in, fan_out, bias=bias)
    if transposed:
        base = Conv1D(fan_out, fan_in)
        nn.init.normal_(base.bias)
    layer = LoraLinear(base, r=r, scale=1.7, dora=True)
    x = torch.randn(3, 2, fan_in)
    assert_close(layer(x), base(x))  # B is zero, and the magnitude is the norm
    randomised(layer)
    with torch.no_grad():
        layer.magnitude.uniform_(0.5, 2.0)
    stored = base.weight.t() if transposed else base.weight
    weight = by_hand(layer, stored)
    bias_term = 0.0 if layer.bias is None else layer.bias
    assert_close(layer(x).double(), x.double() @ weight.t() + bias_term, atol=1e-4, rtol=1e-4)
    assert_close(layer.merged()(x), layer(x), atol=1e-4, rtol=1e-4)
    assert layer.delta().shape == base.weight.shape
    own = [layer.lora_A, layer.lora_B, layer.magnitude]
    seed = torch.randn(3, 2, fan_out)
    found = torch.autograd.grad(layer(x), own, seed)
    expected = torch.autograd.grad((x.double() @ by_hand(layer, stored).t()).float(), own, seed)
    assert_close(found, expected, atol=1e-4, rtol=1e-3)


@settings(deadline=None, max_examples=25, derandomize=True)
@given(fan_in=sizes, fan_out=sizes, data=st.data(), transposed=st.booleans())
def test_pissa_starts_at_the_base_with_its_largest_triplets(
    fan_in: int, fan_out: int, data: st.DataObject, transposed: bool
) -> None:
    r = data.draw(st.integers(1, min(fan_in, fan_out)))
    base: nn.Module = Conv1D(fan_out, fan_in) if transposed else nn.Linear(fan_in, fan_out)
    layer = LoraLinear(base, r=r, scale=1.7)
    layer.reset(torch.Generator(), "pissa")
    stored = base.weight.t() if transposed else base.weight
    U, S, V = torch.linalg.svd(stored.double())
    principal = (U[:, :r] * S[:r] @ V[:r]).float()
    assert_close(layer.scale * layer.lora_B @ layer.lora_A, principal, atol=1e-5, rtol=1e-4)
    assert_close(layer.lora_A @ layer.lora_A.T, layer.lora_B.T @ layer.lora_B, atol=1e-4, rtol=1e-4)
    x = torch.randn(3, fan_in)
    assert_close(layer(x), base(x), atol=1e-5, rtol=1e-4)
    randomised(layer)
    residual = stored - principal
    update = layer.scale * layer.lora_B @ layer.lora_A
    assert_close(layer(x), x @ (residual + update).t() + base.bias, atol=1e-4, rtol=1e-4)
    assert_close(layer.merged()(x), layer(x), atol=1e-4, rtol=1e-4)
    found = torch.autograd.grad(layer(x).square().sum(), [layer.lora_A, layer.lora_B])
    total = x @ (residual.detach() + layer.scale * layer.lora_B @ layer.lora_A).t() + base.bias
    expected = torch.autograd.grad(total.square().sum(), [layer.lora_A, layer.lora_B])
    assert_close(found, expected, atol=1e-3, rtol=1e-3)


def test_dora_drops_what_both_parts_see() -> None:
    """In training W and B A get the same dropped input, as in PEFT; the plain output stays."""
    torch.manual_seed(3)
    layer = LoraLinear(nn.Linear(6, 5), r=3, scale=0.5, dropout=0.4, dora=True).train()
    randomised(layer)
    with torch.no_grad():
        layer.magnitude.uniform_(0.5, 2.0)
    x = torch.randn(4, 6)
    torch.manual_seed(7)
    y = layer(x)
    torch.manual_seed(7)
    dropped = nn.functional.dropout(x, 0.4)
    weight = layer.base.weight
    ratio = layer.magnitude / (weight + layer.scale * layer.lora_B @ layer.lora_A).norm(dim=1)
    update = layer.scale * dropped @ (layer.lora_B @ layer.lora_A).t()
    expected = layer.base(x) + (ratio - 1) * (dropped @ weight.t()) + ratio * update
    assert_close(y, expected)


@settings(deadline=None, max_examples=25, derandomize=True)
@given(fan_in=sizes, fan_out=sizes, r=sizes)
def test_a_transposed_layer_is_its_formula(fan_in: int, fan_out: int, r: int) -> None:
    base = Conv1D(fan_out, fan_in)
    layer = randomised(LoraLinear(base, r=r, scale=1.7))
    x = torch.randn(2, 3, fan_in)
    assert_close(layer(x), base(x) + 1.7 * (x @ layer.lora_A.T @ layer.lora_B.T))
    assert_close(layer.merged()(x), layer(x), atol=1e-4, rtol=1e-4)
    assert type(layer.merged()) is Conv1D
    assert layer.delta().shape == base.weight.shape
    assert (layer.in_features, layer.out_features, layer.r) == (fan_in, fan_out, r)


@settings(deadline=None, max_examples=25, derandomize=True)
@given(rows=st.integers(2, 9), width=sizes, r=sizes)
def test_embedding_is_its_formula(rows: int, width: int, r: int) -> None:
    base = nn.Embedding(rows, width)
    layer = randomised(LoraEmbedding(base, r=r, scale=0.3))
    x = torch.randint(rows, (3, 4))
    y = base(x) + 0.3 * (layer.lora_A[:, x].permute(1, 2, 0) @ layer.lora_B.T)
    assert_close(layer(x), y)
    assert_close(layer.merged()(x), layer(x), atol=1e-5, rtol=1e-5)
    assert layer.delta().shape == (rows, width)
    assert (layer.num_embeddings, layer.embedding_dim, layer.r) == (rows, width, r)
    assert layer.weight is base.weight


def test_scaled_embedding_scales_the_update_too() -> None:
    base = Gemma3TextScaledWordEmbedding(7, 4, padding_idx=0, embed_scale=3.0)
    layer = randomised(LoraEmbedding(base, r=2, scale=0.5))
    x = torch.arange(7)
    assert_close(layer(x), 3.0 * (base.weight + layer.delta()))
    merged = layer.merged()
    assert type(merged) is type(base)
    assert_close(merged(x), layer(x))
    assert layer.padding_idx == 0


@pytest.mark.parametrize("bias", [True, False])
def test_gradients_of_linear_agree_with_finite_differences(bias: bool) -> None:
    layer = linear(bias=bias).double()
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)

    def run(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, {"lora_A": a, "lora_B": b}, (x,))

    A, B = (p.detach().clone().requires_grad_() for p in (layer.lora_A, layer.lora_B))
    assert torch.autograd.gradcheck(run, (x, A, B))
    layer(x).sum().backward()
    assert layer.base.weight.grad is None


def test_gradients_of_embedding_agree_with_finite_differences() -> None:
    layer = randomised(LoraEmbedding(nn.Embedding(5, 3), r=2, scale=0.7)).double()
    ids = torch.tensor([[0, 4, 4], [1, 0, 2]])

    def run(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, {"lora_A": a, "lora_B": b}, (ids,))

    A, B = (p.detach().clone().requires_grad_() for p in (layer.lora_A, layer.lora_B))
    assert torch.autograd.gradcheck(run, (A, B))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_compute_is_in_the_dtype_of_the_base_and_masters_stay_float32(dtype: torch.dtype) -> None:
    layers = (
        randomised(LoraLinear(nn.Linear(6, 5, dtype=dtype), r=2, scale=1.0)),
        randomised(LoraEmbedding(nn.Embedding(6, 5, dtype=dtype), r=2, scale=1.0)),
    )
    for layer, x in zip(layers, (torch.randn(3, 6, dtype=dtype), torch.arange(6)), strict=True):
        y = layer(x)
        assert y.dtype == dtype
        y.float().sum().backward()
        assert layer.lora_A.grad is not None
        assert layer.lora_A.grad.dtype == layer.delta().dtype == torch.float32
        assert layer.merged().weight.dtype == dtype


def test_merged_rounds_once() -> None:
    base = nn.Linear(64, 64, dtype=torch.bfloat16)
    layer = randomised(LoraLinear(base, r=4, scale=0.01))
    exact = base.weight.double() + 0.01 * (layer.lora_B.double() @ layer.lora_A.double())
    error = (layer.merged().weight.double() - exact).abs()
    half_a_step = 2.0**-8 * exact.abs() * 1.001 + 1e-12  # bfloat16 keeps 8 significant bits
    assert bool((error <= half_a_step).all())


def test_the_padding_row_receives_no_gradient() -> None:
    layer = randomised(LoraEmbedding(nn.Embedding(5, 3, padding_idx=1), r=2, scale=1.0))
    layer(torch.arange(5)).sum().backward()
    assert layer.lora_A.grad is not None
    assert layer.lora_A.grad.abs().sum(0).bool().tolist() == [True, False, True, True, True]


def test_nothing_writes_the_base() -> None:
    layer = linear(dropout=0.5)
    weight, bias = layer.base.weight.clone(), layer.base.bias.clone()
    layer.train()(torch.randn(3, 6)).sum().backward()
    layer.eval()(torch.randn(3, 6))
    merged = layer.merged()
    merged.weight.data.zero_()
    merged.bias.data.zero_()
    assert torch.equal(layer.base.weight, weight)
    assert torch.equal(layer.base.bias, bias)


def test_dropout_rests_in_eval_and_is_unbiased_in_training() -> None:
    layer = linear(dropout=0.4)
    x = torch.randn(1, 6)
    exact = layer.eval()(x)
    assert_close(exact, layer.merged()(x), atol=1e-5, rtol=1e-5)
    samples = layer.train()(x.expand(40_000, 6))
    error = samples.std(0) / 40_000**0.5
    assert bool((error > 0).all())
    assert bool(((samples.mean(0) - exact[0]).abs() < 4 * error).all())


def test_a_layer_takes_the_mode_of_its_base() -> None:
    assert not LoraLinear(nn.Linear(2, 2).eval(), r=1, scale=1.0).training
    assert not LoraEmbedding(nn.Embedding(2, 2).eval(), r=1, scale=1.0).training


def test_reset_draws_what_peft_draws() -> None:
    layer = LoraLinear(nn.Linear(400, 5), r=50, scale=1.0)
    layer.reset(torch.Generator().manual_seed(3))
    bound = 1 / 400**0.5
    assert float(layer.lora_A.detach().abs().max()) <= bound
    assert float(layer.lora_A.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.02)
    layer.reset(torch.Generator().manual_seed(3), "gaussian")
    assert float(layer.lora_A.detach().std()) == pytest.approx(1 / 50, rel=0.02)
    assert not layer.lora_B.any()


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_an_embedding_starts_gaussian(init: str) -> None:
    layer = LoraEmbedding(nn.Embedding(400, 5), r=50, scale=1.0)
    layer.reset(torch.Generator().manual_seed(3), init)
    assert float(layer.lora_A.detach().std()) == pytest.approx(1 / 50, rel=0.02)
    assert not layer.lora_B.any()


def test_meta_device() -> None:
    layer = LoraLinear(nn.Linear(6, 5, device="meta"), r=2, scale=1.0)
    layer.reset(torch.Generator())
    assert layer(torch.empty(3, 6, device="meta")).shape == (3, 5)
    assert layer.merged().weight.is_meta
    assert "r=2" in repr(layer)

"""int8 products against float64: exact on what int8 can hold, bounded by the rounding elsewhere."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from lorikeet.kernels import Projection, head_nll, int8, native, project, quantize_weight
from lorikeet.kernels.int8 import input_gradient, multiply, quantize_rows

VARIANTS = ["compiled", "compiled, with AMX", "tensor operations"]


@pytest.fixture(params=VARIANTS, autouse=True)
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Panels; torch's product between compiled roundings, as where there is AMX; neither."""
    if request.param == "tensor operations":
        monkeypatch.setattr(native, "missing", lambda: "switched off for a test")
    elif native.missing() is not None:
        pytest.skip(f"no compiled kernels: {native.missing()}")
    elif "AMX" in request.param:
        monkeypatch.setattr(int8, "_has_amx", lambda: True)
    yield request.param


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    size = expected.double().norm().clamp_min(1e-30)  # an empty one has no error
    return float((found.double() - expected.double()).norm() / size)


# T, I, O; among them more tokens than a block has, and edges that no tile, panel or quad fits
SIZES = [(5, 32, 48), (64, 172, 64), (1, 16, 8), (200, 64, 136), (195, 88, 72), (0, 16, 8)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "inputs", "outputs"), SIZES)
def test_products_are_within_the_rounding(
    dtype: torch.dtype, tokens: int, inputs: int, outputs: int
) -> None:
    x = torch.randn(tokens, inputs).to(dtype)
    weight = torch.randn(outputs, inputs).to(dtype)
    dy = torch.randn(tokens, outputs).to(dtype)
    rounded = quantize_weight(weight)
    found = multiply(quantize_rows(x), rounded, dtype=dtype)
    # Each factor is off by at most half of 1/127 of its row's largest entry.
    assert relative(found, x.double() @ weight.double().t()) < 0.02
    assert relative(input_gradient(dy, rounded), dy.double() @ weight.double()) < 0.02


@pytest.mark.parametrize(("tokens", "inputs", "outputs"), SIZES)
def test_integers_come_through_exactly(tokens: int, inputs: int, outputs: int) -> None:
    x = torch.randint(-127, 128, (tokens, inputs)).float()
    weight = torch.randint(-127, 128, (outputs, inputs)).float()
    x[:, 0], weight[:, 0] = 127, 127  # the scale of every row is then 1
    rounded = quantize_weight(weight)
    assert torch.equal(multiply(quantize_rows(x), rounded, dtype=torch.float32), x @ weight.t())
    dy = torch.randint(-127, 128, (tokens, outputs)).float()
    dy[:, 0] = -127
    assert torch.equal(input_gradient(dy, rounded), dy @ weight)


def test_a_sum_at_its_largest_is_exact() -> None:
    """Every product is the largest there is, of either sign: nothing saturates on the way."""
    x = torch.full((7, 4096), 127.0)
    weight = torch.full((3, 4096), 127.0) * torch.tensor([[1.0], [-1.0], [1.0]])
    found = multiply(quantize_rows(x), quantize_weight(weight), dtype=torch.float32)
    assert torch.equal(found, x @ weight.t())
    found = multiply(quantize_rows(-x), quantize_weight(weight), dtype=torch.float32)
    assert torch.equal(found, -x @ weight.t())


def test_a_gradient_can_be_added_to_another() -> None:
    weight = quantize_weight(torch.randn(16, 32))
    dy, plus = torch.randn(4, 16), torch.randn(4, 32)
    found = input_gradient(dy, weight, plus=plus.clone())
    assert torch.allclose(found, input_gradient(dy, weight) + plus, atol=1e-5)


def test_rows_of_zeros_stay_zeros() -> None:
    found = multiply(
        quantize_rows(torch.zeros(3, 16)), quantize_weight(torch.randn(8, 16)), dtype=torch.float32
    )
    assert not found.any()


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_says_so(poison: float) -> None:
    x = torch.randn(3, 40)
    x[1, 37] = poison
    found = multiply(quantize_rows(x), quantize_weight(torch.randn(8, 40)), dtype=torch.float32)
    assert found[1].isnan().all()
    assert found[[0, 2]].isfinite().all()


def test_a_projection_with_an_int8_weight() -> None:
    """Outputs and all gradients are those of the float weight, within the rounding."""
    weights = [torch.randn(24, 32), torch.randn(8, 32)]
    factors = [(torch.randn(4, 32), torch.randn(w.shape[0], 4)) for w in weights]

    def run(rounded: bool) -> list[torch.Tensor]:
        torch.manual_seed(1)
        x = torch.randn(10, 32, requires_grad=True)
        own = [[f.clone().requires_grad_() for f in pair] for pair in factors]
        projections = [
            Projection(w, None, A, B, scale=0.5, rounded=quantize_weight(w) if rounded else None)
            for w, (A, B) in zip(weights, own, strict=True)
        ]
        outputs = project(x, projections)
        (single,) = project(x, projections[:1])
        loss = sum((o * torch.linspace(-1, 1, o.numel()).view_as(o)).sum() for o in outputs)
        gradients = torch.autograd.grad(
            loss + single.square().sum(), [x, *(f for pair in own for f in pair)]
        )
        return [o.detach() for o in (*outputs, single)] + list(gradients)

    errors = [relative(*pair) for pair in zip(run(True), run(False), strict=True)]
    assert max(errors) < 0.03
    assert min(errors[:4]) > 0  # the outputs and the input's gradient did go through int8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_with_an_int8_weight(dtype: torch.dtype) -> None:
    """Logits come from int8, and their gradient goes through the weight itself."""
    hidden, weight = torch.randn(9, 64).to(dtype), (torch.randn(200, 64) / 4).to(dtype)
    targets = torch.randint(200, (9,))

    def run(rounded: int8.Int8Weight | None) -> list[torch.Tensor]:
        x = hidden.clone().requires_grad_()
        nll = head_nll(x, weight, None, targets, rounded=rounded)
        return [nll.detach(), *torch.autograd.grad(nll.sum(), x)]

    errors = map(relative, run(quantize_weight(weight, backward=False)), run(None))
    assert all(0 < error < 0.03 for error in errors)

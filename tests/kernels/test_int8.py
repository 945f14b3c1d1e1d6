"""int8 products against float64: exact on what int8 can hold, bounded by the rounding elsewhere."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from lorikeet.kernels import Projection, native, project, quantize_weight
from lorikeet.kernels.int8 import input_gradient, multiply, quantize_rows

VARIANTS = ["compiled", "tensor operations"]


@pytest.fixture(params=VARIANTS, autouse=True)
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "compiled" and native.missing() is not None:
        pytest.skip(f"no compiled kernels: {native.missing()}")
    if request.param != "compiled":
        monkeypatch.setattr(native, "missing", lambda: "switched off for a test")
    yield request.param


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "inputs", "outputs"), [(5, 32, 48), (64, 172, 64), (1, 16, 8)])
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


def test_integers_come_through_exactly() -> None:
    x = torch.randint(-127, 128, (9, 32)).float()
    weight = torch.randint(-127, 128, (16, 32)).float()
    x[:, 0], weight[:, 0] = 127, 127  # the scale of every row is then 1
    found = multiply(quantize_rows(x), quantize_weight(weight), dtype=torch.float32)
    assert torch.equal(found, x @ weight.t())


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
            Projection(w, None, A, B, 0.5, quantize_weight(w) if rounded else None)
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

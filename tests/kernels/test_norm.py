from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lorikeet.kernels import add_rms_norm, rms_norm

EPS = 1e-5
SHAPES = [(1, 5), (5, 16), (3, 172), (130, 172), (0, 16)]  # the fourth is shared by threads
DTYPES = [torch.float64, torch.float32, torch.bfloat16]

Check = Callable[..., None]
Threads = Callable[[int], None]


def oracle(x: Tensor, weight: Tensor) -> Tensor:
    rows = [weight * row / (row.pow(2).sum() / row.numel() + EPS) ** 0.5 for row in x]
    return torch.stack(rows) if rows else x * weight


def kernel(x: Tensor, weight: Tensor) -> Tensor:
    return rms_norm(x, weight, EPS)


def inputs(rows: int, width: int) -> dict[str, Tensor]:
    x = torch.randn(rows, width, dtype=torch.float64) * 3
    return {"x": x, "weight": 1 + 0.3 * torch.randn(width, dtype=torch.float64)}


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("frozen", [("weight",), ()])
def test_it_is_its_formula(
    check: Check, dtype: torch.dtype, shape: tuple[int, int], frozen: tuple[str, ...]
) -> None:
    check(kernel, oracle, inputs(*shape), dtype=dtype, frozen=frozen)


def test_finite_differences_agree() -> None:
    x, weight = (t.requires_grad_() for t in inputs(3, 5).values())
    assert torch.autograd.gradcheck(kernel, (x, weight))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("frozen", [("weight",), ("x", "weight"), ("delta",), ()])
def test_a_sum_is_normalised_and_handed_on(
    check: Check, dtype: torch.dtype, shape: tuple[int, int], frozen: tuple[str, ...]
) -> None:
    def kernel(x: Tensor, delta: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total, normal = add_rms_norm(x, delta, weight, EPS)
        assert torch.equal(normal.origin.rows(), normal.rows)
        return total, normal.rows

    def exact(x: Tensor, delta: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return x + delta, oracle(x + delta, weight)

    tensors = inputs(*shape)
    tensors["delta"] = torch.randn(shape, dtype=torch.float64)
    check(kernel, exact, tensors, dtype=dtype, frozen=frozen)


@pytest.mark.parametrize("used", [0, 1])
def test_one_of_the_two_outputs_may_go_unused(used: int) -> None:
    x, delta, weight = torch.randn(3, 2, 7, dtype=torch.float64)[:, :1]
    weight = weight[0]
    leaves = [t.clone().requires_grad_() for t in (x, delta)]
    total, normal = add_rms_norm(*leaves, weight, EPS)
    (total, normal.rows)[used].sum().backward()
    own = [t.clone().requires_grad_() for t in (x, delta)]
    (own[0] + own[1], oracle(own[0] + own[1], weight))[used].sum().backward()
    for found, expected in zip(leaves, own, strict=True):
        torch.testing.assert_close(found.grad, expected.grad)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", DTYPES)
def test_small_rows_lean_on_eps(check: Check, dtype: torch.dtype) -> None:
    tensors = inputs(6, 48)
    tensors["x"] *= 1e-3
    tensors["x"][2] = 0
    check(kernel, oracle, tensors, dtype=dtype)


@pytest.mark.usefixtures("way")
def test_rows_that_do_not_lie_together(check: Check) -> None:
    def strided(x: Tensor, weight: Tensor) -> Tensor:
        return kernel(x.t().contiguous().t(), weight)

    check(strided, oracle, inputs(7, 20), dtype=torch.float32)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_what_is_no_number_stays_so(dtype: torch.dtype, bad: float) -> None:
    clean = inputs(4, 37)["x"].to(dtype)
    x = clean.clone()
    x[2, 11] = bad
    x.requires_grad_()
    y = kernel(x, torch.ones(37, dtype=dtype))
    assert not torch.isfinite(y[2, 11])
    if bad != bad:
        assert torch.isnan(y[2]).all()
    others = torch.tensor([0, 1, 3])
    assert torch.equal(y[others], kernel(clean, torch.ones(37, dtype=dtype))[others])
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.isnan(gradient[2]).any()
    assert torch.isfinite(gradient[others]).all()


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_a_gradient_that_is_no_number_stays_so(dtype: torch.dtype) -> None:
    x, weight = (t.to(dtype).requires_grad_() for t in inputs(3, 37).values())
    upstream = torch.ones(3, 37, dtype=dtype)
    upstream[1, 36] = float("nan")
    dx, dweight = torch.autograd.grad(kernel(x, weight), (x, weight), upstream)
    assert torch.isnan(dx).all(1).tolist() == [False, True, False]
    assert torch.isnan(dweight).nonzero().flatten().tolist() == [36]


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_the_number_of_threads_changes_nothing(threads: Threads, dtype: torch.dtype) -> None:
    x, weight = (t.to(dtype).requires_grad_() for t in inputs(130, 172).values())
    upstream = torch.randn(130, 172).to(dtype)
    results = []
    for count in (1, 2):
        threads(count)
        y = kernel(x, weight)
        results.append((y, torch.autograd.grad(y, x, upstream)[0]))
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))

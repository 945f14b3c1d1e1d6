from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lorikeet.kernels import rotate

SHAPES = [(1, 1, 2), (1, 3, 6), (5, 3, 16), (9, 2, 80), (130, 4, 64), (0, 2, 16)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]

Check = Callable[..., None]
Threads = Callable[[int], None]


def angles(tokens: int, size: int) -> Tensor:
    """[T, D / 2], those of tokens 0, 1, 2, ..."""
    rates = 100.0 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    return torch.arange(tokens)[:, None] * rates


def tables(tokens: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    whole = angles(tokens, size).repeat(1, 2)
    return whole.cos().to(dtype), whole.sin().to(dtype)


def oracle(x: Tensor) -> Tensor:
    """Each pair (i, i + D / 2) of every head is turned by its angle."""
    tokens, _, size = x.shape
    turn = torch.polar(torch.ones(tokens, size // 2).double(), angles(tokens, size))
    turned = torch.complex(x[..., : size // 2], x[..., size // 2 :]) * turn[:, None]
    return torch.cat([turned.real, turned.imag], dim=-1)


def kernel(x: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return rotate(x, *tables(x.shape[0], x.shape[2], wide))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_turns_pairs(check: Check, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    check(kernel, oracle, {"x": torch.randn(shape, dtype=torch.float64)}, dtype=dtype)


def test_finite_differences_agree() -> None:
    x = torch.randn(4, 2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(kernel, (x,))


@pytest.mark.usefixtures("way")
def test_heads_that_do_not_lie_together(check: Check) -> None:
    """A slice of a wider product, and tables that are views."""

    def sliced(x: Tensor) -> Tensor:
        cos, sin = (t.t().contiguous().t() for t in tables(5, 16, torch.float32))
        return rotate(torch.cat([x, x], dim=1)[:, 3:], cos, sin)

    check(sliced, oracle, {"x": torch.randn(5, 3, 16).double()}, dtype=torch.float32)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_stays_so(dtype: torch.dtype, bad: float) -> None:
    clean = torch.randn(4, 2, 32).to(dtype)
    x = clean.clone()
    x[2, 1, 5] = bad
    x.requires_grad_()
    y = kernel(x)
    wrong = (~torch.isfinite(y)).nonzero().tolist()
    assert wrong == [[2, 1, 5], [2, 1, 21]]  # its pair, and nothing else
    finite = torch.isfinite(y)
    assert torch.equal(y[finite], kernel(clean)[finite])
    (gradient,) = torch.autograd.grad(y, x, torch.full_like(y, bad))
    assert not torch.isfinite(gradient[2:]).any()  # no angle but that of token 0 is a multiple of π


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_the_number_of_threads_changes_nothing(threads: Threads, dtype: torch.dtype) -> None:
    x = torch.randn(130, 4, 64).to(dtype).requires_grad_()
    results = []
    for count in (1, 2):
        threads(count)
        y = kernel(x)
        results.append((y, torch.autograd.grad(y, x, torch.ones_like(y))[0]))
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))

"""Products with adapters' factors against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lorikeet.kernels import Dropout, low_rank

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}
RANKS = [(16,), (4,), (1,), (3, 5), (8, 16, 8), (64,), (7, 130)]
SIZES = [(0, 32), (1, 16), (5, 48), (6, 7), (67, 172), (130, 576)]  # T, n: edges of every tile
DROPOUTS = [None, Dropout(0.3, 17)]

pytestmark = [
    pytest.mark.usefixtures("way"),
    pytest.mark.parametrize("size", SIZES),
    pytest.mark.parametrize("ranks", RANKS),
    pytest.mark.parametrize("dropout", DROPOUTS),
]

Size = tuple[int, int]
Ranks = tuple[int, ...]


def factors(ranks: Ranks, n: int, dtype: torch.dtype) -> list[Tensor]:
    """Masters: float32 beside bfloat16; the second and every other is a transposed view."""
    wide = torch.promote_types(dtype, torch.float32)
    return [
        torch.randn(r, n, dtype=wide) if i % 2 == 0 else torch.randn(n, r, dtype=wide).t()
        for i, r in enumerate(ranks)
    ]


def masked(x: Tensor, dropout: Dropout | None) -> Tensor:
    ones = torch.ones_like(x, dtype=torch.float64)
    return x.double() * (dropout(ones) if dropout else ones)


def agrees(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    error = (found.double() - expected).norm()
    return found.shape == expected.shape and bool(error <= TOLERANCE[dtype] * expected.norm())


@pytest.mark.parametrize("dtype", DTYPES)
def test_into_the_low_rank(
    size: Size, ranks: Ranks, dropout: Dropout | None, dtype: torch.dtype
) -> None:
    x = torch.randn(size).to(dtype)
    own = factors(ranks, size[1], dtype)
    expected = 1.7 * masked(x, dropout) @ torch.cat(own).double().t()
    assert agrees(low_rank.narrow(x, own, scale=1.7, dropout=dropout), expected, dtype)
    room = torch.full((size[0], sum(ranks) + 5), 9.0, dtype=dtype)
    low_rank.narrow(x, own, scale=1.7, dropout=dropout, out=room[:, 2:-3])
    assert agrees(room[:, 2:-3], expected, dtype)
    assert (room[:, :2] == 9).all() and (room[:, -3:] == 9).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_out_of_the_low_rank(
    size: Size, ranks: Ranks, dropout: Dropout | None, dtype: torch.dtype
) -> None:
    y = torch.randn(size).to(dtype)
    x = torch.randn(size[0], sum(ranks) + 5).to(dtype)[:, 2:-3]  # a slice, beside other numbers
    own = factors(ranks, size[1], dtype)
    update = masked(x.double() @ torch.cat(own).double() * 1.7, dropout)
    expected = y.double() + update
    low_rank.widen_(y, x, own, scale=1.7, dropout=dropout)
    assert agrees(y, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_over_the_tokens(
    size: Size, ranks: Ranks, dropout: Dropout | None, dtype: torch.dtype
) -> None:
    wide = torch.randn(size).to(dtype)
    x = torch.randn(size[0], sum(ranks) + 5).to(dtype)[:, 2:-3]
    expected = 1.7 * x.double().t() @ masked(wide, dropout)
    assert agrees(low_rank.outer(x, wide, scale=1.7, dropout=dropout), expected, dtype)
    if dropout is None:
        found = low_rank.outer_transposed(x, wide, scale=1.7)
        assert found.is_contiguous()
        assert agrees(found, expected.t(), dtype)


def test_the_number_of_threads_changes_nothing(
    size: Size,
    ranks: Ranks,
    dropout: Dropout | None,
    threads: Callable[[int], None],
) -> None:
    wide, x = torch.randn(size).bfloat16(), torch.randn(size[0], sum(ranks)).bfloat16()
    own = factors(ranks, size[1], torch.bfloat16)
    results = []
    for count in (1, 2):
        threads(count)
        y = wide.clone()
        low_rank.widen_(y, x, own, dropout=dropout)
        low = low_rank.narrow(wide, own, dropout=dropout)
        results.append((y, low, low_rank.outer(x, wide, dropout=dropout)))
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from lorikeet.kernels import Dropout, native

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
KEYS = [0, 1, 0x9E3779B1, 0xFFFFFFFF]
MANY = (500, 301)  # more than a thread takes alone, and no whole number of vectors

Threads = Callable[[int], None]


def kept(p: float, key: int, shape: tuple[int, ...] = MANY) -> Tensor:
    """Which elements of a float32 tensor stay."""
    return Dropout(p, key)(torch.ones(shape)) != 0


def standard_error(p: float, n: int) -> float:
    return (p * (1 - p) / n) ** 0.5


def lowbias32(number: int) -> int:
    """https://nullprogram.com/blog/2018/07/31, the last version of the hash."""
    number ^= number >> 16
    number = number * 0x7FEB352D % 2**32
    number ^= number >> 15
    number = number * 0x846CA68B % 2**32
    return number ^ number >> 16


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("p", [0.0, 0.05, 0.5, 0.9])
def test_what_is_kept_is_written_down(p: float, key: int) -> None:
    expected = [lowbias32(i ^ key) >= p * 2**32 for i in range(301)]
    assert kept(p, key, (301,)).tolist() == expected
    assert torch.equal(kept(p, key, (43, 7)).flatten(), kept(p, key, (301,)))


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9])
def test_both_ways_drop_the_same(
    p: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    ones = torch.ones(MANY, dtype=dtype)
    here = [Dropout(p, key)(ones) for key in KEYS]
    monkeypatch.setattr(native, "missing", lambda: "the test wants tensor operations")
    assert all(torch.equal(y, Dropout(p, key)(ones)) for y, key in zip(here, KEYS, strict=True))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_the_share_of_what_is_dropped(p: float, key: int) -> None:
    dropped = ~kept(p, key)
    n = dropped.numel()
    assert abs(dropped.double().mean() - p) < 4 * standard_error(p, n)
    neighbours = dropped.flatten()[1:] & dropped.flatten()[:-1]
    assert abs(neighbours.double().mean() - p * p) < 4 * standard_error(p * p, n)
    above = dropped[1:] & dropped[:-1]
    assert abs(above.double().mean() - p * p) < 4 * standard_error(p * p, n)


@pytest.mark.usefixtures("way")
def test_masks_of_different_keys_have_nothing_in_common() -> None:
    masks = [~kept(0.3, key) for key in (*KEYS, 2, 3, 1 << 20)]
    for one, other in [*pairwise(masks), (masks[0], masks[-1])]:
        both = (one & other).double().mean()
        assert abs(both - 0.09) < 4 * standard_error(0.09, one.numel())


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9])
def test_what_is_kept_is_scaled(p: float, dtype: torch.dtype) -> None:
    x = torch.randn(40, 37).to(dtype)
    dropout = Dropout(p, 7)
    y = dropout(x)
    mask = kept(p, 7, (40, 37))
    assert y.dtype == dtype
    assert not y[~mask].any()
    step = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(y[mask].double(), x[mask].double() / (1 - p), rtol=step, atol=0)
    assert torch.equal(dropout(x), y)
    assert torch.equal(Dropout(p, 7)(x), y)


@pytest.mark.usefixtures("way")
def test_the_layout_in_memory_says_nothing() -> None:
    x = torch.randn(40, 37)
    y = torch.zeros(40, 37)
    expected = Dropout(0.4, 5)(x)
    turned = x.t().contiguous().t()
    torch.testing.assert_close(Dropout(0.4, 5)(turned), expected)
    torch.testing.assert_close(Dropout(0.4, 5).add_(y, turned), expected)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (40, 37), MANY, (0, 16)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)]
)
def test_adding_is_the_transpose(
    dtype: torch.dtype, tolerance: float, shape: tuple[int, int]
) -> None:
    x, y = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    dropout = Dropout(0.3, 11)
    forth = (dropout(x).double() * y.double()).sum()
    back = (x.double() * dropout.add_(torch.zeros_like(y), y).double()).sum()
    scale = x.double().norm() * y.double().norm()
    assert abs(forth - back) <= tolerance * scale

    into = torch.randn(shape).to(dtype)
    sum_ = into.double() + dropout(x).double()
    assert dropout.add_(into, x) is into
    torch.testing.assert_close(into.double(), sum_, rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("way")
def test_the_number_of_threads_changes_nothing(threads: Threads) -> None:
    x = torch.randn(MANY)
    results = []
    for count in (1, 2):
        threads(count)
        results.append(Dropout(0.3, 3)(x))
    assert torch.equal(*results)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("key", KEYS)
def test_a_key_may_be_a_tensor(key: int, dtype: torch.dtype) -> None:
    x = torch.randn(MANY, dtype=dtype)
    signed = key - 2**32 if key >= 2**31 else key
    own, other = Dropout(0.3, key), Dropout(0.3, torch.tensor(signed, dtype=torch.int32))
    assert torch.equal(own(x), other(x))
    assert torch.equal(own.add_(x.clone(), x), other.add_(x.clone(), x))

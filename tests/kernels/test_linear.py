from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from lorikeet.kernels import Dropout, Projection, add_rms_norm, project

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
SCALES = (0.5, 2.0, 1.7)

Check = Callable[..., None]

# Ranks of the adapters of maps that share an input, None without an adapter.
RANKS: list[tuple[int | None, ...]] = [
    (None,),
    (4,),
    (1,),
    (4, 4),
    (None, 3),
    (8, 2),
    (None, None, None),
    (4, None, 4),
    (3, 1, 16),
    (16,),
    (16, 32),  # ranks that the compiled gradients of factors take
]
SIZES = [
    (1, 5, 7),
    (5, 172, 48),
    (33, 16, 172),
    (0, 16, 8),
    (131, 96, 80),
]  # T, I, O of the first map


def inputs(
    ranks: Sequence[int | None],
    sizes: tuple[int, int, int],
    *,
    bias: bool = False,
    gain: bool = False,
) -> dict[str, Tensor | None]:
    """float64 tensors by name; map i has sizes of its own: I to O + 3 i."""
    tokens, width, out = sizes
    tensors: dict[str, Tensor | None] = {"x": torch.randn(tokens, width)}
    for i, r in enumerate(ranks):
        rows = out + 3 * i
        tensors[f"weight{i}"] = torch.randn(rows, width) / width**0.5
        tensors[f"bias{i}"] = torch.randn(rows) if bias else None
        tensors[f"A{i}"] = None if r is None else torch.randn(r, width) / width**0.5
        tensors[f"B{i}"] = None if r is None else torch.randn(rows, r)
        tensors[f"gain{i}"] = torch.rand(rows) + 0.5 if gain and r is not None else None
    return {name: None if t is None else t.double() for name, t in tensors.items()}


def maps(tensors: dict[str, Tensor | None]) -> list[tuple[Tensor | None, ...]]:
    """(weight, bias, A, B, gain) of every map."""
    count = sum(name.startswith("weight") for name in tensors)
    return [tuple(tensors[f"{part}{i}"] for part in PARTS) for i in range(count)]


PARTS = ("weight", "bias", "A", "B", "gain")


def kernel(dropout: Dropout | None = None) -> Callable[..., tuple[Tensor, ...]]:
    def run(x: Tensor, **tensors: Tensor | None) -> tuple[Tensor, ...]:
        all_maps = zip(maps(tensors), SCALES, strict=False)
        projections = [Projection(*parts, scale=scale) for parts, scale in all_maps]
        return project(x, projections, dropout=dropout)

    return run


def oracle(mask: Tensor | float = 1.0) -> Callable[..., list[Tensor]]:
    def run(x: Tensor, **tensors: Tensor | None) -> list[Tensor]:
        outputs = []
        for (weight, bias, A, B, gain), scale in zip(maps(tensors), SCALES, strict=False):
            y = x @ weight.T
            if A is not None:
                y = y + scale * (x * mask @ A.T @ B.T)
            if gain is not None:  # what passes the mask is scaled, the rest is as it was
                y = y + (gain - 1) * (x * mask @ (weight + scale * B @ A).T)
            outputs.append(y if bias is None else y + bias)
        return outputs

    return run


def named(tensors: dict[str, Tensor | None], *parts: str) -> list[str]:
    return [name for name in tensors if name.rstrip("0123456789") in parts]


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_its_formula(
    check: Check, dtype: torch.dtype, ranks: Sequence[int | None], sizes: tuple[int, int, int]
) -> None:
    """Once with frozen weights and no bias, once with all that can be there, all of it trained."""
    tensors = inputs(ranks, sizes)
    options = {"dtype": dtype, "masters": named(tensors, "A", "B")}
    check(kernel(), oracle(), tensors, **options, frozen=named(tensors, "weight"))
    tensors = inputs(ranks, sizes, bias=True)
    check(kernel(), oracle(), tensors, **options)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("ranks", [r for r in RANKS if any(r)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_is_a_mask_on_the_input_of_all_adapters(
    check: Check, dtype: torch.dtype, ranks: Sequence[int | None], p: float
) -> None:
    tensors = inputs(ranks, (33, 172, 16), bias=True)
    dropout = Dropout(p, 123)
    mask = dropout(torch.ones(33, 172, dtype=torch.float64))
    check(
        kernel(dropout),
        oracle(mask),
        tensors,
        dtype=dtype,
        masters=named(tensors, "A", "B"),
        frozen=named(tensors, "weight", "bias"),
    )


@pytest.mark.parametrize("dropout", [None, Dropout(0.4, 9)])
@pytest.mark.parametrize("ranks", [(None,), (2,), (2, None, 1)])
def test_finite_differences_agree(ranks: Sequence[int | None], dropout: Dropout | None) -> None:
    tensors = inputs(ranks, (3, 5, 4), bias=True, gain=True)
    names = [name for name, t in tensors.items() if t is not None]

    def run(*values: Tensor) -> tuple[Tensor, ...]:
        return kernel(dropout)(**{**tensors, **dict(zip(names, values, strict=True))})

    assert torch.autograd.gradcheck(run, [tensors[n].requires_grad_() for n in names])


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("p", [None, 0.0, 0.3])
@pytest.mark.parametrize("ranks", [r for r in RANKS if any(r)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gains(
    check: Check, dtype: torch.dtype, ranks: Sequence[int | None], p: float | None
) -> None:
    dropout = None if p is None else Dropout(p, 123)
    mask = dropout(torch.ones(33, 172, dtype=torch.float64)) if dropout else 1.0
    for bias, frozen in ((False, ["weight"]), (True, [])):
        tensors = inputs(ranks, (33, 172, 16), bias=bias, gain=True)
        check(
            kernel(dropout),
            oracle(mask),
            tensors,
            dtype=dtype,
            masters=named(tensors, "A", "B", "gain"),
            frozen=named(tensors, *frozen),
        )


TRAINED = [("gain",), ("A",), ("B",), ("x",), ("weight",), ("bias",), ("A", "B"), ("x", "weight")]


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(
    ("ranks", "trained"),
    [(ranks, parts) for ranks in ((4,), (4, 2, 3)) for parts in TRAINED],
)
def test_any_part_can_be_trained_alone(
    check: Check, ranks: Sequence[int], trained: tuple[str, ...]
) -> None:
    tensors = inputs(ranks, (9, 20, 12), bias=True, gain="gain" in trained)
    frozen = [name for name in tensors if name not in named(tensors, *trained)]
    check(kernel(), oracle(), tensors, dtype=torch.float32, frozen=frozen)


@pytest.mark.parametrize("r", [None, 2])
def test_a_frozen_weight_costs_no_product(flops: Callable[..., int], r: int | None) -> None:
    tensors = inputs((r,), (9, 20, 12))

    def backward(*trained: str) -> int:
        """What the gradients of these cost."""
        leaves = [tensors[name].detach().requires_grad_() for name in trained]
        (y,) = kernel()(**{**tensors, **dict(zip(trained, leaves, strict=True))})
        return flops(lambda: torch.autograd.grad(y, leaves, torch.ones_like(y)))

    dense = 2 * 9 * 20 * 12
    down, up = 2 * 9 * 20 * (r or 0), 2 * 9 * (r or 0) * 12  # products with A and with B
    assert backward("x") == dense + down + up
    assert dense <= backward("weight0") <= dense + up
    assert backward("x", "weight0") == 2 * dense + down + up
    if r is not None:
        assert backward("A0", "B0") == 2 * up + down
        assert backward("x", "A0", "B0") == dense + 2 * up + 2 * down


def test_an_output_that_nobody_used() -> None:
    tensors = inputs((2, 3), (4, 6, 5))
    for tensor in tensors.values():
        if tensor is not None:
            tensor.requires_grad_()
    leaves = [t for t in tensors.values() if t is not None]
    found = torch.autograd.grad(kernel()(**tensors)[1].sum(), leaves)
    expected = torch.autograd.grad(
        oracle()(**tensors)[1].sum(), leaves, allow_unused=True, materialize_grads=True
    )
    torch.testing.assert_close(found, expected)


def test_gradients_that_do_not_lie_together() -> None:
    tensors = inputs((2,), (4, 6, 5))
    tensors["x"].requires_grad_()
    upstream = torch.randn(5, 4, dtype=torch.float64).t()
    found = torch.autograd.grad(kernel()(**tensors), tensors["x"], upstream)
    expected = torch.autograd.grad(oracle()(**tensors), tensors["x"], upstream)
    torch.testing.assert_close(found, expected)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_what_is_no_number_stays_so(dtype: torch.dtype) -> None:
    tensors = inputs((4, None), (6, 20, 12))
    given = {name: None if t is None else t.to(dtype) for name, t in tensors.items()}
    clean = kernel()(**given)
    given["x"][2, 5] = float("nan")
    given["x"].requires_grad_()
    for y, before in zip(kernel(Dropout(0.5, 1))(**given), clean, strict=True):
        assert torch.isnan(y).all(1).tolist() == [False, False, True, False, False, False]
        assert torch.isfinite(y[3:]).all()
        assert y.shape == before.shape


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout", [None, Dropout(0.3, 5)])
def test_normalised_rows_need_not_be_kept(dtype: torch.dtype, dropout: Dropout | None) -> None:
    """The same bits, whether the rows are kept or made again."""
    tensors = inputs((16, None, 4), (33, 48, 32), bias=True)
    given = {name: None if t is None else t.to(dtype) for name, t in tensors.items()}
    found = []
    for kept in (True, False):
        leaves = {n: t.clone().requires_grad_() for n, t in given.items() if t is not None}
        _, normal = add_rms_norm(leaves["x"], None, torch.ones(48, dtype=dtype), 1e-5)
        parts = {n: leaves.get(n) for n in tensors if n != "x"}
        outputs = kernel(dropout)(normal.rows if kept else normal, **parts)
        total = sum(y.float().square().sum() for y in outputs)
        found.append([*outputs, *torch.autograd.grad(total, list(leaves.values()))])
    assert all(torch.equal(kept, again) for kept, again in zip(*found, strict=True))

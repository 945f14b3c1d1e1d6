from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from lorikeet.kernels import Dropout, Projection, gated_mlp

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
TOLERANCE = {torch.bfloat16: 2e-2}  # four rounded products, one after the other
SCALES = {"gate": 0.5, "up": 2.0, "down": 1.7}
WEIGHTS = ["weight_gate", "weight_up", "weight_down"]
RANKS = [
    (4, 4, 4),
    (None, None, None),
    (3, None, 5),
    (None, 2, None),
    (None, None, 4),
    (16, 16, 16),
]
SIZES = [(1, 172, 48), (5, 172, 48), (130, 16, 172), (0, 16, 8), (37, 48, 80)]  # T, I, M

Check = Callable[..., None]
Drops = tuple[Dropout | None, Dropout | None]
Threads = Callable[[int], None]


def inputs(
    ranks: Sequence[int | None],
    sizes: tuple[int, int, int],
    *,
    bias: bool = False,
    gain: bool = False,
) -> dict[str, Tensor | None]:
    tokens, width, inner = sizes
    tensors: dict[str, Tensor | None] = {"x": torch.randn(tokens, width)}
    for name, r in zip(SCALES, ranks, strict=True):
        fan_in, fan_out = (inner, width) if name == "down" else (width, inner)
        tensors[f"weight_{name}"] = torch.randn(fan_out, fan_in) / fan_in**0.5
        tensors[f"bias_{name}"] = torch.randn(fan_out) if bias else None
        tensors[f"A_{name}"] = None if r is None else torch.randn(r, fan_in) / fan_in**0.5
        tensors[f"B_{name}"] = None if r is None else torch.randn(fan_out, r)
        tensors[f"gain_{name}"] = torch.rand(fan_out) + 0.5 if gain and r is not None else None
    return {name: None if t is None else t.double() for name, t in tensors.items()}


def parts(tensors: dict[str, Tensor | None], name: str) -> tuple[Tensor | None, ...]:
    return tuple(tensors[f"{part}_{name}"] for part in ("weight", "bias", "A", "B", "gain"))


def masters(tensors: dict[str, Tensor | None]) -> list[str]:
    return [name for name in tensors if name.startswith(("A_", "B_", "gain_"))]


def kernel(dropout: Drops = (None, None)) -> Callable[..., Tensor]:
    def run(x: Tensor, **tensors: Tensor | None) -> Tensor:
        gate, up, down = (Projection(*parts(tensors, name), scale=SCALES[name]) for name in SCALES)
        return gated_mlp(x, gate, up, down, dropout=dropout)

    return run


def oracle(outer: Tensor | float = 1.0, inner: Tensor | float = 1.0) -> Callable[..., Tensor]:
    def run(x: Tensor, **tensors: Tensor | None) -> Tensor:
        def linear(name: str, x: Tensor, mask: Tensor | float) -> Tensor:
            weight, bias, A, B, gain = parts(tensors, name)
            y = x @ weight.T if bias is None else x @ weight.T + bias
            y = y if A is None else y + SCALES[name] * (x * mask @ A.T @ B.T)
            if gain is None:
                return y
            return y + (gain - 1) * (x * mask @ (weight + SCALES[name] * B @ A).T)

        gate, up = linear("gate", x, outer), linear("up", x, outer)
        return linear("down", gate / (1 + torch.exp(-gate)) * up, inner)

    return run


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_its_formula(
    check: Check, dtype: torch.dtype, ranks: Sequence[int | None], sizes: tuple[int, int, int]
) -> None:
    """Once with frozen weights and no bias, once with all that can be there, all of it trained."""
    tensors = inputs(ranks, sizes)
    options = {"dtype": dtype, "masters": masters(tensors), "tolerance": TOLERANCE.get(dtype)}
    check(kernel(), oracle(), tensors, **options, frozen=WEIGHTS)
    tensors = inputs(ranks, sizes, bias=True, gain=True)
    check(kernel(), oracle(), tensors, **{**options, "masters": masters(tensors)})


DROPS: list[Drops] = [
    (Dropout(0.3, 1), Dropout(0.3, 2)),
    (Dropout(0.5, 3), None),
    (None, Dropout(0.1, 4)),
    (Dropout(0.0, 5), Dropout(0.0, 6)),
]


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("gain", [False, True])
@pytest.mark.parametrize("dropout", DROPS)
@pytest.mark.parametrize("ranks", [(4, 4, 4), (3, None, 5)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_is_a_mask_on_the_inputs_of_the_adapters(
    check: Check, dtype: torch.dtype, ranks: Sequence[int | None], dropout: Drops, gain: bool
) -> None:
    sizes = (33, 48, 172)
    ones = (torch.ones(33, width, dtype=torch.float64) for width in sizes[1:])
    masks = [d(x) if d else 1.0 for d, x in zip(dropout, ones, strict=True)]
    tensors = inputs(ranks, sizes, gain=gain)
    check(
        kernel(dropout),
        oracle(*masks),
        tensors,
        dtype=dtype,
        masters=masters(tensors),
        frozen=WEIGHTS,
        tolerance=TOLERANCE.get(dtype),
    )


@pytest.mark.parametrize("dropout", [(None, None), DROPS[0]])
@pytest.mark.parametrize("ranks", [(None, None, None), (2, 1, 2)])
def test_finite_differences_agree(ranks: Sequence[int | None], dropout: Drops) -> None:
    tensors = inputs(ranks, (3, 4, 5), bias=True)
    names = [name for name, t in tensors.items() if t is not None]

    def run(*values: Tensor) -> Tensor:
        return kernel(dropout)(**{**tensors, **dict(zip(names, values, strict=True))})

    assert torch.autograd.gradcheck(run, [tensors[n].requires_grad_() for n in names])


TRAINED = ["x", "weight_up", "bias_gate", "A_gate", "B_up", "A_down", "B_down"]


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("trained", TRAINED)
def test_any_part_can_be_trained_alone(check: Check, trained: str) -> None:
    tensors = inputs((4, 2, 3), (9, 20, 12), bias=True)
    frozen = [name for name in tensors if name != trained]
    check(kernel(), oracle(), tensors, dtype=torch.float32, frozen=frozen)


def test_frozen_weights_cost_no_product(flops: Callable[..., int]) -> None:
    tensors = inputs((None, None, None), (9, 20, 12))
    tensors["x"].requires_grad_()
    y = kernel()(**tensors)
    assert flops(y.sum().backward) == 3 * 2 * 9 * 20 * 12
    assert all(t is None or t.grad is None for name, t in tensors.items() if name != "x")


def gates(values: Sequence[float], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """silu of the values, and its slope there, out of the kernel with matrices that do nothing."""
    x = torch.tensor([[v, 1.0] for v in values], dtype=dtype, requires_grad=True)
    pick = torch.eye(2, dtype=dtype)
    gate = Projection(pick[:1])
    up = Projection(pick[1:])
    down = Projection(pick[:, :1])
    y = gated_mlp(x, gate, up, down)
    return y[:, 0], torch.autograd.grad(y[:, 0].sum(), x)[0][:, 0]


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_gates_far_from_zero(dtype: torch.dtype) -> None:
    """Where the sigmoid underflows or is 1; 1e30 is beyond what its exponential can hold."""
    values = [-1e30, -1e10, -1e4, -200, -90, -88, -87, -20, 20, 87, 88, 89, 1e4, 1e10, 1e30]
    y, slope = gates(values, dtype)
    x = torch.tensor(values, dtype=dtype).double().requires_grad_()
    exact = torch.nn.functional.silu(x)
    exact_slope = torch.autograd.grad(exact.sum(), x)[0]
    rtol = 1e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(y.double(), exact, rtol=rtol, atol=1e-35)
    torch.testing.assert_close(slope.double(), exact_slope, rtol=rtol, atol=1e-35)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_gates_that_are_no_number(dtype: torch.dtype, bad: float) -> None:
    y, slope = gates([1.0, bad, 2.0], dtype)
    assert torch.isfinite(y).tolist() == [True, False, True]
    assert torch.isfinite(slope[[0, 2]]).all()
    assert torch.isnan(slope[1]) or bad > 0  # at +inf the slope is 1 or, as PyTorch has it, NaN


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_what_is_no_number_stays_so(dtype: torch.dtype) -> None:
    tensors = inputs((4, 4, 4), (6, 20, 12))
    given = {name: None if t is None else t.to(dtype) for name, t in tensors.items()}
    given["x"][2, 5] = float("nan")
    for tensor in given.values():
        if tensor is not None:
            tensor.requires_grad_()
    y = kernel(DROPS[0])(**given)
    assert torch.isnan(y)[2].all()
    others = torch.tensor([0, 1, 3, 4, 5])
    assert torch.isfinite(y[others]).all()
    dx, dA = torch.autograd.grad(y.sum(), [given["x"], given["A_down"]])
    assert torch.isfinite(dx[others]).all()
    assert torch.isnan(dx[2]).all()
    assert torch.isnan(dA).any()


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_the_number_of_threads_changes_nothing(threads: Threads, dtype: torch.dtype) -> None:
    """Down is the identity, so that no product but that of the gates has many elements."""
    x = torch.randn(130, 4).to(dtype).requires_grad_()
    weights = [torch.randn(172, 4).to(dtype) for _ in range(2)]
    down = Projection(torch.eye(4, 172).to(dtype))
    results = []
    for count in (1, 2):
        threads(count)
        y = gated_mlp(x, *map(Projection, weights), down)
        results.append((y, torch.autograd.grad(y, x, torch.ones_like(y))[0]))
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))

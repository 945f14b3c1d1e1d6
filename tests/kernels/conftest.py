"""Both ways of running the kernels, and the comparison of each with its oracle in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lorikeet.kernels import native

Inputs = Mapping[str, Tensor | None]
Kernel = Callable[..., Tensor | Sequence[Tensor]]

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Relative, of a tensor's norm."""


@pytest.fixture(params=["compiled", "tensor operations"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test with the compiled kernels and without."""
    if request.param == "compiled":
        reason = native.missing()
        if reason is not None:
            pytest.skip(f"no compiled kernels: {reason}")
    else:
        monkeypatch.setattr(native, "missing", lambda: "the test wants tensor operations")
    return request.param


@pytest.fixture
def compiled() -> None:
    """Skip a test where there are no compiled kernels."""
    reason = native.missing()
    if reason is not None:
        pytest.skip(f"no compiled kernels: {reason}")


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """`torch.set_num_threads`, undone at the end."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def flops() -> Callable[[Callable[[], object]], int]:
    """Count the floating-point operations of all matrix products that a function makes."""

    def in_place(_: torch.Size, a: torch.Size, b: torch.Size, **options: object) -> int:
        return 2 * a[0] * a[1] * b[1]

    def count(function: Callable[[], object]) -> int:
        in_place_too = {torch.ops.aten.addmm_: in_place}  # which PyTorch's counter passes over
        with FlopCounterMode(display=False, custom_mapping=in_place_too) as counter:
            function()
        return counter.get_total_flops()

    return count


@pytest.fixture(scope="session")
def check() -> Callable[..., None]:
    """Compare a kernel with its oracle: outputs, gradients, and that it keeps its hands off."""
    return _check


def _check(
    kernel: Kernel,
    oracle: Kernel,
    inputs: Inputs,
    *,
    dtype: torch.dtype,
    masters: Sequence[str] = (),
    frozen: Sequence[str] = (),
    upstream: Sequence[Tensor] | None = None,
    tolerance: float | None = None,
) -> None:
    """Run both on the same numbers, the kernel in `dtype` and the oracle in float64.

    Args:
        kernel: takes the inputs by name, returns a tensor or several.
        oracle: the same in plain differentiable operations.
        inputs: float64 tensors, rounded to `dtype` here; None is passed on.
        dtype: what the kernel computes in.
        masters: inputs that are float32 where `dtype` is bfloat16; rounded all the same, so that
            what the kernel rounds them to is what the oracle has.
        frozen: inputs that need no gradient.
        upstream: gradients of the outputs, else random ones.
        tolerance: instead of the dtype's own.
    """
    tolerance = TOLERANCE[dtype] if tolerance is None else tolerance
    names = [name for name, x in inputs.items() if x is not None and name not in frozen]
    given = {name: None if x is None else x.to(dtype) for name, x in inputs.items()}
    wide = {name: None if x is None else x.double() for name, x in given.items()}
    for name in masters:
        x = given[name]
        given[name] = x.float() if x is not None and dtype == torch.bfloat16 else x
    untouched = {name: None if x is None else x.clone() for name, x in given.items()}
    for group in (given, wide):
        for name in names:
            group[name].requires_grad_()

    outputs, expected = _tuple(kernel(**given)), _tuple(oracle(**wide))
    assert len(outputs) == len(expected)
    for number, (found, exact) in enumerate(zip(outputs, expected, strict=True)):
        assert_near(found, exact, tolerance, f"output {number}")
    if upstream is None:
        upstream = [torch.randn(y.shape, dtype=torch.float64) for y in expected]
    rounded = [g.to(y.dtype) for g, y in zip(upstream, outputs, strict=True)]
    leaves = [given[name] for name in names]
    gradients = torch.autograd.grad(outputs, leaves, rounded, retain_graph=True)
    exact_gradients = torch.autograd.grad(
        expected, [wide[name] for name in names], [g.double() for g in rounded]
    )
    for name, found, exact in zip(names, gradients, exact_gradients, strict=True):
        assert found.dtype == given[name].dtype
        assert_near(found, exact, tolerance, f"gradient of {name}")

    # A second backward pass finds everything as the first one did.
    for found, again in zip(gradients, torch.autograd.grad(outputs, leaves, rounded), strict=True):
        assert torch.equal(found, again)
    for name, x in given.items():
        assert x is None or torch.equal(x, untouched[name]), f"{name} was written"


def assert_near(found: Tensor, exact: Tensor, tolerance: float, what: str) -> None:
    assert found.shape == exact.shape, what
    error = (found.detach().double() - exact.detach()).norm()
    assert error <= tolerance * exact.detach().norm(), f"{what}: {error / exact.norm():.1e} off"


def _tuple(outputs: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)

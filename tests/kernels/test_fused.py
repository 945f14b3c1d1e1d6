"""What TorchInductor makes of the kernels, compiled for the CPU in place of a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor

from lorikeet.kernels import Dropout, dropout, fused, loss, mlp, native, norm, rope

# The compiler takes its time, and warns of what is in itself.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def _inductor(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(native, "missing", lambda: "the test wants Inductor")
    reason = fused.missing("cpu")
    if reason is not None:
        pytest.skip(f"nothing can be compiled here: {reason}")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def _cases(t: int, dtype: torch.dtype) -> dict[str, tuple[Callable[..., Any], list[Any]]]:
    """Every fused function, and arguments for T tokens."""
    wide = torch.promote_types(dtype, torch.float32)
    x, y, z = (random(t, 48 + 2 * i, dtype=dtype)[:, :48].contiguous() for i in range(3))
    weight, rstd = random(48, dtype=dtype), random(t, dtype=wide).abs()
    heads, angles = random(t, 3, 16, dtype=dtype), random(t, 16, dtype=wide)
    logits, targets = random(t, 61, dtype=dtype), torch.arange(t) % 63 - 2
    key = torch.tensor(-5, dtype=torch.int32)
    return {
        "add norm": (norm._add_norm, [x, y, weight, 1e-5]),
        "norm": (norm._norm, [x, weight, 1e-5]),
        "norm gradient": (norm._norm_gradient, [x, y, weight, rstd, z]),
        "last norm gradient": (norm._norm_gradient, [x, y, weight, rstd, None]),
        "gated": (mlp._gated, [x, y]),
        "gated gradients": (mlp._gated_gradients, [x, y, z]),
        "turned": (rope._turned, [heads, angles, angles, 1.0]),
        "turned back": (rope._turned, [heads, angles, angles, -1.0]),
        "masked": (dropout._masked, [x, key, 0.3]),
        "added": (dropout._add_masked_, [x, y, key, 0.3]),
        "nll": (loss._nll, [logits, targets.clamp(max=60)]),
        "nll and gradient": (loss._in_two_passes_, [logits, targets.clamp(max=60)]),
    }


def _outcome(function: Callable[..., Any], arguments: list[Any]) -> list[Tensor]:
    """What it returns, and what it made of its arguments."""
    given = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
    found = function(*given)
    outputs = [found] if isinstance(found, Tensor) else list(found)
    return [t.double() for t in (*outputs, *given) if isinstance(t, Tensor)]


@pytest.mark.usefixtures("_inductor")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", _cases(3, torch.float32))
def test_compiled_it_is_the_same(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over several lengths, which are compiled for twice at most: for one, and for any."""
    compiled = torch._dynamo.utils.counters["stats"]
    monkeypatch.setattr(fused, "DEVICES", {"cpu"})
    before = compiled["unique_graphs"]
    for t in (64, 33, 200, 7, 65):
        function, arguments = _cases(t, dtype)[name]
        found = _outcome(function, arguments)
        monkeypatch.setattr(fused, "DEVICES", set())
        expected = _outcome(function, arguments)
        monkeypatch.setattr(fused, "DEVICES", {"cpu"})
        for own, exact in zip(found, expected, strict=True):
            tolerance = 1e-5 if dtype == torch.float32 else 1e-2
            assert (own - exact).norm() <= tolerance * exact.norm()
    assert 1 <= compiled["unique_graphs"] - before <= 2


@pytest.mark.usefixtures("_inductor")
def test_another_key_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "DEVICES", {"cpu"})
    x = torch.ones(64, 48)
    keys = torch.arange(20, dtype=torch.int32)
    first = Dropout(0.3, keys[0])(x)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    others = [Dropout(0.3, key)(x) for key in keys[1:]]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before
    assert not any(torch.equal(first, other) for other in others)


def test_without_a_compiler_it_runs_as_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "DEVICES", {"cpu"})
    monkeypatch.setattr(fused, "missing", lambda device: "no compiler")
    monkeypatch.setattr(torch, "compile", None)
    assert fused.fused(lambda x: x + 1)(torch.zeros(2)).tolist() == [1.0, 1.0]

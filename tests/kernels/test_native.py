from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lorikeet.kernels import native


@pytest.mark.usefixtures("compiled")
def test_what_the_compiled_kernels_take() -> None:
    x = torch.zeros(4, 6)
    assert native.takes(x)
    assert native.takes(x, x.clone())
    assert native.takes(x.bfloat16())
    assert not native.takes(x.double())
    assert not native.takes(x.half())
    assert not native.takes(x, x.bfloat16())
    assert not native.takes(x.t())
    assert not native.takes(x.to("meta"))


class Marked(torch.Tensor):
    """A tensor of a class of its own, as wrappers of weights are."""


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("of", [torch.nn.Parameter, lambda x: x.as_subclass(Marked)])
def test_tensors_of_other_classes(of: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """SiLU(gate) * up, both zero but for one element."""
    gate, up = torch.zeros(2, 8), torch.zeros(2, 8)
    gate[0, 3], up[0, 3] = 100.0, 2.0
    act = torch.full_like(gate, 7.0)
    native.call("lk_swiglu", native.type_of(gate), gate.numel(), of(gate), of(up), act)
    expected = torch.zeros(2, 8)
    expected[0, 3] = 200.0
    torch.testing.assert_close(act, expected)


@pytest.mark.usefixtures("compiled")
def test_what_no_kernel_takes() -> None:
    with pytest.raises(TypeError, match="compiled kernels take no str"):
        native.call("lk_swiglu", "x")  # type: ignore[arg-type]


def test_nothing_is_taken_where_they_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "missing", lambda: "some reason")
    assert not native.takes(torch.zeros(4, 6))


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package in another folder, on a processor that has what the kernels need."""
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    monkeypatch.setattr(native, "_load", native._load.__wrapped__)  # looks anew
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    return tmp_path


@pytest.mark.usefixtures("elsewhere")
def test_without_a_library() -> None:
    assert native.missing() == "the package was installed without a C++ compiler"


def test_a_library_that_is_damaged(elsewhere: Path) -> None:
    (elsewhere / "_native.cpython.so").write_bytes(b"no library")
    reason = native.missing()
    assert reason is not None
    assert reason.startswith("_native.cpython.so cannot be loaded: ")


@pytest.mark.parametrize("capabilities", [{}, {"avx512_bf16": False}])
def test_another_processor(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool]
) -> None:
    (elsewhere / "_native.cpython.so").write_bytes(b"must not even be opened")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert native.missing() == "this processor has no AVX512-BF16"

from __future__ import annotations

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

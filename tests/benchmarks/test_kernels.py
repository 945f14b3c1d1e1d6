"""Every case of the kernels' benchmark runs, both ways, and trains what it should."""

from __future__ import annotations

import pytest

from benchmarks import kernels
from lorikeet.kernels import native


@pytest.mark.skipif(native.missing() is not None, reason="there are no compiled kernels here")
def test_every_case_runs_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "VOCABULARY", 512)
    found = list(kernels.cases())
    assert len({name for name, _, _ in found}) == len(found)
    for _, compiled, plain in found:
        compiled()
        with kernels.tensor_operations():
            assert native.missing() is not None
            plain()
    assert native.missing() is None

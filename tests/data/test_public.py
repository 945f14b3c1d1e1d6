"""The public names of the part exist and are sorted."""

from __future__ import annotations

from lorikeet import data


def test_all() -> None:
    assert sorted(data.__all__) == data.__all__
    assert all(getattr(data, name) is not None for name in data.__all__)

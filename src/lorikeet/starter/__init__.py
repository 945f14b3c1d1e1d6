"""The embedded base model, the little world that it was trained on, and two adaptation sets."""

from __future__ import annotations

from pathlib import Path

from lorikeet.errors import DataError

_HERE = Path(__file__).parent
DATA = ("pirate", "pirate-test", "json", "json-test")


def folder() -> Path:
    """Return the folder of the embedded model."""
    return _HERE / "model"


def data(name: str) -> Path:
    """Return the file of a bundled data set: one of `DATA`.

    Raises:
        DataError: there is no set of that name.
    """
    if name not in DATA:
        raise DataError(f"no bundled data set is called {name!r}; there are: {', '.join(DATA)}")
    return _HERE / f"{name}.jsonl"

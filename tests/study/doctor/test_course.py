"""Runs that were stopped, saw a part of the rows, or held nothing out."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

Found = Callable[[Path], dict[str, Any]]


def test_a_run_without_its_receipt(
    train: Callable[..., Path], found: Found, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(train(train__epochs=2, train__eval_every=20), run)
    (run / "receipt.json").unlink()
    findings = found(run)
    assert set(findings) == {"unfinished"}
    assert findings["unfinished"].evidence == {"steps": 68, "max_steps": None}
    (run / "metrics.jsonl").unlink()
    shutil.rmtree(run / "adapter")
    assert found(run)["unfinished"].evidence["steps"] == 0


def test_a_run_that_saw_few_rows(train: Callable[..., Path], found: Found) -> None:
    findings = found(train(data__limit=2000, train__max_steps=12))
    assert findings["part-of-an-epoch"].evidence["steps_per_epoch"] == 196


def test_a_run_that_held_nothing_out(train: Callable[..., Path], found: Found) -> None:
    findings = found(train(data__validation=0.0, train__epochs=1))
    assert set(findings) == {"no-validation"}

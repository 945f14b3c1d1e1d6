"""What the demo measures on is nothing that it trained on."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from lorikeet import starter
from lorikeet.cli import demo
from lorikeet.data import prepare
from lorikeet.data.source import read_rows
from lorikeet.model import load_tokenizer


def _questions(rows: Iterable[Any]) -> set[str]:
    return {" ".join(row.prompt[-1]["content"].casefold().split()) for row in rows}


@pytest.mark.parametrize("style", demo.STYLES)
def test_no_held_out_row_is_among_the_training_rows(style: str, tmp_path: Path) -> None:
    config = demo._config(style, tmp_path)
    prepared = prepare(config.data, load_tokenizer(starter.folder()), seed=config.train.seed)
    assert prepared.report.copies == 0
    assert _questions(prepared.rows_validation).isdisjoint(_questions(prepared.rows_train))
    asked = demo._rows(style)  # for exact answers
    assert _questions(asked) == _questions(prepared.rows_validation)
    assert len(asked) == len(read_rows(str(starter.data(f"{style}-test"))).rows) == 200

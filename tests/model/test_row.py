"""How batches are rounded up."""

from __future__ import annotations

import pytest
import torch

from lorikeet.data import Example, pack
from lorikeet.data.batch import Batch
from lorikeet.model.row import IGNORED, Sizes, coarse, key_tensor, lay_out, least, recordable


def packed(*lengths: int) -> Batch:
    return pack(
        [Example((7,) * n, (False,) + (True,) * (n - 1), i, "row") for i, n in enumerate(lengths)]
    )


def test_the_least_row() -> None:
    assert least(packed(20, 12)) == Sizes(32, 2, 30)
    assert least(packed(20, 13)) == Sizes(64, 3, 31)
    row = lay_out(packed(20, 13), least(packed(20, 13)))
    assert row.lengths == [20, 13, 31]
    assert row.cu_seqlens.tolist() == [0, 20, 33, 64]
    assert row.max_seqlen == 31
    assert row.ids.tolist() == [7] * 33 + [0] * 31
    assert row.positions.tolist() == [*range(20), *range(13), *range(31)]


@pytest.mark.parametrize("tokens", [1, 127, 128, 129, 500, 640, 641, 1025, 4096, 5000, 100_000])
def test_the_coarse_grid(tokens: int) -> None:
    sizes = coarse(packed(tokens))
    assert tokens <= sizes.tokens <= max(tokens + 127, tokens * 1.25)
    assert tokens - 1 <= sizes.supervised <= sizes.tokens
    assert sizes.tokens == coarse(packed(sizes.tokens)).tokens


def test_the_grid_has_few_sizes() -> None:
    assert len({coarse(packed(n)).tokens for n in range(1, 4097)}) <= 4 * 5 + 1
    assert len({coarse(packed(*[2] * n)).documents for n in range(1, 256)}) <= 7


def test_a_row_that_can_be_recorded() -> None:
    batch = packed(20, 13)
    row = recordable(batch, Sizes(128, 8, 64), [3, 0xFFFFFFFF])
    assert row.lengths is None and row.max_seqlen == 128
    assert row.cu_seqlens.tolist() == [0, 20, 33, 128, 128, 128, 128, 128, 128]
    assert row.targets.tolist() == [7] * 31 + [IGNORED] * 33
    assert row.rows[:31].tolist() == batch.rows.tolist() and not row.rows[31:].any()
    assert row.keys is not None and list(row.keys) == [3, -1]


def test_keys_keep_their_bits() -> None:
    keys = [0, 1, 2**31 - 1, 2**31, 2**32 - 1]
    found = key_tensor(keys, torch.device("cpu"))
    assert found.dtype == torch.int32
    assert [int(key) % 2**32 for key in found] == keys

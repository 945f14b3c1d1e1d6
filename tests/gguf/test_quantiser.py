"""The encoders against llama.cpp's own quantiser (`quantiser.py`).

With an installed xllamacpp blocks are compared with what it makes; without it the blocks of
the starter's weights with digests of what it made (`quantiser.json`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from quantiser import (
    QUANTISED,
    TABLE,
    Quantiser,
    digest,
    identical,
    importance,
    installed,
    squares,
    starter,
)
from safetensors.torch import load_file
from torch import Tensor

from lorikeet.gguf.blocks import TYPES, decode, encode


@pytest.fixture(scope="module")
def table() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def llama_cpp() -> Quantiser:
    found = installed()
    if found is None:
        pytest.skip("xllamacpp is not installed")
    return found


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "importance"])
@pytest.mark.parametrize("name", QUANTISED)
def test_the_starters_blocks_are_those_that_llama_cpp_made(
    name: str, weighted: bool, table: dict[str, Any]
) -> None:
    known = table[name]["importance" if weighted else "plain"]
    assert digest(name, weighted=weighted) == known["digest"]


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "importance"])
@pytest.mark.parametrize("name", QUANTISED)
def test_the_starters_blocks_are_those_of_the_installed_llama_cpp(
    name: str, weighted: bool, llama_cpp: Quantiser
) -> None:
    """Another build may round differently (fused multiply-add), hence not to the last block."""
    shares, ours, theirs = [], 0.0, 0.0
    for weights in starter(8):
        columns = importance(weights.shape[1]) if weighted else None
        one, other = (by(name, weights, columns) for by in (encode, llama_cpp.encode))
        shares.append(identical(name, one, other))
        ours += squares(decode(name, one), weights, columns)
        theirs += squares(decode(name, other), weights, columns)
    assert sum(shares) / len(shares) >= 0.99
    assert ours <= 1.02 * theirs


@pytest.mark.parametrize("name", [name for name in QUANTISED if TYPES[name].weights == 32])
def test_the_blocks_of_a_model_64_wide(
    name: str, llama_cpp: Quantiser, shared: Callable[[str], Path]
) -> None:
    for weights in load_file(shared("models/stories260k/model.safetensors")).values():
        if weights.dim() == 2 and weights.shape[1] % 32 == 0:
            for columns in (None, importance(weights.shape[1])):
                one, other = (
                    by(name, weights.float(), columns) for by in (encode, llama_cpp.encode)
                )
                assert identical(name, one, other) >= 0.99


WIDTH = 1024


@cache
def peculiar() -> dict[str, Tensor]:
    """Rows that weights may become, and some that they should not."""
    random = torch.Generator().manual_seed(7)

    def normal(count: int) -> Tensor:
        return torch.randn(count, WIDTH, generator=random)

    outliers = torch.zeros(6, WIDTH)
    outliers[0, 5], outliers[1, 300], outliers[2, 700] = 1, -2, 1e-3
    outliers[3, 256:512] = normal(1)[0, :256]
    outliers[4, ::32], outliers[5, 3::16] = 1, -1
    sizes = torch.logspace(-6, 2, WIDTH // 16)[torch.randperm(WIDTH // 16, generator=random)]
    return {
        "normal": normal(8),
        "small": normal(8) * 0.02,
        "heavy tails": normal(8) / torch.rand(8, WIDTH, generator=random).clamp_min(1e-3),
        "rounded to bfloat16": normal(6).mul(0.02).bfloat16().float(),
        "zero": torch.zeros(2, WIDTH),
        "constant": torch.tensor([1.0, -1.0, 0.1, -1e-3, 1e-6, 1e4])[:, None].repeat(1, WIDTH),
        "outliers on nothing": outliers,
        "outliers on noise": outliers * 100 + normal(6) * 0.01,
        "negative": -torch.rand(6, WIDTH, generator=random),
        "far from zero": torch.rand(6, WIDTH, generator=random) + 0.5,
        "two values": normal(6).sign() * 0.1,
        "on a grid": torch.randint(-7, 8, (8, WIDTH), generator=random) / 8,
        "of all sizes": normal(6) * sizes.repeat_interleave(16),
        "large": normal(6) * 1e4,
        "below float16": normal(6) * 1e-9,
        "below the threshold of zero": normal(6) * 1e-17,
        "nearly denormal": normal(6) * 1e-30,
    }


ZEROS = {
    "denormal": 1e-40 * torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(8)),
    "reciprocal overflows": 1e-38 * torch.randn(6, WIDTH, generator=torch.Generator()),
    "negative zero": -torch.zeros(2, WIDTH),
    "zeros of both signs": torch.zeros(4, WIDTH) * torch.randn(4, WIDTH).sign(),
}
"""All of these are stored as zero; what llama.cpp's codes are depends on overflows."""


@pytest.mark.parametrize("columns", ["none", "positive", "many zero"])
@pytest.mark.parametrize("name", QUANTISED)
def test_peculiar_rows_become_the_same_blocks(
    name: str, columns: str, llama_cpp: Quantiser
) -> None:
    """But for scales that come out negative, which llama.cpp stores without their sign.

    That happens where nearly all of a sub-block is without importance.
    """
    least = 0.98 if columns == "many zero" else 0.99
    random = torch.Generator().manual_seed(9)
    given = {
        "none": None,
        "positive": torch.rand(WIDTH, generator=random) + 0.01,
        "many zero": torch.rand(WIDTH, generator=random).sub(0.7).clamp_min(0),
    }[columns]
    for what, weights in peculiar().items():
        one, other = (by(name, weights, given) for by in (encode, llama_cpp.encode))
        ours, theirs = (squares(decode(name, data), weights, given) for data in (one, other))
        assert identical(name, one, other) >= least, what
        assert ours <= 1.02 * theirs, what


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "importance"])
@pytest.mark.parametrize("name", QUANTISED)
def test_what_is_stored_as_zero_decodes_as_zero(
    name: str, weighted: bool, llama_cpp: Quantiser
) -> None:
    columns = importance(WIDTH) if weighted else None
    for what, weights in ZEROS.items():
        for by in (encode, llama_cpp.encode):
            assert not decode(name, by(name, weights, columns)).any(), what


@pytest.mark.parametrize("name", ["F16", "BF16"])
def test_floats_are_rounded_as_by_llama_cpp(name: str, llama_cpp: Quantiser) -> None:
    for what, weights in (peculiar() | ZEROS).items():
        if weights.abs().max() < 65504:
            assert torch.equal(encode(name, weights), llama_cpp.encode(name, weights)), what


@pytest.mark.parametrize("name", [name for name in QUANTISED if name != "Q8_0"])
def test_importance_moves_the_error_to_where_it_matters_less(name: str) -> None:
    weights = next(iter(starter()))
    columns = importance(weights.shape[1])
    plain, weighted = (decode(name, encode(name, weights, given)) for given in (None, columns))
    assert squares(weighted, weights, columns) < 0.95 * squares(plain, weights, columns)

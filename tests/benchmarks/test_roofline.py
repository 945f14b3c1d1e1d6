"""Operations counted by the program against figures worked out by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.roofline import (
    Shape,
    attention_operations,
    base_operations,
    step_operations,
)
from benchmarks.workload import StepSize

TINY = Shape(
    linears=((2, 3, 4), (3, 2, 1)), head=(2, 10), layers=2, attention_width=5, vocabulary=9
)
STEP = StepSize(lengths=(3, 4), supervised=5)


def test_a_tiny_shape_by_hand() -> None:
    assert TINY.block_parameters == 2 * 3 * 4 + 3 * 2
    assert TINY.lora_parameters(7) == 7 * 5 * 4 + 7 * 5
    assert base_operations(TINY, STEP) == 4 * 30 * 7 + 4 * 20 * 5
    # Two layers of width 5; documents of 3 and 4 tokens; 2 forward and 5 backward.
    assert attention_operations(TINY, STEP) == 7 * 5 * 2 * (9 + 16)
    assert step_operations(TINY, STEP, method="lora", r=1) == 1240 + 6 * 25 * 7 + 1750
    assert step_operations(TINY, STEP, method="full", r=1) == 6 * 30 * 7 + 6 * 20 * 5 + 1750


def test_smollm_135m(shared: Callable[[str], Path]) -> None:
    """30 blocks: q and o 576 x 576, k and v 576 x 192, three of 576 x 1536; a head of 49152."""
    shape = Shape.of(shared("shapes/smollm-135m"))
    assert shape.block_parameters == 30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536)
    assert shape.block_parameters == pytest.approx(106.2e6, rel=1e-3)
    assert shape.head_parameters == 576 * 49152 == pytest.approx(28.3e6, rel=1e-3)
    assert (shape.layers, shape.attention_width, shape.vocabulary) == (30, 576, 49152)
    assert shape.lora_parameters(16) == 4_884_480

    step = StepSize(lengths=(512, 512), supervised=1024)
    assert base_operations(shape, step) / step.tokens == pytest.approx(0.538e9, rel=1e-3)
    total = step_operations(shape, step, method="lora", r=16) / step.tokens
    assert total == pytest.approx(0.63e9, rel=5e-3)


def test_an_untied_head_is_not_a_linear_of_the_blocks(shared: Callable[[str], Path]) -> None:
    shape = Shape.of(shared("shapes/tinyllama-1.1b-chat"))
    assert shape.block_parameters == pytest.approx(968.9e6, rel=1e-3)
    assert shape.head_parameters == pytest.approx(65.5e6, rel=1e-3)

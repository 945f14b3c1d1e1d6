"""Whether a file holds the weights that it was made of, tensor by tensor.

What a model computes does not tell: a small one may lose little when two of its layers change
places, and a coarse type is allowed to lose more than that. Its weights do tell.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from lorikeet.errors import ModelError
from lorikeet.export.convert import Conversion
from lorikeet.gguf.read import GGUFFile

_MOST = {
    "F32": 0.0,
    "F16": 1e-3,
    "BF16": 5e-3,
    "Q8_0": 0.03,
    "Q6_K": 0.1,
    **dict.fromkeys(("Q5_0", "Q5_1", "Q5_K"), 0.15),
    **dict.fromkeys(("Q4_0", "Q4_1", "Q4_K"), 0.3),
    "Q3_K": 0.5,
    "Q2_K": 0.8,
}
"""How far a type's weights may be from the exact ones, in parts of their size (root mean squares).

More than twice the most that was seen on trained models, with an importance matrix and without
(0.0064 for Q8_0, 0.02 for Q6_K, 0.05 for Q5_0, 0.096 for Q4_0, 0.17 for Q3_K, 0.30 for Q2_K).
Another tensor of the same size is 1.4 away.
"""

_UNDERFLOW = 1e-6  # of factors in float16, where weights are this small
_SHOWN = 4


def require_tensors(conversion: Conversion, file: GGUFFile) -> None:
    """Check that a file has the tensors of a conversion.

    Raises:
        ModelError: tensors are missing or of other sizes, with the first findings.
    """
    wanted = {placed.name: placed.shape for placed in conversion.layout.placed}
    wanted |= {name: tuple(made.shape) for name, made in conversion.layout.made.items()}
    found = []
    for name, shape in wanted.items():
        info = file.tensors.get(name)
        if info is None:
            found.append(f"{name} is missing")
        elif info.shape != shape:
            found.append(f"{name} is {list(info.shape)}; expected {list(shape)}")
    if found:
        raise ModelError(f"{file.path} is not the file of this model:", _first(found))


@torch.no_grad()
def misplaced(conversion: Conversion, file: GGUFFile) -> list[str]:
    """The tensors whose weights are not those they were made of, a sentence part each.

    Args:
        conversion: what the file was made of.
        file: the file; it has the conversion's tensors.
    """
    made = conversion.layout.made
    meant = {placed.name: partial(conversion.rows, placed) for placed in conversion.layout.placed}
    found = []
    for name, blocks in {**meant, **{name: partial(iter, [t]) for name, t in made.items()}}.items():
        size, error = _apart(file, name, blocks())
        most = _MOST[file.tensors[name].type]
        if not error <= most * size + (_UNDERFLOW if most else 0):
            share = f"{error / size:.1e}" if size else "infinitely"
            found.append(
                f"the weights of {name} are not those it was made of: {share} of their size apart,"
                f" at most {most} is allowed"
            )
    return _first(found)


def _apart(file: GGUFFile, name: str, blocks: Iterator[Tensor]) -> tuple[float, float]:
    """Root mean squares of a tensor as it was meant, and of what the file has instead of it."""
    start, count, energy, error = 0, 0, 0.0, 0.0
    for exact in blocks:
        stored = file.rows(name, start, start + len(exact))
        energy += float(exact.double().square().sum())
        error += float((stored.double() - exact).square().sum())
        start, count = start + len(exact), count + exact.numel()
    return math.sqrt(energy / count), math.sqrt(error / count)


def _first(found: list[str]) -> list[str]:
    more = len(found) - _SHOWN
    return found[:_SHOWN] + ([f"and {more} tensors more"] if more > 0 else [])

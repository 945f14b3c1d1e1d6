"""The model that all contestants load: a folder with weights, made once where there are none."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmarks.process import BenchmarkError
from benchmarks.roofline import Shape
from lorikeet.model import init_model

_WEIGHTS = ("*.safetensors", "*.bin")


@dataclass(frozen=True)
class Subject:
    """A model folder with weights.

    Attributes:
        name: of the folder that was asked for.
        folder: where the weights are.
        random: whether they were made here.
        shape: the model's products.
    """

    name: str
    folder: Path
    random: bool
    shape: Shape


def make_subject(source: Path, scratch: Path, *, dtype: str) -> Subject:
    """Take a model folder as it is; of one without weights make a copy with seeded random ones.

    Args:
        source: folder with `config.json` and a tokenizer.
        scratch: where the copy is made.
        dtype: of the random weights; in bf16 everybody can load them without rounding.

    Raises:
        BenchmarkError: there is no such folder.
    """
    if not (source / "config.json").is_file():
        raise BenchmarkError(f"there is no model folder {source}; name one with --model")
    shape = Shape.of(source)
    if any(found for pattern in _WEIGHTS for found in source.glob(pattern)):
        return Subject(source.name, source, random=False, shape=shape)
    folder = scratch / source.name
    base = init_model(source, seed=0, dtype=dtype)
    base.model.save_pretrained(folder)  # type: ignore[operator]
    base.tokenizer.save_pretrained(folder)
    return Subject(source.name, folder, random=True, shape=shape)

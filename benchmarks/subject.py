"""The model that all contestants load: a folder with weights, made once where there are none."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.process import BenchmarkError
from benchmarks.roofline import Shape
from lorikeet.model import load_tokenizer
from lorikeet.model.machine import DTYPES

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


def make_subject(source: Path, scratch: Path, *, dtype: str, device: str) -> Subject:
    """Take a model folder as it is; of one without weights make a copy with seeded random ones.

    Args:
        source: folder with `config.json` and a tokenizer.
        scratch: where the copy is made.
        dtype: of the random weights; in bf16 everybody can load them without rounding.
        device: where the random weights are drawn.

    Raises:
        BenchmarkError: there is no such folder.
    """
    if not (source / "config.json").is_file():
        raise BenchmarkError(f"there is no model folder {source}; name one with --model")
    shape = Shape.of(source)
    if any(found for pattern in _WEIGHTS for found in source.glob(pattern)):
        return Subject(source.name, source, random=False, shape=shape)
    folder = scratch / source.name
    random_model(source, dtype=dtype, device=device).save_pretrained(folder)
    load_tokenizer(source).save_pretrained(folder)
    if device == "cuda":  # which is the workers'
        gc.collect()
        torch.cuda.empty_cache()
    return Subject(source.name, folder, random=True, shape=shape)


def random_model(source: Path, *, dtype: str, device: str) -> Any:
    """A model of a folder's `config.json` with seeded weights, made where and as they are wanted.

    8 billion weights take 15 GiB in bf16 on the device: no copy in float32, none in main memory.
    """
    config = AutoConfig.from_pretrained(source, local_files_only=True)
    with torch.random.fork_rng([0] if device == "cuda" else []), torch.device(device):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype])

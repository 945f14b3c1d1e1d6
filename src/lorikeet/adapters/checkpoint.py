"""The weights of a model folder: safetensors or pickles of tensors, in one file or in shards."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorikeet.adapters.fit import listing
from lorikeet.adapters.safe import BLOCK_BYTES, Content, Entry, SafeFile, format_name, open_safe
from lorikeet.errors import ModelError

WEIGHTS = "model.safetensors"
PICKLE = "pytorch_model.bin"
_BLOCK_VALUES = BLOCK_BYTES // 4
HEADS = {
    "embed_tokens": "lm_head",
    "wte": "lm_head",
    "word_embeddings": "lm_head",
    "embed_in": "embed_out",
}
"""A token embedding's last name, and that of the head that may share its weight."""

_RENAMED = {"lm_head.weight": "embed_out.weight", "embed_out.weight": "lm_head.weight"}
"""GPT-NeoX's head: what files call it, and what transformers does since 5.0."""

_PREFIXES = ("transformer.", "model.", "gpt_neox.")


@dataclass(frozen=True, slots=True)
class Pickled:
    """A PyTorch file of tensors, mapped into memory where its format allows it."""

    path: Path
    tensors: Mapping[str, Tensor]
    entries: Mapping[str, Entry]

    @staticmethod
    def open(path: Path) -> Pickled:
        """Read a file's structure.

        Raises:
            ModelError: it is damaged, or holds more than tensors.
        """
        tensors = _unpickle(path)
        entries: dict[str, Entry] = {}
        problems = []
        for name, tensor in tensors.items():
            dtype = format_name(tensor.dtype)
            if dtype is None or tensor.layout != torch.strided:
                problems.append(f"{name} is a {tensor.dtype} tensor of layout {tensor.layout}")
            else:
                entries[name] = Entry(dtype, tuple(tensor.shape), 0, tensor.nbytes)
        if problems:
            raise ModelError(f"{path} holds tensors that safetensors has no place for:", problems)
        return Pickled(path, tensors, entries)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of a tensor."""
        return self.tensors[name][start:stop]

    def raw(self, name: str) -> Iterator[Tensor]:
        """The values of a tensor, in blocks."""
        flat = self.tensors[name].reshape(-1)
        yield from flat.split(_BLOCK_VALUES) if flat.numel() else ()


def _unpickle(path: Path) -> dict[str, Tensor]:
    def load(*, mmap: bool) -> Any:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)

    try:
        try:
            tensors = load(mmap=True)
        except RuntimeError:  # a file from before torch 1.6 is not a zip and cannot be mapped
            tensors = load(mmap=False)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        reason = str(error).partition("\n")[0][:200]
        raise ModelError(f"{path} is damaged or holds more than tensors: {reason}") from None
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in tensors.items()
    ):
        raise ModelError(f"{path} must hold a mapping from names to tensors")
    return tensors


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The weights of a model folder: which file has which tensor."""

    files: Mapping[str, SafeFile | Pickled]

    @staticmethod
    def open(folder: Path) -> Checkpoint:
        """Read the headers of all weight files; the first kind that is there counts.

        Raises:
            ModelError: files are missing or damaged, or do not hold what their index says.
        """
        if not folder.is_dir():
            raise ModelError(f"there is no model folder {folder}")
        for name, reader in ((WEIGHTS, open_safe), (PICKLE, Pickled.open)):
            index = folder / f"{name}.index.json"
            if (folder / name).is_file():
                return Checkpoint(_by_tensor([reader(folder / name)], {}))
            if index.is_file():
                weight_map = _weight_map(index)
                shards = sorted(set(weight_map.values()))
                missing = [shard for shard in shards if not (folder / shard).is_file()]
                if missing:
                    raise ModelError(
                        f"{folder} lacks weight files that {index.name} names:", missing
                    )
                return Checkpoint(_by_tensor([reader(folder / s) for s in shards], weight_map))
        raise ModelError(
            f"{folder} has no weights: expected {WEIGHTS} or {PICKLE}, or an index and its shards"
        )

    def entry(self, name: str) -> Entry:
        """Dtype and shape of a tensor."""
        return self.files[name].entries[name]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a tensor."""
        return self.files[name].rows(name, start, stop)

    def whole(self, name: str) -> Tensor:
        """All of a tensor with at least one dimension."""
        return self.rows(name, 0, self.entry(name).shape[0])

    def find(self, parameter: str) -> list[str]:
        """The tensors that may be a model's parameter: one of its name, else of nearly its name.

        A base's file may lack the prefix that its causal model has: `h.0.attn.c_attn.weight` is
        `transformer.h.0.attn.c_attn.weight`. Or it has another name for the head.
        """
        if parameter in self.files:
            return [parameter]
        near = {parameter.removeprefix(prefix) for prefix in _PREFIXES}
        near |= {prefix + parameter for prefix in _PREFIXES}
        near |= {_RENAMED.get(parameter, parameter)}
        return sorted(near & set(self.files))

    def source(self, parameter: str, *, may_tie: bool) -> tuple[str | None, str]:
        """The tensor that a model's parameter comes from; or None and what is wrong.

        With `may_tie` a head without a tensor of its own takes the embedding's.
        """
        matches = self.find(parameter)
        if not matches and may_tie and is_head(parameter):
            heads = {leaf(parameter), leaf(_RENAMED.get(parameter, parameter))}
            matches = [name for name in self.files if HEADS.get(leaf(name)) in heads]
        if len(matches) == 1:
            return matches[0], ""
        return None, "several tensors may be meant" if matches else "the base has no such weight"

    def content(self, name: str) -> Content:
        """A tensor as it is, to be copied."""
        entry = self.entry(name)
        return Content(entry.dtype, entry.shape, lambda: self.files[name].raw(name))


def leaf(tensor: str) -> str:
    """`lm_head` of `lm_head.weight`; of another parameter than a weight all of its name."""
    module = tensor.removesuffix(".weight")
    return module.rpartition(".")[2] if module != tensor else tensor


def is_head(tensor: str) -> bool:
    """Whether a tensor is an output head's weight, by its name."""
    return leaf(tensor) in HEADS.values()


def _weight_map(index: Path) -> dict[str, str]:
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError):
        found = None
    if not isinstance(found, dict) or not all(
        isinstance(file, str) and Path(file).name == file for file in found.values()
    ):
        raise ModelError(f"{index} is damaged: expected a weight_map from tensors to files")
    return found


def _by_tensor(
    files: Sequence[SafeFile | Pickled], weight_map: Mapping[str, str]
) -> dict[str, SafeFile | Pickled]:
    found = {name: file for file in files for name in file.entries}
    counts = Counter(name for file in files for name in file.entries)
    findings = {
        "in no file, though the index names a file": [n for n in weight_map if n not in found],
        "in several files": [name for name, times in counts.items() if times > 1],
    }
    problems = [listing(what, names) for what, names in findings.items() if names]
    if problems:
        raise ModelError(f"the weights in {files[0].path.parent} are not complete:", problems)
    return found


def blocks_of(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Ranges of rows that are small enough to be held in float32, several times."""
    width = 1
    for size in shape[1:]:
        width *= size
    step = max(1, _BLOCK_VALUES // max(width, 1))
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])

"""An adapter folded into the weights of a model folder: a new folder, tensor by tensor.

Everything is looked up and checked before anything is written. Then one block of rows is read at a
time, summed in float32, rounded once to the stored dtype and written; what the adapter leaves alone
is copied byte for byte. No model is built.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorikeet.adapters.adapter import Adapter
from lorikeet.adapters.checkpoint import WEIGHTS
from lorikeet.adapters.fold import Fold
from lorikeet.adapters.safe import TORCH, Content, write_safe
from lorikeet.adapters.vocabulary import TOKENIZER_FILES, require_tokens, tokenizer_files
from lorikeet.errors import AdapterError, ConfigError, ModelError
from lorikeet.files import atomic_folder, disk_errors
from lorikeet.lora import Vocabulary

NOTE = "lorikeet.json"
"""Says in a merged folder what was merged into what."""

_HEADER_ENTRY = 256  # bytes of a tensor in the header beside its name, at most
_TEXTS = {".json", ".jinja", ".txt", ".model", ".py", ".tiktoken", ".spm", ".vocab", ".bpe"}
_LICENCES = ("license", "licence", "notice", "copying")  # a derived model needs them
_OWN = {"config.json", NOTE, "adapter_config.json"}
_LARGEST_TEXT = 100_000_000


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What a merge has written.

    Attributes:
        out: the new folder.
        files: its weight files.
        tensors: how many tensors they hold.
        merged: the modules whose weights were adapted, parameters that were trained whole, and the
            embedding of which single rows were.
        dtypes: how these weights are stored, in the words of the format (`BF16`).
        untied: whether embedding and head, which shared a weight, now have one each.
        rows: rows of embedding and head if the vocabulary has grown, else None.
        seconds: how long it took.
    """

    out: Path
    files: tuple[str, ...]
    tensors: int
    merged: tuple[str, ...]
    dtypes: tuple[str, ...]
    untied: bool
    rows: int | None
    seconds: float


@torch.no_grad()
def merge(
    base: Path,
    adapter: Adapter,
    out: Path,
    *,
    tokenizer: Path | None = None,
    shard_bytes: int = 5_000_000_000,
    progress: Callable[[int, int], None] | None = None,
) -> MergeReport:
    """Write the model in `base` with the adapter folded in to `out`, in one rename.

    Weights that embedding and head share are untied if the adapter changes one of them: the other
    keeps the base's, as it does while the adapter is not merged.

    Args:
        base: a model folder: safetensors or, failing that, PyTorch pickles of tensors.
        adapter: the adapter.
        out: the new folder; may exist if it is empty or an earlier merge.
        tokenizer: the adapter's folder, for an adapter with new tokens: its tokenizer takes the
            place of the base's.
        shard_bytes: the most bytes of one weight file, unless a single tensor has more.
        progress: is told how many tensors are written, and of how many.

    Raises:
        ModelError: the base's files are missing or damaged.
        AdapterError: the adapter does not fit the base, with every finding, or the sum cannot be
            stored in the base's dtype.
        ConfigError: `out` holds something else.
        StorageError: the disk refused a write. On every error `out` stays as it was.
    """
    started = time.monotonic()
    with disk_errors(out):
        _check_place(base, out)
    fold = Fold.of(base, adapter)
    texts = _texts(base)
    if adapter.vocabulary or fold.plan.rows:
        texts = _with_tokenizer(texts, tokenizer, adapter.vocabulary)
    changed = fold.changed()
    contents = {
        name: _changed(fold, name) if name in changed else fold.checkpoint.content(source)
        for name, (source, _) in fold.plan.tensors.items()
    }
    shards = _shards(contents, shard_bytes)
    done = 0

    def count(_: str) -> None:
        nonlocal done
        done += 1
        if progress:
            progress(done, len(contents))

    with atomic_folder(out) as draft:
        for file, names in shards.items():
            own = {name: contents[name] for name in names}
            write_safe(draft / file, own, metadata={"format": "pt"}, written=count)
        if len(shards) > 1:
            _write(draft / f"{WEIGHTS}.index.json", _index(shards, contents))
        for text in texts:
            shutil.copyfile(text, draft / text.name)
        if fold.changes:
            _write(draft / "config.json", fold.config)
        else:
            shutil.copyfile(base / "config.json", draft / "config.json")
        _write(draft / NOTE, _note(base, adapter, untied=fold.plan.untied))
    return MergeReport(
        out=out,
        files=tuple(shards),
        tensors=len(contents),
        merged=_names(adapter),
        dtypes=fold.dtypes(),
        untied=fold.plan.untied,
        rows=fold.plan.rows,
        seconds=time.monotonic() - started,
    )


def _changed(fold: Fold, name: str) -> Content:
    """A weight that is computed when it is asked for, rounded once to the base's dtype."""
    source, _ = fold.plan.tensors[name]
    dtype = fold.checkpoint.entry(source).dtype

    def blocks() -> Iterator[Tensor]:
        for exact in fold.blocks(name):
            yield _rounded(exact, dtype, name)

    return Content(dtype, fold.shape(name), blocks)


def _rounded(exact: Tensor, dtype: str, name: str) -> Tensor:
    rounded = exact.to("cpu", TORCH[dtype])
    if not rounded.isfinite().all():
        raise AdapterError(
            f"the merged {name} has values that are not finite in {dtype}; the base or the adapter"
            " is damaged, or the sum is out of this type's range"
        )
    return rounded


def _shards(contents: Mapping[str, Content], shard_bytes: int) -> dict[str, list[str]]:
    """The tensors of each file, in the order they came."""
    shards: list[list[str]] = [[]]
    room = shard_bytes
    for name, content in contents.items():
        size = content.size + len(json.dumps(name)) + _HEADER_ENTRY
        if shards[-1] and size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= size
    if len(shards) == 1:
        return {WEIGHTS: shards[0]}
    n = len(shards)
    return {f"model-{i:05}-of-{n:05}.safetensors": names for i, names in enumerate(shards, 1)}


def _index(shards: Mapping[str, Sequence[str]], contents: Mapping[str, Content]) -> dict[str, Any]:
    return {
        "metadata": {"total_size": sum(content.size for content in contents.values())},
        "weight_map": {name: file for file, names in shards.items() for name in sorted(names)},
    }


def _check_place(base: Path, out: Path) -> None:
    """Refuse to replace the base, or anything that is not an earlier merge.

    Raises:
        ModelError: there is no base.
        ConfigError: `out` is taken.
    """
    if not (base / "config.json").is_file():
        raise ModelError(f"{base} is not a model folder: it has no config.json")
    if not out.exists():
        return
    if base.resolve().is_relative_to(out.resolve()):
        raise ConfigError(f"{out} holds the base model itself; choose another folder for the merge")
    entries = list(out.iterdir()) if out.is_dir() else [out]
    earlier = (out / NOTE).is_file() and not any(entry.is_dir() for entry in entries)
    if entries and not earlier:
        raise ConfigError(f"{out} exists and is not an earlier merge; choose another folder")


def _texts(base: Path) -> list[Path]:
    """The base's small files that belong to a model: tokenizer, template, licence, code."""
    return [
        path
        for path in sorted(base.iterdir())
        if path.is_file()
        and (path.suffix in _TEXTS or path.name.lower().startswith(_LICENCES))
        and not path.name.endswith(".index.json")
        and not path.name.lower().startswith("readme")
        and path.name not in _OWN
        and path.stat().st_size <= _LARGEST_TEXT
    ]


def _with_tokenizer(
    texts: Sequence[Path], folder: Path | None, gained: Vocabulary | None
) -> list[Path]:
    """The small files with the tokenizer of an adapter's folder in the place of the base's.

    Raises:
        AdapterError: the folder has no tokenizer, or one without the tokens that were gained.
    """
    own = tokenizer_files(folder) if folder else []
    if not own or folder is None:
        raise AdapterError(
            "the adapter brings new tokens, but its folder has no tokenizer (tokenizer.json) that"
            " knows them; save the one that it was trained with there"
        )
    require_tokens(folder, gained)
    names = {path.name for path in own}
    return [*(path for path in texts if path.name not in (*names, *TOKENIZER_FILES)), *own]


def _note(base: Path, adapter: Adapter, *, untied: bool) -> dict[str, Any]:
    return {
        "base": str(base),
        "adapter": {"base_model": adapter.base_model, "provenance": dict(adapter.provenance)},
        "merged": sorted(_names(adapter)),
        "untied": untied,
        "versions": {"lorikeet": _version(), "torch": torch.__version__},
    }


def _names(adapter: Adapter) -> tuple[str, ...]:
    """What an adapter changes."""
    return (*adapter.updates, *adapter.whole, *(own.module for own in adapter.tokens))


def _version() -> str:
    try:
        return version("lorikeet")
    except PackageNotFoundError:
        return "not installed"


def _write(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

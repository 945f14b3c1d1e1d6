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
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorikeet.adapters.adapter import Adapter, Update
from lorikeet.adapters.checkpoint import WEIGHTS, Checkpoint
from lorikeet.adapters.fit import listing
from lorikeet.adapters.safe import BLOCK_BYTES, TORCH, Content, write_safe
from lorikeet.errors import AdapterError, ConfigError, ModelError
from lorikeet.files import atomic_folder

NOTE = "lorikeet.json"
"""Says in a merged folder what was merged into what."""

_FLOATING = ("F64", "F32", "F16", "BF16")
_BLOCK_VALUES = BLOCK_BYTES // 4
_HEADER_ENTRY = 256  # bytes of a tensor in the header beside its name, at most
_HEADS = {"embed_tokens": "lm_head", "wte": "lm_head", "word_embeddings": "lm_head"} | {
    "embed_in": "embed_out"
}  # a token embedding's last name, and that of the head that may share its weight
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
        merged: the modules whose weights were adapted, and parameters that were trained whole.
        dtypes: how these weights are stored, in the words of the format (`BF16`).
        untied: whether embedding and head, which shared a weight, now have one each.
        seconds: how long it took.
    """

    out: Path
    files: tuple[str, ...]
    tensors: int
    merged: tuple[str, ...]
    dtypes: tuple[str, ...]
    untied: bool
    seconds: float


@torch.no_grad()
def merge(
    base: Path,
    adapter: Adapter,
    out: Path,
    *,
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
    _check_place(base, out)
    config = _read_config(base)
    checkpoint = Checkpoint.open(base)
    plan = _plan(base, checkpoint, adapter, config)
    contents = {
        name: checkpoint.content(source)
        if change is None
        else _changed(checkpoint, source, change, name)
        for name, (source, change) in plan.tensors.items()
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
        for text in _texts(base):
            shutil.copyfile(text, draft / text.name)
        if plan.untied:
            _write(draft / "config.json", _untied(config))
        else:
            shutil.copyfile(base / "config.json", draft / "config.json")
        _write(draft / NOTE, _note(base, adapter, untied=plan.untied))
    changed = [source for source, change in plan.tensors.values() if change is not None]
    return MergeReport(
        out=out,
        files=tuple(shards),
        tensors=len(contents),
        merged=(*adapter.updates, *adapter.whole),
        dtypes=tuple(sorted({checkpoint.entry(source).dtype for source in changed})),
        untied=plan.untied,
        seconds=time.monotonic() - started,
    )


Change = Update | Tensor
"""What becomes of a weight: an update of it, or what was trained whole in its place."""


@dataclass(frozen=True, slots=True)
class _Plan:
    """Each tensor to be written: the base's tensor it comes from, and what is done to it."""

    tensors: dict[str, tuple[str, Change | None]]
    untied: bool


def _plan(base: Path, checkpoint: Checkpoint, adapter: Adapter, config: Mapping[str, Any]) -> _Plan:
    tensors: dict[str, tuple[str, Change | None]] = {n: (n, None) for n in checkpoint.files}
    findings: dict[str, list[str]] = {}
    may_tie = config.get("tie_word_embeddings") is not False
    headless = may_tie and not any(map(_is_head, checkpoint.files))
    untied = False

    def found(what: str, which: str) -> None:
        findings.setdefault(what, []).append(which)

    if config.get("quantization_config"):
        found("the base is quantised; merge into the original weights", "quantization_config")
    changes: list[tuple[str, Change]] = [(f"{m}.weight", u) for m, u in adapter.updates.items()]
    for parameter, change in [*changes, *adapter.whole.items()]:
        source, problem = _source(parameter, checkpoint, may_tie=may_tie)
        if source is None:
            found(problem, parameter)
            continue
        name = source if _leaf(source) == _leaf(parameter) else parameter
        entry, shape = checkpoint.entry(source), tuple(change.shape)
        if entry.dtype not in _FLOATING:
            found("not a plain floating-point weight (quantised?)", f"{source} is {entry.dtype}")
        elif entry.shape != shape:
            sizes = f"{source} is {list(entry.shape)}, the adapter fits {list(shape)}"
            found("misshapen", sizes)
        elif tensors.get(name, (name, None))[1] is not None:
            found("adapted twice", name)
        else:
            tensors[name] = (source, change)
        untied = untied or (may_tie and _shared(parameter))
        table = len(shape) == 2 and shape[0] == config.get("vocab_size")
        if headless and table and not _shared(parameter):
            found("cannot tell whether embedding and head share this weight", parameter)
    if untied:
        for problem, which in _untie(tensors, config):
            found(problem, which)
    for parameter, saved in adapter.copies.items():
        source, problem = _source(parameter, checkpoint, may_tie=may_tie)
        if source is None:
            found(problem, parameter)
        elif not _equal(checkpoint, source, saved):
            found("base weights that differ from the model's (resized or retrained?)", source)
    if findings:
        lines = [listing(what, which) for what, which in findings.items()]
        raise AdapterError(f"the adapter cannot be merged into {base}:", lines)
    return _Plan(tensors, untied)


def _leaf(tensor: str) -> str:
    """`lm_head` of `lm_head.weight`; of another parameter than a weight all of its name."""
    module = tensor.removesuffix(".weight")
    return module.rpartition(".")[2] if module != tensor else tensor


def _is_head(tensor: str) -> bool:
    return _leaf(tensor) in _HEADS.values()


def _shared(tensor: str) -> bool:
    """Whether it is one of the two weights that may be one."""
    return _leaf(tensor) in _HEADS or _is_head(tensor)


def _source(parameter: str, checkpoint: Checkpoint, *, may_tie: bool) -> tuple[str | None, str]:
    """The base's tensor that a parameter comes from; or None and what is wrong.

    A head without a tensor of its own takes the embedding's.
    """
    matches = checkpoint.find(parameter)
    if not matches and may_tie and _is_head(parameter):
        matches = [n for n in checkpoint.files if _HEADS.get(_leaf(n)) == _leaf(parameter)]
    if len(matches) == 1:
        return matches[0], ""
    return None, "several tensors may be meant" if matches else "the base has no such weight"


def _untie(
    tensors: dict[str, tuple[str, Change | None]], config: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    """Give the head a tensor of its own if it has none; what stands in the way of that."""
    embeddings = [name for name in tensors if _leaf(name) in _HEADS]
    heads = [name for name in tensors if _is_head(name)]
    if not heads and len(embeddings) == 1:
        source = tensors[embeddings[0]][0]
        tensors[f"{_HEADS[_leaf(source)]}.weight"] = (source, None)
    elif config.get("tie_word_embeddings") and len(embeddings) != 1:
        yield "cannot tell which embedding is tied to the head", ", ".join(embeddings) or "none"


def _equal(checkpoint: Checkpoint, source: str, saved: Tensor) -> bool:
    """Whether a copy of a base weight is the base's, in the coarser of the two dtypes."""
    entry = checkpoint.entry(source)
    if entry.shape != tuple(saved.shape) or entry.dtype not in TORCH:
        return False
    for start, stop in _blocks(entry.shape):
        own, copy = checkpoint.rows(source, start, stop), saved[start:stop].cpu()
        same = torch.equal(own.to(copy.dtype), copy) or torch.equal(copy.to(own.dtype), own)
        if not same:
            return False
    return True


def _blocks(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Ranges of rows that are small enough to be held in float32, several times."""
    width = 1
    for size in shape[1:]:
        width *= size
    step = max(1, _BLOCK_VALUES // max(width, 1))
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


def _changed(checkpoint: Checkpoint, source: str, change: Change, name: str) -> Content:
    """A weight that is computed when it is asked for, a block of rows at a time."""
    entry = checkpoint.entry(source)
    if isinstance(change, Tensor):
        return Content(entry.dtype, entry.shape, lambda: _rounded(change, entry.dtype, name))
    # The norms of DoRA run over a row of W, which a transposed weight stores as a column.
    whole = change.magnitude is not None and change.kind != "linear"
    ranges = [(0, entry.shape[0])] if whole else list(_blocks(entry.shape))

    def blocks() -> Iterator[Tensor]:
        for start, stop in ranges:
            weight = checkpoint.rows(source, start, stop)
            yield from _rounded(_part(change, start, stop).applied(weight), entry.dtype, name)

    return Content(entry.dtype, entry.shape, blocks)


def _rounded(exact: Tensor, dtype: str, name: str) -> Iterator[Tensor]:
    rounded = exact.to("cpu", TORCH[dtype])
    if not rounded.isfinite().all():
        raise AdapterError(
            f"the merged {name} has values that are not finite in {dtype}; the base or the adapter"
            " is damaged, or the sum is out of this type's range"
        )
    yield rounded


def _part(update: Update, start: int, stop: int) -> Update:
    """The update of the rows `start` to `stop` of the stored weight."""
    if update.kind != "linear":
        return replace(update, A=update.A[:, start:stop])
    magnitude = None if update.magnitude is None else update.magnitude[start:stop]
    return replace(update, B=update.B[start:stop], magnitude=magnitude)


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


def _read_config(base: Path) -> dict[str, Any]:
    path = base / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"cannot read {path}: {error}") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path} must hold an object, found a {type(config).__name__}")
    return config


def _untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration, saying that embedding and head have a weight each."""
    text = config.get("text_config")
    inner = {**text, "tie_word_embeddings": False} if isinstance(text, dict) else None
    return {
        **config,
        "tie_word_embeddings": False,
        **({"text_config": inner} if inner is not None else {}),
    }


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


def _note(base: Path, adapter: Adapter, *, untied: bool) -> dict[str, Any]:
    return {
        "base": str(base),
        "adapter": {"base_model": adapter.base_model, "provenance": dict(adapter.provenance)},
        "merged": sorted([*adapter.updates, *adapter.whole]),
        "untied": untied,
        "versions": {"lorikeet": _version(), "torch": torch.__version__},
    }


def _version() -> str:
    try:
        return version("lorikeet")
    except PackageNotFoundError:
        return "not installed"


def _write(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

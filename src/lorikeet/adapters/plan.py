"""Which tensors of a model folder an adapter changes, found and checked before any is written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorikeet.adapters.adapter import Adapter, Update
from lorikeet.adapters.checkpoint import HEADS, Checkpoint, blocks_of, is_head, leaf
from lorikeet.adapters.fit import listing
from lorikeet.adapters.plan_rows import (
    FLOATING,
    Finding,
    Planned,
    concerns_rows,
    find_tables,
    is_longer,
    put_rows,
)
from lorikeet.adapters.safe import TORCH
from lorikeet.errors import AdapterError

_CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
"""Architectures whose linear layers store their weights transposed."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a merge writes.

    Attributes:
        tensors: by name, the base's tensor each comes from and what is done to it.
        untied: whether embedding and head, which shared a weight, have one each.
        rows: rows of embedding and head if the vocabulary has grown, else None.
    """

    tensors: Planned
    untied: bool
    rows: int | None


def make_plan(
    base: Path, checkpoint: Checkpoint, adapter: Adapter, config: Mapping[str, Any]
) -> Plan:
    """Find the base's tensor of everything that the adapter changes; nothing is written.

    Args:
        base: the model folder, for messages.
        checkpoint: its weights.
        adapter: the adapter.
        config: the folder's `config.json`.

    Raises:
        AdapterError: the adapter does not fit, with every finding.
    """
    tensors: Planned = {n: (n, None) for n in checkpoint.files}
    findings: dict[str, list[str]] = {}
    may_tie = config.get("tie_word_embeddings") is not False
    headless = may_tie and not any(map(is_head, checkpoint.files))
    untied = False

    def found(what: str, which: str) -> None:
        findings.setdefault(what, []).append(which)

    if config.get("quantization_config"):
        found("the base is quantised; merge into the original weights", "quantization_config")
    for module in _turned(adapter, config):
        found("fan_in_fan_out does not go with this architecture", module)
    changes: list[tuple[str, Update | Tensor]] = [
        (f"{m}.weight", u) for m, u in adapter.updates.items()
    ]
    changes += adapter.whole.items()
    for parameter, change in changes:
        source, problem = checkpoint.source(parameter, may_tie=may_tie)
        if source is None:
            found(problem, parameter)
            continue
        tied = is_head(parameter) and not is_head(source)  # it gets a tensor of its own
        name = parameter if tied else source
        entry, shape = checkpoint.entry(source), tuple(change.shape)
        if entry.dtype not in FLOATING:
            found("not a plain floating-point weight (quantised?)", f"{source} is {entry.dtype}")
        elif entry.shape != shape and not (
            isinstance(change, Tensor) and _by_token(parameter) and is_longer(change, entry.shape)
        ):
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
    rows = None
    if concerns_rows(checkpoint, adapter):
        tables = find_tables(checkpoint, adapter, may_tie=may_tie, untied=untied)
        if isinstance(tables, tuple):
            found(*tables)
        else:
            for problem, which in put_rows(tensors, tables, checkpoint):
                found(problem, which)
            untied = untied or tables.split
            rows = tables.size if tables.size > tables.base_rows else None
    for parameter, saved in adapter.copies.items():
        source, problem = checkpoint.source(parameter, may_tie=may_tie)
        if source is None:
            found(problem, parameter)
        elif not _equal(checkpoint, source, saved):
            found("base weights that differ from the model's (resized or retrained?)", source)
    if findings:
        lines = [listing(what, which) for what, which in findings.items()]
        raise AdapterError(f"the adapter cannot be merged into {base}:", lines)
    return Plan(tensors, untied, rows)


def _shared(tensor: str) -> bool:
    """Whether it is one of the two weights that may be one."""
    return leaf(tensor) in HEADS or is_head(tensor)


def _by_token(parameter: str) -> bool:
    """Whether it may have an entry for every token: an embedding, a head, a head's bias."""
    module, _, own = parameter.rpartition(".")
    return _shared(parameter) or (own == "bias" and is_head(f"{module}.weight"))


def _turned(adapter: Adapter, config: Mapping[str, Any]) -> list[str]:
    """Square weights of which adapter and architecture disagree how they are stored."""
    stored = config.get("model_type") in _CONV1D
    return [
        module
        for module, update in adapter.updates.items()
        if update.kind != "embedding"
        and update.shape[0] == update.shape[1]
        and (update.kind == "conv1d") != stored
    ]


def _untie(tensors: Planned, config: Mapping[str, Any]) -> Iterator[Finding]:
    """Give the head a tensor of its own if it has none; what stands in the way of that."""
    embeddings = [name for name in tensors if leaf(name) in HEADS]
    heads = [name for name in tensors if is_head(name)]
    if not heads and len(embeddings) == 1:
        source = tensors[embeddings[0]][0]
        tensors[f"{HEADS[leaf(source)]}.weight"] = (source, None)
    elif config.get("tie_word_embeddings") and len(embeddings) != 1:
        yield "cannot tell which embedding is tied to the head", ", ".join(embeddings) or "none"


def _equal(checkpoint: Checkpoint, source: str, saved: Tensor) -> bool:
    """Whether a copy of a base weight is the base's, in the coarser of the two dtypes.

    It may have more rows.
    """
    entry = checkpoint.entry(source)
    longer = is_longer(saved, entry.shape)
    if entry.dtype not in TORCH or not (longer or entry.shape == tuple(saved.shape)):
        return False
    for start, stop in blocks_of(entry.shape):
        own, copy = checkpoint.rows(source, start, stop), saved[start:stop].cpu()
        same = torch.equal(own.to(copy.dtype), copy) or torch.equal(copy.to(own.dtype), own)
        if not same:
            return False
    return True

"""The tensors of a model folder with an adapter folded in, each computed when it is asked for.

Everything is looked up and checked when a fold is made. Then one block of rows is read at a time
and summed in float32. No model is built.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorikeet.adapters.adapter import Adapter, Update
from lorikeet.adapters.checkpoint import HEADS, Checkpoint, blocks_of, is_head, leaf
from lorikeet.adapters.plan import Plan, make_plan
from lorikeet.adapters.plan_rows import Change, Planned, Rows, same, with_rows
from lorikeet.errors import ModelError


@dataclass(frozen=True, slots=True, eq=False)
class Fold:
    """A base's weights with an adapter folded in.

    Weights that embedding and head share are untied if the adapter changes one of them: the other
    keeps the base's, as it does while the adapter is not merged. They are untied, too, where the
    base's files have both and these differ, whatever its config.json says: so they are loaded.

    Attributes:
        base: the model folder.
        checkpoint: its weights.
        config: what `config.json` says of the folded model.
        plan: by the name of a folded tensor, the base's tensor and what is done to it.
        changes: the keys of `config` whose values are not the base's.
    """

    base: Path
    checkpoint: Checkpoint
    config: Mapping[str, Any]
    plan: Plan
    changes: Mapping[str, Any]

    @staticmethod
    def of(base: Path, adapter: Adapter | None = None) -> Fold:
        """Look everything up.

        Args:
            base: a model folder: safetensors or, failing that, PyTorch pickles of tensors.
            adapter: what to fold in; None for the base as it is.

        Raises:
            ModelError: the base's files are missing or damaged.
            AdapterError: the adapter does not fit the base, with every finding.
        """
        config = _read_config(base)
        checkpoint = Checkpoint.open(base)
        changes: dict[str, Any] = {}
        if config.get("tie_word_embeddings") is not False and _heads_differ(checkpoint):
            changes["tie_word_embeddings"] = False
            config = _with_values(config, changes)
        if adapter is None:
            own: Planned = {name: (name, None) for name in checkpoint.files}
            plan = Plan(own, untied=False, rows=None)
        else:
            plan = make_plan(base, checkpoint, adapter, config)
        changes |= {"tie_word_embeddings": False} if plan.untied else {}
        changes |= {"vocab_size": plan.rows} if plan.rows else {}
        return Fold(base, checkpoint, _with_values(config, changes), plan, changes)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The sizes of every folded tensor, by name."""
        return {name: self.shape(name) for name in self.plan.tensors}

    def shape(self, name: str) -> tuple[int, ...]:
        """The sizes of a folded tensor."""
        source, change = self.plan.tensors[name]
        if isinstance(change, Tensor):
            return tuple(change.shape)
        own = self.checkpoint.entry(source).shape
        return (change.size, *own[1:]) if isinstance(change, Rows) else own

    @torch.no_grad()
    def blocks(self, name: str) -> Iterator[Tensor]:
        """A tensor in blocks of rows, not rounded: float32, or float64 where it is stored so.

        Raises:
            ModelError: torch does not have the stored dtype, or the tensor has no rows.
        """
        source, change = self.plan.tensors[name]
        if isinstance(change, Tensor):
            yield _exact(change)
        elif isinstance(change, Rows):
            yield from _filled(self.checkpoint, source, change)
        else:
            for start, stop in self._ranges(source, change):
                rows = self.checkpoint.rows(source, start, stop)
                yield _exact(rows) if change is None else _part(change, start, stop).applied(rows)

    def _ranges(self, source: str, change: Update | None) -> list[tuple[int, int]]:
        """The rows of each block."""
        shape = self.checkpoint.entry(source).shape
        if not shape:
            raise ModelError(f"{source} in {self.base} is a single value where rows are expected")
        # The norms of DoRA run over a row of W, which a transposed weight stores as a column.
        whole = change is not None and change.magnitude is not None and change.kind != "linear"
        return [(0, shape[0])] if whole else list(blocks_of(shape))

    def changed(self) -> dict[str, Change]:
        """The tensors that the adapter changes, and how."""
        tensors = self.plan.tensors.items()
        return {name: change for name, (_, change) in tensors if change is not None}

    def dtypes(self) -> tuple[str, ...]:
        """How the weights that the adapter changes are stored, in the words of the format."""
        sources = (self.plan.tensors[name][0] for name in self.changed())
        return tuple(sorted({self.checkpoint.entry(source).dtype for source in sources}))


def _heads_differ(checkpoint: Checkpoint) -> bool:
    """Whether the files have an embedding and a head of its own, which is not a copy of it."""
    embeddings = [name for name in checkpoint.files if leaf(name) in HEADS]
    heads = [name for name in checkpoint.files if is_head(name)]
    return len(embeddings) == len(heads) == 1 and not same(checkpoint, embeddings[0], heads[0])


def _exact(rows: Tensor) -> Tensor:
    return rows if rows.dtype == torch.float64 else rows.float()


def _filled(checkpoint: Checkpoint, source: str, change: Rows) -> Iterator[Tensor]:
    """The blocks of a table with other rows in it, and then of those that it did not have."""
    entry = checkpoint.entry(source)
    for start, stop in blocks_of(entry.shape):
        yield with_rows(_exact(checkpoint.rows(source, start, stop)), change, start)
    added = (change.size - entry.shape[0], *entry.shape[1:])
    for start, stop in blocks_of(added):
        yield with_rows(torch.zeros(stop - start, *added[1:]), change, entry.shape[0] + start)


def _part(update: Update, start: int, stop: int) -> Update:
    """The update of the rows `start` to `stop` of the stored weight."""
    if update.kind != "linear":
        return replace(update, A=update.A[:, start:stop])
    magnitude = None if update.magnitude is None else update.magnitude[start:stop]
    return replace(update, B=update.B[start:stop], magnitude=magnitude)


def _read_config(base: Path) -> dict[str, Any]:
    path = base / "config.json"
    if not path.is_file():
        raise ModelError(f"{base} is not a model folder: it has no config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"cannot read {path}: {error}") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path} must hold an object, found a {type(config).__name__}")
    return config


def _with_values(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with other values, those of its text model too if it has one."""
    text = config.get("text_config")
    inner = {"text_config": {**text, **changes}} if isinstance(text, dict) else {}
    return {**config, **changes, **inner}

"""What a merge makes of the tables with a row for every token: other rows, and more of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorikeet.adapters.adapter import Adapter, Tokens, Update
from lorikeet.adapters.checkpoint import HEADS, Checkpoint, blocks_of, is_head, leaf
from lorikeet.lora.vocabulary import leading

FLOATING = ("F64", "F32", "F16", "BF16")
"""What a weight that is not quantised is stored as, in the words of safetensors."""


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Rows of a table in the places of the base's or after them.

    Attributes:
        ids: whose they are.
        rows: float32 [n, dim].
        size: rows of the merged table; those that are neither the base's nor given are zero.
    """

    ids: tuple[int, ...]
    rows: Tensor
    size: int


Change = Update | Rows | Tensor
"""What becomes of a weight: an update of it, other rows, or what was trained whole in its place."""

Planned = dict[str, tuple[str, Change | None]]
"""By the name of a merged tensor: the base's tensor it comes from, and what is done to it."""

Finding = tuple[str, str]
"""What is wrong, and with which tensor."""


@dataclass(frozen=True, slots=True)
class _Table:
    """A table of the merged model: its name, the base's tensor, trained rows, PEFT's copy."""

    name: str
    source: str
    tokens: Tokens | None
    copy: Tensor | None


@dataclass(frozen=True, slots=True)
class Tables:
    """The tables of a base, and what an adapter has for them.

    Attributes:
        all: those of the merged model.
        size: rows that they have afterwards.
        base_rows: rows that they had.
        split: whether embedding and head, which shared a weight, get rows that differ.
    """

    all: tuple[_Table, ...]
    size: int
    base_rows: int
    split: bool


def concerns_rows(checkpoint: Checkpoint, adapter: Adapter) -> bool:
    """Whether an adapter has rows of single tokens, or a vocabulary that has grown."""
    named = {**adapter.copies, **adapter.whole}
    return bool(adapter.tokens or adapter.vocabulary) or any(
        is_longer(tensor, checkpoint.entry(source).shape)
        for parameter, tensor in named.items()
        if (source := checkpoint.source(parameter, may_tie=True)[0]) is not None
    )


def is_longer(table: Tensor, shape: Sequence[int]) -> bool:
    """Whether it has more rows than a table of this shape, and is otherwise like it."""
    alike = 0 < table.dim() == len(shape) and tuple(table.shape[1:]) == tuple(shape[1:])
    return alike and len(table) > shape[0]


def find_tables(
    checkpoint: Checkpoint, adapter: Adapter, *, may_tie: bool, untied: bool
) -> Tables | Finding:
    """Which tensors are the embedding and the head, and which rows the adapter has for them.

    Args:
        checkpoint: the base's weights.
        adapter: has rows of single tokens, or whole tables.
        may_tie: whether embedding and head may share a weight.
        untied: whether they will have one each because the adapter changes one of them.
    """
    of_head = [own for own in adapter.tokens if is_head(f"{own.module}.weight")]
    of_embedding = [own for own in adapter.tokens if own not in of_head]
    if len(of_head) > 1 or len(of_embedding) > 1:
        return "rows of several embeddings or heads", ", ".join(o.module for o in adapter.tokens)
    named = [name for name in checkpoint.files if leaf(name) in HEADS]
    if of_embedding:
        parameter = f"{of_embedding[0].module}.weight"
        source, problem = checkpoint.source(parameter, may_tie=may_tie)
        if source is None:
            return problem, parameter
        named = [source]
    if len(named) != 1:
        return "cannot tell which tensor is the embedding", ", ".join(named) or "none"
    embedding = named[0]
    head = f"{HEADS.get(leaf(embedding), 'lm_head')}.weight"
    heads = [name for name in checkpoint.files if is_head(name)]
    twins = [name for name in heads if may_tie and same(checkpoint, name, embedding)]
    linked = may_tie and (not heads or bool(twins))
    inner, outer = (next(iter(own), None) for own in (of_embedding, of_head))
    if linked and untied and of_embedding:
        return "single tokens beside another change of their weight", embedding
    split = linked and outer is not None and not _equal_rows(inner, outer)
    copies = {
        name: copy
        for parameter, copy in adapter.copies.items()
        for name in checkpoint.find(parameter) or [parameter]
    }
    shared = next((copies[n] for n in (embedding, *twins, head) if linked and n in copies), None)
    own = shared if linked else copies.get(embedding)
    found = [_Table(embedding, embedding, inner, own)]
    apart = split or untied
    if not linked:
        found += [_Table(name, name, outer, copies.get(name)) for name in heads]
    elif apart and not twins:
        found.append(_Table(head, embedding, outer, shared))
    else:
        found += [_Table(name, name, outer if apart else inner, shared) for name in twins]
    base_rows = checkpoint.entry(embedding).shape[0]
    whole = [t for p, t in adapter.whole.items() if leaf(p) in HEADS or is_head(p)]
    sizes = [len(table) for table in (*whole, *(t.copy for t in found if t.copy is not None))]
    sizes += [1 + max(own.ids, default=-1) for own in adapter.tokens]
    if adapter.vocabulary:
        sizes.append(adapter.vocabulary.rows)
    return Tables(tuple(found), max([base_rows, *sizes]), base_rows, split)


def put_rows(planned: Planned, found: Tables, checkpoint: Checkpoint) -> Iterator[Finding]:
    """Plan the rows of every table; yield what stands in the way.

    Args:
        planned: gets the tables' entries; has those of updates and of what was trained whole.
        found: from `find_tables`.
        checkpoint: the base's weights.
    """
    grows = found.size > found.base_rows
    for table in found.all:
        _, change = planned.get(table.name, (table.source, None))
        if isinstance(change, Tensor) and table.tokens is None:
            if len(change) != found.size:
                sizes = f"{table.name} has {len(change)} rows, others {found.size}"
                yield "misshapen", sizes
        elif change is not None and (table.tokens or grows):
            yield "single tokens beside another change of their weight", table.name
        elif table.tokens or grows:
            made = _rows(checkpoint, table, found)
            if isinstance(made, Rows):
                planned[table.name] = (table.source, made)
            else:
                yield made
        bias = f"{table.name.removesuffix('weight')}bias"
        alone = bias in checkpoint.files and planned[bias][1] is None
        if grows and is_head(table.name) and alone:
            planned[bias] = (bias, Rows((), torch.zeros(0), found.size))


def _rows(checkpoint: Checkpoint, table: _Table, found: Tables) -> Rows | Finding:
    """The rows that a table gets; or what is wrong with them."""
    entry = checkpoint.entry(table.source)
    if entry.dtype not in FLOATING:
        return "not a plain floating-point weight (quantised?)", f"{table.source} is {entry.dtype}"
    width = entry.shape[1:]
    given: dict[int, Tensor] = {}
    if table.copy is not None and table.copy.shape[1:] == width:
        given = {n: table.copy[n] for n in range(found.base_rows, len(table.copy))}
    if table.tokens is not None:
        ids, rows = table.tokens.ids, table.tokens.rows
        if rows.shape != (len(ids), *width):
            sizes = f"{table.source} is {list(entry.shape)}, the adapter has rows"
            return "misshapen", f"{sizes} {list(rows.shape)} of {len(ids)} tokens"
        given |= dict(zip(ids, rows, strict=True))
    lost = (n for n in range(found.base_rows, found.size) if n not in given)
    if shown := leading(lost):
        return (
            "rows of new tokens that the adapter does not have",
            f"{table.name}: {shown} (the base has {found.base_rows} rows)",
        )
    rows = torch.stack([row.float() for row in given.values()]) if given else torch.zeros(0, *width)
    return Rows(tuple(given), rows, found.size)


def with_rows(weight: Tensor, change: Rows, start: int) -> Tensor:
    """A block of a table that begins with row `start`, with the rows of the change in it."""
    ids = torch.tensor(change.ids, dtype=torch.int64) - start
    inside = (ids >= 0) & (ids < len(weight))
    return weight.index_copy(0, ids[inside], change.rows.cpu()[inside].to(weight.dtype))


def _equal_rows(one: Tokens | None, other: Tokens) -> bool:
    return one is not None and one.ids == other.ids and torch.equal(one.rows, other.rows)


def same(checkpoint: Checkpoint, one: str, other: str) -> bool:
    """Whether two tensors of a checkpoint are equal."""
    a, b = checkpoint.entry(one), checkpoint.entry(other)
    return (a.dtype, a.shape) == (b.dtype, b.shape) and all(
        torch.equal(checkpoint.rows(one, *block), checkpoint.rows(other, *block))
        for block in blocks_of(a.shape)
    )

"""Attention for packed rows: every document attends to itself alone, through any HF architecture.

A packed row is [1, T] tokens; the forward gets the keyword `documents`, which transformers hands
through to a registered attention function. Without it (one document, padded batches, generation
with a cache) the function is transformers' own SDPA.

Documents run through SDPA one by one, which keeps float32 results the same in every layout. In bf16
on a CPU, where SDPA's backward has no bf16 dot products, short documents are laid side by side,
padded on the right to a common length, and go through plain matrix products; under a causal mask no
token sees a pad to its right.

Shapes: T tokens of the row, H query heads, K key-value heads, D head size, N documents of a group,
L their padded length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

IMPLEMENTATION = "lorikeet"
"""The name under which the function below is registered with transformers."""

LONGEST_SHORT = 128
"""Documents up to this length are grouped; the products grow with its square."""

_STEP = 32  # lengths are padded up to multiples of this: few groups, little waste


@dataclass(frozen=True)
class _Group:
    """Short documents side by side: where their tokens lie in the row, and which are not pads."""

    rows: Tensor  # [N * L] index into T; pads point at the document's first token
    real: Tensor  # [N * L] bool
    shape: tuple[int, int]  # N, L


@dataclass(frozen=True)
class Documents:
    """How a packed row is cut for attention."""

    lengths: Sequence[int]
    long: Sequence[slice]
    groups: Sequence[_Group]

    @staticmethod
    def of(lengths: Sequence[int], *, device: torch.device, dtype: torch.dtype) -> Documents:
        """Cut a row of documents of these lengths, which is computed in `dtype`."""
        grouped = device.type == "cpu" and dtype == torch.bfloat16
        longest_short = LONGEST_SHORT if grouped else 0
        long: list[slice] = []
        short: dict[int, list[tuple[int, int]]] = {}
        start = 0
        for length in lengths:
            if length > longest_short:
                long.append(slice(start, start + length))
            else:
                short.setdefault(-(-length // _STEP) * _STEP, []).append((start, length))
            start += length
        groups = [_group(members, padded, device) for padded, members in sorted(short.items())]
        return Documents(lengths, long, groups)


def _group(members: Sequence[tuple[int, int]], padded: int, device: torch.device) -> _Group:
    offsets = torch.arange(padded)
    starts, lengths = torch.tensor(members).T[:, :, None]
    real = offsets < lengths
    rows = starts + offsets * real
    return _Group(rows.flatten().to(device), real.flatten().to(device), (len(members), padded))


def packed_inputs(
    ids: Tensor, positions: Tensor, lengths: Sequence[int], *, dtype: torch.dtype
) -> dict[str, Any]:
    """Keyword arguments of a model's forward for a packed row.

    Args:
        ids: [T] token ids.
        positions: [T] positions, restarting at 0 for every document.
        lengths: tokens of each document.
        dtype: compute type of the model.
    """
    return {
        "input_ids": ids[None],
        "position_ids": positions[None],
        # A ready 4-D mask keeps transformers from building a dense [T, T] one; it is ignored here.
        "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids.device),
        "documents": Documents.of(lengths, device=ids.device, dtype=dtype),
        "use_cache": False,
    }


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    documents: Documents | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """query [1, H, T, D], key and value [1, K, T, D] -> [1, T, H, D]."""
    if documents is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    pieces, places = [], []
    for rows, output in _pieces(module, query, key, value, documents, options):
        places.append(rows)
        pieces.append(output)
    order = torch.cat(places).argsort()
    return torch.cat(pieces)[order][None], None


def _pieces(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: Documents,
    options: dict[str, Any],
) -> Iterator[tuple[Tensor, Tensor]]:
    """Row numbers [n] and outputs [n, H, D] of each long document and each group."""
    window = _window(module, options)
    for rows in documents.long:
        q, k, v = query[:, :, rows], key[:, :, rows], value[:, :, rows]
        mask = _mask(q.shape[2], window, q.device)[None, None] if window else None
        output = sdpa_attention_forward(module, q, k, v, mask, **options)[0]
        yield torch.arange(rows.start, rows.stop, device=query.device), output[0]
    for group in documents.groups:
        length = group.shape[1]
        q, k, v = (_side_by_side(x, group) for x in (query, key, value))
        output = _products(q, k, v, mask=_mask(length, window, q.device), options=options)
        yield group.rows[group.real], output.flatten(0, 1)[group.real]


def _side_by_side(row: Tensor, group: _Group) -> Tensor:
    """[1, H, T, D] -> [N, H, L, D]."""
    return row[0][:, group.rows].unflatten(1, group.shape).transpose(0, 1)


def _products(
    query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor, options: dict[str, Any]
) -> Tensor:
    """query [N, H, L, D], key and value [N, K, L, D], mask [L, L] -> [N, L, H, D].

    The query heads of a key-value head become rows of one product, so nothing is repeated.
    """
    heads, length = query.shape[1:3]
    shared = (heads // key.shape[1], length)
    rows = query.unflatten(1, (key.shape[1], -1)).flatten(2, 3)  # [N, K, H / K * L, D]
    scores = (rows @ key.transpose(-1, -2)) * options["scaling"]
    scores = scores.unflatten(2, shared).masked_fill(~mask, float("-inf"))
    weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
    weights = F.dropout(weights, options.get("dropout", 0.0))
    output = weights.flatten(2, 3) @ value
    return output.unflatten(2, shared).flatten(1, 2).transpose(1, 2)


def _window(module: nn.Module, options: dict[str, Any]) -> int | None:
    """The layer's sliding window, which only a model that hands it over can have in a packed row.

    Raises:
        ValueError: the model keeps its window (or its chunks) to the mask, which is ignored here.
    """
    if "sliding_window" in options:
        return options["sliding_window"]
    for name in ("sliding_window", "attention_chunk_size"):
        if getattr(module.config, name, None) is not None:
            raise ValueError(f"{type(module).__name__} does not hand its {name} to the attention")
    return None


def _mask(length: int, window: int | None, device: torch.device) -> Tensor:
    """[L, L], true where a token (row) sees another (column): causal, within the window if any."""
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    return (distance >= 0) & (distance < (window or length))


AttentionInterface.register(IMPLEMENTATION, attend)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)

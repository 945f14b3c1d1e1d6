"""An adapter's folder made into layers for a certain model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorikeet.adapters.files import read_tensors
from lorikeet.adapters.fit import misfits
from lorikeet.adapters.names import Part, tensor_name, token_name, whole_key
from lorikeet.adapters.schema import AdapterInfo, read_adapter_config
from lorikeet.adapters.vocabulary import needed
from lorikeet.errors import AdapterError
from lorikeet.lora import (
    LoraEmbedding,
    LoraLayer,
    LoraLinear,
    TokenHead,
    TokenLayer,
    Vocabulary,
    growing,
    ids_by_table,
    inventory,
    layers_around,
    match_targets,
    put_whole,
    require_plain,
    tables,
    token_layers_around,
    trained_copies,
    vocabulary,
    whole_names,
    wrap,
)


@dataclass(frozen=True)
class Parts:
    """An adapter for a certain model: layers around its modules, and parameters trained whole.

    The layers are those of LoRA and those of trained tokens.
    """

    layers: dict[str, LoraLayer | TokenLayer]
    whole: dict[str, nn.Parameter]

    def put(self, model: nn.Module) -> None:
        """Put them in their places."""
        put_whole(model, self.whole)
        wrap(model, self.layers)


def read_parts(
    model: nn.Module, folder: Path, *, tokenizer: Any = None, bound: Sequence[str] = ()
) -> tuple[AdapterInfo, Parts]:
    """The adapter of `folder`, made for the model, which does not use it yet.

    The model's vocabulary grows if it must.

    Args:
        model: the base.
        folder: the adapter.
        tokenizer: the base's; see `load_adapter`.
        bound: adapters that fit the vocabulary as it is and no larger one.

    Raises:
        AdapterError: as `load_adapter`; or the vocabulary must grow and must not.
    """
    require_plain(model)
    info = read_adapter_config(folder)
    tensors = read_tensors(folder)
    need = needed(model, tokenizer, folder, info, tensors)
    if need.vocabulary and vocabulary(model) is None and bound:
        raise AdapterError(
            f"the adapter in {folder} brings new tokens, {need.vocabulary}; load it before those"
            f" that change embedding or head and so fit the vocabulary as it is: {', '.join(bound)}"
        )
    with growing(model, tokenizer, need.vocabulary, starts=need.starts):
        return info, _made_for(model, folder, info, tensors, need.vocabulary)


def _made_for(
    model: nn.Module,
    folder: Path,
    info: AdapterInfo,
    tensors: Mapping[str, torch.Tensor],
    gained: Vocabulary | None,
) -> Parts:
    """Layers and copies with the values of the file.

    Raises:
        AdapterError: the adapter does not fit.
    """
    match = match_targets(model, info.config)
    dora = info.config.dora
    adapted = {target.name for target in match.targets}
    names = whole_names(model, info.config, adapted)
    whole = {n: whole_key(n, adapted=n.rpartition(".")[0] in adapted) for n in names}
    ids = ids_by_table(model, info.config.trainable_tokens)
    tokens = token_layers_around(
        model,
        _with_new_rows(model, ids, gained, {*adapted, *(n.removesuffix(".weight") for n in names)}),
        adapted=adapted,
        whole=names,
    )
    rows = {
        token_name(name): own[: len(ids[name])]
        for name, layer in tokens.items()
        if (own := layer.rows) is not None and name in ids
    }
    shapes = {key: tuple(own.shape) for key, own in rows.items()}
    tensors = _without_tied_rows(tensors, tokens)
    problems = list(match.broken) or misfits(
        model, match.targets, tensors, dora=dora, whole=whole, rows=shapes
    )
    if info.conv1d and not any(target.kind == "conv1d" for target in match.targets):
        problems.append("fan_in_fan_out is True, but no target stores its weight transposed")
    if problems:
        raise AdapterError(
            f"the adapter in {folder} does not fit the model, which has {inventory(model)}:",
            # An unused entry alone is harmless (PEFT keeps such); beside a misfit it explains.
            [*problems, *match.unused],
        )
    layers = layers_around(model, match.targets, dropout=info.config.dropout, dora=dora)
    for name, layer in layers.items():
        for key, master in masters(name, layer).items():
            master.detach().copy_(tensors[key])
    copies = trained_copies(model, whole)
    for name, copy in copies.items():
        copy.detach().copy_(tensors[whole[name]])
    for key, trained in rows.items():
        trained.detach().copy_(tensors[key])
    return Parts({**layers, **tokens}, copies)


def _with_new_rows(
    model: nn.Module,
    ids: Mapping[str, Sequence[int]],
    gained: Vocabulary | None,
    changed: set[str],
) -> dict[str, list[int]]:
    """Ids by table, with the new rows that the adapter brings and did not train.

    They are part of what it does, so they are held like trained ones, unless their table is
    adapted or trained whole.
    """
    found = {name: list(own) for name, own in ids.items()}
    if gained is None:
        return found
    places = tables(model)
    apart = [n for n in places.tied if n in ids or places.name in changed]
    for name in (places.name, *places.heads, *apart):
        if name not in changed:
            held = found.setdefault(name, [])
            held += [row for row in gained.new_rows if row not in held]
    return found


def _without_tied_rows(
    tensors: Mapping[str, torch.Tensor], tokens: Mapping[str, TokenLayer]
) -> dict[str, torch.Tensor]:
    """The tensors without the rows that PEFT repeats of a head that shares the embedding's.

    It does so beside whole tables; rows that differ are left for an error.
    """
    repeated = set()
    for name, layer in tokens.items():
        if isinstance(layer, TokenHead) and layer.rows is None:
            keys = [token_name(n) for n in tokens if tokens[n].rows is not None]
            same = (tensors[k] for k in keys if k in tensors and token_name(name) in tensors)
            if any(torch.equal(own, tensors[token_name(name)]) for own in same):
                repeated.add(token_name(name))
    return {key: tensor for key, tensor in tensors.items() if key not in repeated}


def masters(name: str, layer: LoraLayer) -> dict[str, torch.Tensor]:
    """What a layer's update is made of, by the names in the file."""
    embedding = isinstance(layer, LoraEmbedding)
    parts: dict[Part, torch.Tensor | None] = dict(zip(("A", "B"), layer.factors, strict=True))
    if isinstance(layer, LoraLinear):
        parts["magnitude"] = layer.magnitude
    return {
        tensor_name(name, part, embedding=embedding): master
        for part, master in parts.items()
        if master is not None
    }

"""An adapter in a folder, in PEFT's format: written atomically, read strictly."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save
from torch import nn

from lorikeet.adapters.files import TENSORS_FILE
from lorikeet.adapters.fit import listing
from lorikeet.adapters.names import token_name, whole_key
from lorikeet.adapters.parts import masters, read_parts
from lorikeet.adapters.schema import CONFIG_FILE, AdapterInfo, to_peft
from lorikeet.adapters.vocabulary import KEY
from lorikeet.config import LoraConfig
from lorikeet.errors import AdapterError
from lorikeet.files import atomic_folder
from lorikeet.lora import (
    LoraLinear,
    TokenLayer,
    Vocabulary,
    ids_by_table,
    lora_layers,
    match_targets,
    tables,
    token_layers,
    vocabulary,
    whole_parameters,
    wrap,
)


class SavesItself(Protocol):
    """A tokenizer, as far as an adapter folder needs one."""

    def save_pretrained(self, save_directory: str) -> object:
        """Write the tokenizer's files, the chat template among them, into a folder."""


def save_adapter(
    model: nn.Module,
    folder: Path,
    *,
    config: LoraConfig,
    base_model: str,
    provenance: dict[str, Any],
    tokenizer: SavesItself | None = None,
) -> None:
    """Write the model's adapter to `folder`, replacing what is there in one rename.

    The tensors are float32 whatever the compute type; the base model's weights are never written.
    An adapter that began with PiSSA is written as plain LoRA of twice the rank, which is right on
    the base as it is; PEFT calls this a conversion.
    "all-linear", which readers resolve in their own ways, becomes the list of names it stood for.

    Args:
        model: carries the adapter.
        folder: the adapter folder.
        config: what the adapter was injected with.
        base_model: path or hub id of the base model, for readers that load it themselves.
        provenance: goes under the key `lorikeet`: fingerprints, hashes, versions. New tokens that
            the adapter trains are added to it.
        tokenizer: saved beside the adapter if given.

    Raises:
        AdapterError: the model has no adapter, one that `config` does not describe, or values
            that are not finite; or new rows that it changes are not in it.
        StorageError: the disk refused a write; what was in `folder` is untouched.
    """
    with _without_tokens(model) as rows:
        tensors = _adapter_tensors(model, rows)
        portable = _portable(model, config)
        carried = {name: layer.tokens.tolist() for name, layer in rows.items()}
        gained = _gained(model, carried)
        _check_tokens(model, config, carried, gained.new_rows if gained else [])
        only_embedding = list(carried) == [tables(model).name] if carried else True
    indices = next(iter(carried.values()), None) if only_embedding else carried
    made_by = {key: value for key, value in provenance.items() if key != KEY}
    described = to_peft(
        portable.model_copy(update={"trainable_tokens": indices}),
        base_model=base_model,
        provenance=made_by | ({KEY: gained.summary()} if gained else {}),
        conv1d=_conv1d(model),
    )
    text = json.dumps(described, indent=2, ensure_ascii=False) + "\n"
    with atomic_folder(folder) as draft:
        (draft / CONFIG_FILE).write_text(text, encoding="utf-8")
        (draft / TENSORS_FILE).write_bytes(save(tensors, metadata={"format": "pt"}))
        if tokenizer is not None:
            tokenizer.save_pretrained(str(draft))


def load_adapter(model: nn.Module, folder: Path, *, tokenizer: Any = None) -> AdapterInfo:
    """Put the adapter of `folder` into `model`: every tensor in its place, or nothing at all.

    Masters are float32 whatever the file holds. PEFT writes the base's whole embedding beside an
    adapted one: it is compared with the model's own and not loaded.

    An adapter that was trained with new tokens makes the vocabulary grow first, for good: see
    `lorikeet.lora.grow`.

    Args:
        model: the base.
        folder: the adapter.
        tokenizer: the base's; needed for an adapter with new tokens, which it learns.

    Raises:
        AdapterError: the folder cannot be read, or the adapter does not fit: tensors that are
            missing, left over, misshapen or not finite, all listed; model and tokenizer are
            unchanged.
    """
    info, parts = read_parts(model, folder, tokenizer=tokenizer)
    model.requires_grad_(False)
    parts.put(model)
    return info


@contextmanager
def _without_tokens(model: nn.Module) -> Iterator[dict[str, TokenLayer]]:
    """Within the block trained tokens are off the model, whose names are the base's then.

    Yields the layers that hold rows.
    """
    layers = token_layers(model)
    wrap(model, {name: layer.base for name, layer in layers.items()})
    try:
        yield {name: layer for name, layer in layers.items() if layer.rows is not None}
    finally:
        wrap(model, layers)


def _gained(model: nn.Module, carried: Mapping[str, Sequence[int]]) -> Vocabulary | None:
    """What the vocabulary has gained, if the adapter has to do with it.

    Args:
        model: without its trained tokens.
        carried: ids by the table of which the adapter has rows.

    Raises:
        AdapterError: new rows of a table that the adapter changes are not part of it.
    """
    grown = vocabulary(model)
    if grown is None:
        return None
    found, new = tables(model), set(grown.new_rows)
    changed = {name.rpartition(".")[0] for name in whole_parameters(model)}
    adapted = [name for name in found.all if name in lora_layers(model)]
    if (
        not adapted
        and not changed & set(found.all)
        and not any(map(new.intersection, carried.values()))
    ):
        return None
    lacking = [
        name
        for name in (found.name, *found.heads, *(n for n in found.tied if n in carried))
        if name not in changed and not new.issubset(carried.get(name, ()))
    ]
    if lacking:
        raise AdapterError(
            f"the vocabulary has gained {grown}, whose rows are not part of this adapter and would"
            " be lost; train them too, or load the base anew. Rows are missing of:",
            lacking,
        )
    return grown


def _check_tokens(
    model: nn.Module,
    config: LoraConfig,
    carried: Mapping[str, Sequence[int]],
    new: Sequence[int],
) -> None:
    """Check that the configuration trains the tokens that the model carries, new ones apart.

    Raises:
        AdapterError: it does not.
    """
    described = ids_by_table(model, config.trainable_tokens)
    old = [
        {name: own for name in ids if (own := [n for n in ids[name] if n not in new])}
        for ids in (described, carried)
    ]
    if old[0] != old[1]:
        raise AdapterError(
            f"the configuration trains the tokens {_plain(old[0])}, the model {_plain(old[1])};"
            " give save_adapter what the adapter was injected with"
        )


def _plain(ids: Mapping[str, Sequence[int]]) -> object:
    """Ids for a message: those of one table alone, without its name."""
    return next(iter(ids.values())) if len(ids) == 1 else dict(ids) or "none"


def _adapter_tensors(model: nn.Module, tokens: Mapping[str, TokenLayer]) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for name, layer in lora_layers(model).items():
        for key, master in masters(name, layer).items():
            tensors[key] = master.detach().to("cpu", torch.float32).contiguous()
    for name, parameter in whole_parameters(model).items():
        key = whole_key(name, adapted=name.rpartition(".")[0] in lora_layers(model))
        tensors[key] = parameter.detach().cpu().contiguous()
    for name, own in tokens.items():
        if own.rows is not None:
            rows = own.rows.detach().to("cpu", torch.float32)
            tensors[token_name(name)] = rows.contiguous()
    if not tensors:
        raise AdapterError("the model carries no adapter to save")
    bad = [key for key, tensor in tensors.items() if not tensor.isfinite().all()]
    if bad:
        raise AdapterError("the adapter is not saved:", [listing("not finite", bad)])
    return tensors


def _conv1d(model: nn.Module) -> bool:
    """Whether the adapted linear layers store their weights transposed."""
    layers = lora_layers(model).values()
    return any(isinstance(layer, LoraLinear) and layer.transposed for layer in layers)


def _portable(model: nn.Module, config: LoraConfig) -> LoraConfig:
    """A configuration that any reader of PEFT's format resolves to the same modules.

    PEFT knows neither "all-linear" beside `layers` nor a regular expression beside them, so both
    become names: the last parts if these say the same, else full names.
    """
    layers = lora_layers(model).items()
    carried = {name: (layer.factors[0].shape[0], layer.scale) for name, layer in layers}
    config = _converted(config) if config.init == "pissa" else config
    candidates = [config]
    targets = config.target_modules
    if isinstance(targets, str) and (targets == "all-linear" or config.layers):
        leaves = sorted({name.rpartition(".")[2] for name in carried})
        full = {"target_modules": list(carried), "exclude_modules": None, "layers": None}
        candidates = [
            config.model_copy(update={"target_modules": leaves}),
            config.model_copy(update=full),
        ]
    for candidate in candidates:
        found = match_targets(model, candidate).targets
        described = {target.name: (target.r, target.scale) for target in found}
        if described.keys() == carried.keys() and all(
            r == carried[name][0] and math.isclose(scale, carried[name][1])
            for name, (r, scale) in described.items()
        ):
            return candidate
    raise AdapterError(
        f"the configuration does not describe the model's {len(carried)} LoRA layers;"
        " give save_adapter what the adapter was injected with"
    )


def _converted(config: LoraConfig) -> LoraConfig:
    """PiSSA's update as plain LoRA on the base as it is: twice the rank, at the same scale."""
    factor = math.sqrt(2) if config.rslora else 2
    changes = {
        "r": 2 * config.r,
        "alpha": factor * config.alpha,
        "rank_pattern": {key: 2 * r for key, r in config.rank_pattern.items()},
        "alpha_pattern": {key: factor * alpha for key, alpha in config.alpha_pattern.items()},
        "init": "kaiming",
    }
    return config.model_copy(update=changes)

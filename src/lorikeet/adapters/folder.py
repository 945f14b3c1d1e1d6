"""An adapter in a folder, in PEFT's format: written atomically, read strictly."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save
from torch import nn

from lorikeet.adapters.files import TENSORS_FILE, read_tensors
from lorikeet.adapters.fit import listing, misfits
from lorikeet.adapters.names import Part, tensor_name, token_name, whole_key
from lorikeet.adapters.schema import CONFIG_FILE, AdapterInfo, read_adapter_config, to_peft
from lorikeet.config import LoraConfig
from lorikeet.errors import AdapterError
from lorikeet.files import atomic_folder
from lorikeet.lora import (
    LoraEmbedding,
    LoraLayer,
    LoraLinear,
    TokenEmbedding,
    TokenLayer,
    inventory,
    layers_around,
    lora_layers,
    match_targets,
    put_whole,
    require_plain,
    token_layers,
    token_layers_around,
    trained_copies,
    whole_names,
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
        provenance: goes under the key `lorikeet`: fingerprints, hashes, versions.
        tokenizer: saved beside the adapter if given.

    Raises:
        AdapterError: the model has no adapter, one that `config` does not describe, or values
            that are not finite.
        StorageError: the disk refused a write; what was in `folder` is untouched.
    """
    with _without_tokens(model) as tokens:
        tensors = _adapter_tensors(model, tokens)
        portable = _portable(model, config)
    carried = [token for layer in tokens.values() for token in layer.tokens.tolist()]
    if carried != (config.trainable_tokens or []):
        raise AdapterError(
            f"the configuration trains the tokens {config.trainable_tokens or 'none'}, the model"
            f" {carried or 'none'}; give save_adapter what the adapter was injected with"
        )
    described = to_peft(
        portable, base_model=base_model, provenance=provenance, conv1d=_conv1d(model)
    )
    text = json.dumps(described, indent=2, ensure_ascii=False) + "\n"
    with atomic_folder(folder) as draft:
        (draft / CONFIG_FILE).write_text(text, encoding="utf-8")
        (draft / TENSORS_FILE).write_bytes(save(tensors, metadata={"format": "pt"}))
        if tokenizer is not None:
            tokenizer.save_pretrained(str(draft))


def load_adapter(model: nn.Module, folder: Path) -> AdapterInfo:
    """Put the adapter of `folder` into `model`: every tensor in its place, or nothing at all.

    Masters are float32 whatever the file holds. PEFT writes the base's whole embedding beside an
    adapted one: it is compared with the model's own and not loaded.

    Raises:
        AdapterError: the folder cannot be read, or the adapter does not fit: tensors that are
            missing, left over, misshapen or not finite, all listed; the model is unchanged.
    """
    info, parts = read_parts(model, folder)
    model.requires_grad_(False)
    parts.put(model)
    return info


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


def read_parts(model: nn.Module, folder: Path) -> tuple[AdapterInfo, Parts]:
    """The adapter of `folder`, made for the model, which does not use it yet.

    Raises:
        AdapterError: as `load_adapter`.
    """
    require_plain(model)
    info = read_adapter_config(folder)
    tensors = read_tensors(folder)
    match = match_targets(model, info.config)
    dora = info.config.dora
    adapted = {target.name for target in match.targets}
    names = whole_names(model, info.config, adapted)
    whole = {n: whole_key(n, adapted=n.rpartition(".")[0] in adapted) for n in names}
    tokens = token_layers_around(
        model, info.config.trainable_tokens or (), adapted=adapted, whole=names
    )
    rows = {token_name(name): layer.rows for name, layer in _embeddings(tokens).items()}
    shapes = {key: tuple(own.shape) for key, own in rows.items()}
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
        for key, master in _masters(name, layer).items():
            master.detach().copy_(tensors[key])
    copies = trained_copies(model, whole)
    for name, copy in copies.items():
        copy.detach().copy_(tensors[whole[name]])
    for key, own in rows.items():
        own.detach().copy_(tensors[key])
    return info, Parts({**layers, **tokens}, copies)


@contextmanager
def _without_tokens(model: nn.Module) -> Iterator[dict[str, TokenEmbedding]]:
    """Within the block trained tokens are off the model, whose names are the base's then."""
    layers = token_layers(model)
    wrap(model, {name: layer.base for name, layer in layers.items()})
    try:
        yield _embeddings(layers)
    finally:
        wrap(model, layers)


def _embeddings(layers: Mapping[str, TokenLayer]) -> dict[str, TokenEmbedding]:
    """The layers that hold rows."""
    return {name: layer for name, layer in layers.items() if isinstance(layer, TokenEmbedding)}


def _adapter_tensors(
    model: nn.Module, tokens: Mapping[str, TokenEmbedding]
) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for name, layer in lora_layers(model).items():
        for key, master in _masters(name, layer).items():
            tensors[key] = master.detach().to("cpu", torch.float32).contiguous()
    for name, parameter in whole_parameters(model).items():
        key = whole_key(name, adapted=name.rpartition(".")[0] in lora_layers(model))
        tensors[key] = parameter.detach().cpu().contiguous()
    for name, embedding in tokens.items():
        rows = embedding.rows.detach().to("cpu", torch.float32)
        tensors[token_name(name)] = rows.contiguous()
    if not tensors:
        raise AdapterError("the model carries no adapter to save")
    bad = [key for key, tensor in tensors.items() if not tensor.isfinite().all()]
    if bad:
        raise AdapterError("the adapter is not saved:", [listing("not finite", bad)])
    return tensors


def _masters(name: str, layer: LoraLayer) -> dict[str, torch.Tensor]:
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

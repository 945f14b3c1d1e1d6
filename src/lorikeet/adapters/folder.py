"""An adapter in a folder, in PEFT's format: written atomically, read strictly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save
from torch import nn

from lorikeet.adapters.files import TENSORS_FILE, read_tensors
from lorikeet.adapters.fit import listing, misfits, tensor_names
from lorikeet.adapters.schema import CONFIG_FILE, AdapterInfo, read_adapter_config, to_peft
from lorikeet.config import LoraConfig
from lorikeet.errors import AdapterError
from lorikeet.files import atomic_folder
from lorikeet.lora import (
    LoraEmbedding,
    attach,
    inventory,
    lora_layers,
    match_targets,
    require_plain,
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
    tensors = _adapter_tensors(model)
    portable = _portable(model, config)
    described = to_peft(portable, base_model=base_model, provenance=provenance)
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
    require_plain(model)
    info = read_adapter_config(folder)
    tensors = read_tensors(folder)
    match = match_targets(model, info.config)
    problems = list(match.broken) or misfits(model, match.targets, tensors)
    if problems:
        raise AdapterError(
            f"the adapter in {folder} does not fit the model, which has {inventory(model)}:",
            # An unused entry alone is harmless (PEFT keeps such); beside a misfit it explains.
            [*problems, *match.unused],
        )
    layers = attach(model, match.targets, dropout=info.config.dropout)
    with torch.no_grad():
        for target in match.targets:
            key_A, key_B = tensor_names(target.name, embedding=target.kind == "embedding")
            layers[target.name].lora_A.copy_(tensors[key_A])
            layers[target.name].lora_B.copy_(tensors[key_B])
    return info


def _adapter_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for name, layer in lora_layers(model).items():
        keys = tensor_names(name, embedding=isinstance(layer, LoraEmbedding))
        for key, master in zip(keys, (layer.lora_A, layer.lora_B), strict=True):
            tensors[key] = master.detach().to("cpu", torch.float32).contiguous()
    if not tensors:
        raise AdapterError("the model carries no adapter to save")
    bad = [key for key, tensor in tensors.items() if not tensor.isfinite().all()]
    if bad:
        raise AdapterError("the adapter is not saved:", [listing("not finite", bad)])
    return tensors


def _portable(model: nn.Module, config: LoraConfig) -> LoraConfig:
    """A configuration that any reader of PEFT's format resolves to the same modules.

    PEFT knows neither "all-linear" beside `layers` nor a regular expression beside them, so both
    become names: the last parts if these say the same, else full names.
    """
    carried = {name: (layer.r, layer.scale) for name, layer in lora_layers(model).items()}
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
        if {target.name: (target.r, target.scale) for target in found} == carried:
            return candidate
    raise AdapterError(
        f"the configuration does not describe the model's {len(carried)} LoRA layers;"
        " give save_adapter what the adapter was injected with"
    )

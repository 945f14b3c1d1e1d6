"""Adapters from PEFT folders and into them, without a model."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from lorikeet.adapters.adapter import Adapter, Kind, Tokens, Update
from lorikeet.adapters.checkpoint import is_head
from lorikeet.adapters.files import TENSORS_FILE, read_tensors
from lorikeet.adapters.fit import listing
from lorikeet.adapters.names import (
    PREFIX,
    Part,
    base_parameter,
    place,
    tensor_name,
    token_module,
    token_name,
    whole_key,
)
from lorikeet.adapters.schema import CONFIG_FILE, AdapterInfo, read_adapter_config, to_peft
from lorikeet.adapters.vocabulary import KEY, recorded, tokenizer_files
from lorikeet.config import LoraConfig
from lorikeet.errors import AdapterError
from lorikeet.files import atomic_folder
from lorikeet.lora import scaled_rank


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter folder: every tensor in its place, or nothing at all.

    Which modules are adapted is what the tensors say; whether a model has those modules is for
    `load_adapter` and `merge` to find out.

    Raises:
        AdapterError: the folder cannot be read, or its tensors are not those of the adapter that
            its configuration describes; lists every finding.
    """
    info = read_adapter_config(folder)
    tensors = read_tensors(folder)
    problems = list(_problems(info, tensors))
    if problems:
        raise AdapterError(f"the adapter in {folder} is not what it says it is:", problems)
    config = info.config
    rest = {k: t for k, t in tensors.items() if place(k) is None and token_module(k) is None}
    found = _token_rows(config, tensors)[0]
    updates: dict[str, Update] = {}
    linear: Kind = "conv1d" if info.conv1d else "linear"
    for module, (embedding, parts) in _by_module(tensors).items():
        kind: Kind = "embedding" if embedding else linear
        floats = {part: tensor.float() for part, tensor in parts.items()}
        scale = scaled_rank(config, module)[2]
        updates[module] = Update(floats["A"], floats["B"], scale, kind, floats.get("magnitude"))
    return Adapter(
        updates,
        base_model=info.base_model,
        provenance=info.provenance,
        dropout=config.dropout,
        copies={base_parameter(key): t for key, t in rest.items() if not _is_whole(config, key)},
        whole={base_parameter(key): t for key, t in rest.items() if _is_whole(config, key)},
        modules_to_save=tuple(config.modules_to_save or ()),
        bias=config.bias,
        tokens=tuple(Tokens(name, ids, rows.float()) for name, (ids, rows) in found.items()),
        vocabulary=recorded(info.provenance, tensors),
    )


def write_adapter(adapter: Adapter, folder: Path, *, tokenizer: Path | None = None) -> None:
    """Write an adapter to a folder in PEFT's format, replacing what is there in one rename.

    Modules are listed by their full names, so that every reader finds the same ones in any model.

    Args:
        adapter: what to write.
        folder: where.
        tokenizer: a folder whose tokenizer is copied, if it has one; what an adapter with new
            tokens needs everywhere but here.

    Raises:
        AdapterError: there is nothing to write, or values that are not finite.
        StorageError: the disk refused a write; what was in `folder` is untouched.
    """
    if not adapter.updates:
        raise AdapterError("the adapter updates no module; there is nothing to write")
    updates = {module: _portable(update) for module, update in adapter.updates.items()}
    tensors: dict[str, Tensor] = {}
    for module, update in updates.items():
        parts: dict[Part, Tensor | None] = {
            "A": update.A,
            "B": update.B,
            "magnitude": update.magnitude,
        }
        for part, tensor in parts.items():
            if tensor is not None:
                name = tensor_name(module, part, embedding=update.kind == "embedding")
                tensors[name] = tensor.float().contiguous()
    for parameter, tensor in adapter.whole.items():
        adapted = parameter.rpartition(".")[0] in updates
        tensors[whole_key(parameter, adapted=adapted)] = tensor.contiguous()
    for parameter, tensor in adapter.copies.items():
        if parameter.rpartition(".")[0] not in updates:  # it may hold rows that the base lacks
            tensors.setdefault(whole_key(parameter, adapted=False), tensor.contiguous())
    for tokens in adapter.tokens:
        tensors[token_name(tokens.module)] = tokens.rows.float().contiguous()
    bad = [key for key, tensor in tensors.items() if not tensor.isfinite().all()]
    if bad:
        raise AdapterError("the adapter is not written:", [listing("not finite", bad)])
    described = to_peft(
        _described(updates, adapter),
        base_model=adapter.base_model,
        provenance=_with_vocabulary(adapter),
        conv1d=any(update.kind == "conv1d" for update in updates.values()),
    )
    beside = tokenizer_files(tokenizer) if tokenizer else []
    text = json.dumps(described, indent=2, ensure_ascii=False) + "\n"
    with atomic_folder(folder) as draft:
        (draft / CONFIG_FILE).write_text(text, encoding="utf-8")
        (draft / TENSORS_FILE).write_bytes(save(tensors, metadata={"format": "pt"}))
        for file in beside:
            shutil.copyfile(file, draft / file.name)


def _with_vocabulary(adapter: Adapter) -> dict[str, Any]:
    """The provenance, saying what the vocabulary has gained."""
    others = {key: value for key, value in adapter.provenance.items() if key != KEY}
    return {**others, **({KEY: adapter.vocabulary.summary()} if adapter.vocabulary else {})}


def _by_module(tensors: Mapping[str, Tensor]) -> dict[str, tuple[bool, dict[Part, Tensor]]]:
    """Whether a module is an embedding, and its tensors, by module."""
    found: dict[str, tuple[bool, dict[Part, Tensor]]] = {}
    for key in sorted(tensors):  # A and B sort before the magnitude, which does not tell
        where = place(key)
        if where is not None:
            parts = found.setdefault(where.module, (where.embedding, {}))[1]
            parts[where.part] = tensors[key]
    return found


def _problems(info: AdapterInfo, tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """Every way in which the tensors are not those of the adapter that the file describes."""
    modules = _by_module(tensors)
    findings: dict[str, list[str]] = {
        "missing": [],
        "unexpected": [
            key
            for key in tensors
            if place(key) is None
            and token_module(key) is None
            and not _is_copy(key)
            and not _is_whole(info.config, key)
        ],
        "misshapen": [],
        "not floating-point": [k for k, t in tensors.items() if not t.is_floating_point()],
        "not finite": [k for k, t in tensors.items() if not t.isfinite().all()],
    }
    wanted: tuple[Part, ...] = ("A", "B", "magnitude") if info.config.dora else ("A", "B")
    for module, (embedding, parts) in modules.items():
        names = {part: tensor_name(module, part, embedding=embedding) for part in (*wanted, *parts)}
        findings["missing"] += [name for part, name in names.items() if part not in parts]
        findings["unexpected"] += [name for part, name in names.items() if part not in wanted]
        if "A" in parts and "B" in parts:
            findings["misshapen"] += _misshapen(info.config, module, parts)
    for what, found in _token_findings(info.config, tensors, modules).items():
        findings[what] += found
    if not modules:
        yield "it holds no tensor of a LoRA"
    for what, found in findings.items():
        if found:
            yield listing(what, found)


def _token_findings(
    config: LoraConfig, tensors: Mapping[str, Tensor], adapted: Collection[str]
) -> dict[str, list[str]]:
    """What is wrong with the rows of trained tokens, by kind of finding."""
    found, missing, unexpected = _token_rows(config, tensors)
    both = [f"{token_name(name)} of an adapted module" for name in found if name in adapted]
    return {
        "missing": missing,
        "unexpected": unexpected + both,
        "misshapen": [
            f"{token_name(name)} is {list(rows.shape)}, needed are rows of {len(ids)} tokens"
            for name, (ids, rows) in found.items()
            if rows.dim() != 2 or len(rows) != len(ids)
        ],
    }


def _token_rows(
    config: LoraConfig, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, tuple[tuple[int, ...], Tensor]], list[str], list[str]]:
    """Ids and rows of trained tokens by module; what is missing, and what is left over.

    Of a tied head PEFT may say the ids once more, and may write the embedding's rows once more.
    """
    held = {name: t for key, t in tensors.items() if (name := token_module(key)) is not None}
    given = config.trainable_tokens or []
    if isinstance(given, dict):
        named = {key: [n for n in held if n == key or n.endswith(f".{key}")] for key in given}
        found = {names[0]: given[key] for key, names in named.items() if len(names) == 1}
        missing = [
            f"the rows of the trained tokens of {key}"
            for key, names in named.items()
            if len(names) != 1 and given[key] not in found.values()
        ]
    else:
        modules = [name for name in held if not is_head(f"{name}.weight")] or list(held)
        found = dict.fromkeys(modules[:1], given) if given else {}
        missing = ["the rows of the trained tokens"] if given and not found else []
    others = [name for name in held if name not in found]
    unexpected = [
        token_name(name)
        for name in others
        if not any(torch.equal(held[name], held[own]) for own in found)
    ]
    return {name: (tuple(ids), held[name]) for name, ids in found.items()}, missing, unexpected


def _misshapen(config: LoraConfig, module: str, parts: Mapping[Part, Tensor]) -> Iterator[str]:
    r = scaled_rank(config, module)[0]
    a, b = parts["A"], parts["B"]
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != r or b.shape[1] != r:
        shapes = f"{list(a.shape)} and {list(b.shape)}"
        yield f"A and B of {module} are {shapes}, which is not rank {r}"
    elif "magnitude" in parts and parts["magnitude"].shape != b.shape[:1]:
        found = list(parts["magnitude"].shape)
        yield f"the magnitude of {module} is {found}, needed is {[b.shape[0]]}"


def _is_copy(key: str) -> bool:
    """Whether PEFT may have meant a copy of a base weight, as it writes of adapted embeddings."""
    return key.startswith(PREFIX) and key.endswith(".weight") and "lora_" not in key


def _is_whole(config: LoraConfig, key: str) -> bool:
    """Whether a tensor is a parameter of the base that was trained whole."""
    if not key.startswith(PREFIX) or "lora_" in key:
        return False
    name = base_parameter(key)
    if config.bias != "none" and name.endswith(".bias"):
        return True
    parts = name.split(".")[:-1]
    inside = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    return any(
        module.endswith(entry) for module in inside for entry in config.modules_to_save or []
    )


def _portable(update: Update) -> Update:
    """The same update with a scale that alpha / r gives back, bit for bit."""
    if update.scale * update.r / update.r == update.scale:
        return update
    return replace(update, B=update.B * update.scale, scale=1.0)


def _described(updates: Mapping[str, Update], adapter: Adapter) -> LoraConfig:
    """The configuration whose patterns give every module its rank and alpha."""
    ranks = {module: update.r for module, update in updates.items()}
    alphas = {module: update.scale * update.r for module, update in updates.items()}
    r, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return LoraConfig(
        r=int(r),
        alpha=alpha,
        dropout=adapter.dropout,
        target_modules=sorted(updates),
        rank_pattern={module: own for module, own in ranks.items() if own != r},
        alpha_pattern={module: own for module, own in alphas.items() if own != alpha},
        dora=any(update.magnitude is not None for update in updates.values()),
        modules_to_save=list(adapter.modules_to_save) or None,
        bias=adapter.bias,
        trainable_tokens=_trainable_tokens(adapter.tokens),
    )


def _trainable_tokens(tokens: Sequence[Tokens]) -> list[int] | dict[str, list[int]] | None:
    """Ids as PEFT has them: those of the embedding alone as a list, else by module."""
    if len(tokens) == 1 and not is_head(f"{tokens[0].module}.weight"):
        return list(tokens[0].ids)
    return {own.module: list(own.ids) for own in tokens} or None

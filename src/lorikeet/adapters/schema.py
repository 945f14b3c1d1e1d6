"""`adapter_config.json` as PEFT writes it, and what we can make of one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lorikeet.adapters.files import inside
from lorikeet.config import LoraConfig
from lorikeet.errors import AdapterError

CONFIG_FILE = "adapter_config.json"

# Our name of an option, PEFT's, and PEFT's default where a file leaves it out.
_OPTIONS: tuple[tuple[str, str, Any], ...] = (
    ("r", "r", 8),
    ("alpha", "lora_alpha", 8),
    ("dropout", "lora_dropout", 0.0),
    ("target_modules", "target_modules", None),
    ("exclude_modules", "exclude_modules", None),
    ("layers", "layers_to_transform", None),
    ("rank_pattern", "rank_pattern", {}),
    ("alpha_pattern", "alpha_pattern", {}),
    ("rslora", "use_rslora", False),
    ("dora", "use_dora", False),
    ("modules_to_save", "modules_to_save", None),
    ("bias", "bias", "none"),
    ("trainable_tokens", "trainable_token_indices", None),
)

# Keys that change nothing about a trained adapter. Those of initialisations only tell how A and B
# started. `layers_pattern` names the list that `layers_to_transform` counts in: the default finds
# it, and if it did not, the tensors would not fit.
_INERT = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version"),
    *("revision", "task_type", "megatron_core", "qalora_group_size", "layers_pattern"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config"),
    *("fan_in_fan_out", "init_lora_weights", "lorikeet"),
}

# Initialisations that leave the base model's weights alone; pissa, olora, corda, loftq ... replace
# them, and the adapter is only right on top of the replaced ones.
_PLAIN_INITS = (True, False, None, "gaussian", "orthogonal")


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """What an adapter folder says about itself.

    Attributes:
        config: rank, scale and targets.
        base_model: the model it was trained on, a path or a hub id; empty if not said.
        provenance: what Lorikeet wrote about the run; empty for adapters of other tools.
        conv1d: whether its linear layers are Conv1D, which store their weights transposed.
    """

    config: LoraConfig
    base_model: str = ""
    provenance: dict[str, Any] = field(default_factory=dict)
    conv1d: bool = False


def read_adapter_config(folder: Path) -> AdapterInfo:
    """Read `adapter_config.json` of an adapter folder.

    Raises:
        AdapterError: the folder or the file is missing or unreadable, a value is out of bounds, or
            the adapter uses features that Lorikeet does not have; lists every finding.
    """
    path = inside(folder, CONFIG_FILE)
    raw = _read_json(path)
    problems = list(_unsupported(raw))
    try:
        config = LoraConfig.model_validate(_options(raw))
    except ValidationError as error:
        problems += [_describe(item["loc"], item["msg"], item["input"]) for item in error.errors()]
    if problems:
        raise AdapterError(f"cannot use the adapter described by {path}:", problems)
    provenance = raw.get("lorikeet")
    return AdapterInfo(
        config=config,
        base_model=str(raw.get("base_model_name_or_path") or ""),
        provenance=provenance if isinstance(provenance, dict) else {},
        conv1d=raw.get("fan_in_fan_out") is True,
    )


def to_peft(
    config: LoraConfig, *, base_model: str, provenance: dict[str, Any], conv1d: bool = False
) -> dict[str, Any]:
    """The content of `adapter_config.json` for an adapter whose targets need no resolving.

    PEFT 0.21 reads the key `lorikeet` with a warning that it ignores it; no other tool says more.
    """
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": config.r,
        "lora_alpha": _plain(config.alpha),
        "lora_dropout": config.dropout,
        "target_modules": config.target_modules,
        "exclude_modules": config.exclude_modules,
        "layers_to_transform": config.layers or None,
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": {key: _plain(alpha) for key, alpha in config.alpha_pattern.items()},
        "use_rslora": config.rslora,
        "use_dora": config.dora,
        "bias": config.bias,
        "fan_in_fan_out": conv1d,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": config.modules_to_save,
        "trainable_token_indices": config.trainable_tokens or None,
        "lorikeet": provenance,
    }


def _plain(alpha: float) -> float | int:
    """16 rather than 16.0: some readers expect an integer."""
    return int(alpha) if alpha == int(alpha) else alpha


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise AdapterError(f"cannot read {path}: {error}") from None
    except json.JSONDecodeError as error:
        raise AdapterError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise AdapterError(f"{path} must hold an object, found a {type(raw).__name__}")
    return raw


def _unsupported(raw: dict[str, Any]) -> Iterator[str]:
    """What the adapter needs and we do not have."""
    peft_type = raw.get("peft_type")
    if peft_type != "LORA":
        yield f"peft_type is {peft_type!r}; only 'LORA' is supported"
        return
    if raw.get("target_modules") is None:
        yield "target_modules is missing: it does not say which modules it adapts"
    for key in ("r", "lora_alpha"):
        if key in raw and raw[key] is None:  # PEFT fails on it; only a key left out is its default
            yield (
                f"{key} is null, so that nothing tells how large an update is; put in the number"
                " that the adapter was trained with"
            )
    if raw.get("init_lora_weights") not in _PLAIN_INITS:
        yield (
            f"init_lora_weights is {raw['init_lora_weights']!r}, which may have changed the base"
            " model's weights; convert it to a plain LoRA with PEFT's"
            " `path_initial_model_for_weight_conversion`"
        )
    known = _INERT | {peft for _, peft, _ in _OPTIONS}
    for key, value in raw.items():
        if key not in known and value not in (None, False, "", [], {}):
            yield f"{key} is {value!r}: this feature of PEFT is not supported"


def _options(raw: dict[str, Any]) -> dict[str, Any]:
    """The values of our options, where PEFT writes null for its default, too."""
    options = {
        own: default if raw.get(peft) is None else raw[peft] for own, peft, default in _OPTIONS
    }
    if options["target_modules"] is None:
        del options["target_modules"]  # reported by `_unsupported`
    return options


def _describe(where: tuple[int | str, ...], message: str, found: object) -> str:
    names = {own: peft for own, peft, _ in _OPTIONS}
    if not where:  # options that do not go together
        return message.removeprefix("Value error, ")
    return f"{names.get(str(where[0]), where[0])}: {message} (found {found!r})"

"""Where the tensors of a checkpoint go in a GGUF file, and the keys that describe the model.

Pure functions over a config.json and the shapes of a checkpoint's tensors: no weight is read here.
Everything that llama.cpp could not run, or would run as something else, is refused at once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import gguf
import torch
from torch import Tensor

from lorikeet.errors import ModelError
from lorikeet.export.architectures import ARCHITECTURES, Architecture, Options, Shapes, Sizes
from lorikeet.export.rope import rotation
from lorikeet.gguf.metadata import Field

_SHOWN = 12  # findings in one message
_EMBEDDING, _NORM, _HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
_BUFFER = re.compile(r"(^|\.)rotary_emb\.inv_freq$")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_LARGEST = 2**31 - 1
_NUMBERS = (int, float)
_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("architectures", "layer_types"), (list,)),
    **dict.fromkeys(("rope_parameters", "rope_scaling"), (dict,)),
    **dict.fromkeys(("hidden_act", "hidden_activation"), (str,)),
    **dict.fromkeys(("sliding_window", "sliding_window_pattern"), (int,)),
    **dict.fromkeys(("tie_word_embeddings", "attention_bias", "mlp_bias"), (bool,)),
    **dict.fromkeys(("use_sliding_window", "use_bidirectional_attention"), (bool,)),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping"), _NUMBERS),
    **dict.fromkeys(("query_pre_attn_scalar", "rms_norm_eps"), _NUMBERS),
}
"""What optional keys of a config.json may be, besides null."""


@dataclass(frozen=True, slots=True)
class Placed:
    """A tensor of a GGUF file that comes from a checkpoint.

    Attributes:
        name: in the GGUF file.
        source: in the checkpoint.
        shape: in torch's order, the same in both.
        order: row i of the GGUF tensor is row `order[i]` of the checkpoint's, [rows]; None if rows
            stay where they are.
        added: added to every number, in float32.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    order: Tensor | None = None
    added: float = 0.0


@dataclass(frozen=True, slots=True)
class Layout:
    """What a GGUF file of a checkpoint holds.

    Attributes:
        architecture: GGUF's word for it, such as `llama`.
        placed: the tensors that come from the checkpoint, in its blocks' order.
        made: tensors that no checkpoint holds, float32, by GGUF name.
        metadata: `general.architecture` and every key under the architecture.
        layers: blocks.
        heads: of queries.
        kv_heads: of keys and values.
        rows: of the embedding, which a vocabulary must fill.
        notes: what llama.cpp runs in another way, and where that shows; for the user to read.
    """

    architecture: str
    placed: tuple[Placed, ...]
    made: dict[str, Tensor]
    metadata: dict[str, Field]
    layers: int
    heads: int
    kv_heads: int
    rows: int
    notes: tuple[str, ...] = field(default=())


def lay_out(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Layout:
    """Find the place of every tensor, and the keys.

    Args:
        config: the model's config.json, as transformers 4 or 5 writes it.
        shapes: of the checkpoint's tensors, by name; names may lack the prefix `model.`.

    Raises:
        ModelError: the architecture or an option is not supported, or tensors are unknown, missing
            or of other sizes than the config's; every finding at once.
    """
    described = _architecture(config)
    config = {**described.defaults, **config}
    problems = _kind_problems(config)
    sizes = _sizes(config, problems)
    if problems or sizes is None:
        raise _refusal(config, problems)
    problems += _general_problems(config) + _size_problems(described, sizes)
    options = Options()
    described.options(sizes, config, options)
    turning = rotation(
        config,
        head=sizes.head,
        context=sizes.context,
        theta=described.theta,
        kinds=described.rope,
        local_theta=described.local_theta,
        partial=described.partial,
    )
    problems += _activation_problems(described, config) + options.problems + turning.problems
    tied = bool(config.get("tie_word_embeddings", False))
    if not tied and not described.may_untie:
        problems.append(
            "its head has a weight of its own; llama.cpp ties the head of this architecture"
        )
    wanted = _wanted(described, sizes, config, tied=tied)
    sources = _sources(wanted, shapes)
    problems += _tensor_problems(wanted, sources, shapes, tied=tied)
    if problems:
        raise _refusal(config, problems)
    metadata = _metadata(described, sizes, config, {**turning.metadata, **options.metadata})
    return Layout(
        architecture=gguf.MODEL_ARCH_NAMES[described.arch],
        placed=_placed(described, sizes, wanted, sources),
        made=turning.made,
        metadata=metadata,
        layers=sizes.layers,
        heads=sizes.heads,
        kv_heads=sizes.kv_heads,
        rows=sizes.rows,
        notes=(*options.notes, *turning.notes),
    )


def arranged(placed: Placed, tensor: Tensor) -> Tensor:
    """A checkpoint's tensor as the GGUF file holds it, float32 of the same shape."""
    rows = tensor if placed.order is None else tensor[placed.order]
    return rows.float() + placed.added if placed.added else rows.float()


def restored(placed: Placed, tensor: Tensor) -> Tensor:
    """A GGUF file's tensor as the checkpoint held it: the inverse of `arranged`."""
    rows = tensor.float() - placed.added if placed.added else tensor
    if placed.order is None:
        return rows
    found = torch.empty_like(rows)
    found[placed.order] = rows
    return found


def _architecture(config: Mapping[str, Any]) -> Architecture:
    name = config.get("model_type")
    found = ARCHITECTURES.get(name) if isinstance(name, str) else None
    if found is None:
        known = ", ".join(ARCHITECTURES)
        hint = ""
        if any(config.get(key) for key in _EXPERTS):
            hint = "; mixtures of experts are not exported"
        elif "text_config" in config:
            hint = "; of a model with several parts, save the language model on its own"
        raise ModelError(
            f"a model of type {str(name)[:80]!r} cannot be exported to GGUF: supported are"
            f" {known}{hint}"
        )
    return found


def _refusal(config: Mapping[str, Any], problems: list[str]) -> ModelError:
    more = len(problems) - _SHOWN
    shown = problems[:_SHOWN] + ([f"and {more} more"] if more > 0 else [])
    heading = f"this {config['model_type']} model cannot be exported to GGUF:"
    return ModelError(heading, [problem[:400] for problem in shown])


def _kind_problems(config: Mapping[str, Any]) -> list[str]:
    found = []
    for name, kinds in _KINDS.items():
        value = config.get(name)
        fits = value is None or type(value) in kinds
        if not fits or (kinds == _NUMBERS and value is not None and not 0 <= value < math.inf):
            expected = " or ".join(kind.__name__ for kind in kinds)
            found.append(f"{name} in config.json is {str(value)[:60]!r}; expected {expected}")
    return found


def _general_problems(config: Mapping[str, Any]) -> list[str]:
    found = []
    if quantised := config.get("quantization_config"):
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        found.append(
            f"the checkpoint is quantised ({str(method)[:40]}): its weights are no plain numbers;"
            " export the original, or save a dequantised copy first"
        )
    if any(config.get(key) for key in _EXPERTS):
        found.append("it is a mixture of experts, which is not exported")
    names = config.get("architectures") or []
    if names and not any("CausalLM" in str(n) or str(n).endswith("Model") for n in names):
        found.append(f"architectures is {names}; expected a causal language model")
    return found


def _sizes(config: Mapping[str, Any], problems: list[str]) -> Sizes | None:
    """The sizes, or None where some are no sizes (which is then among the problems)."""

    def size(name: str) -> int:
        value = config.get(name)
        if type(value) is int and 0 < value <= _LARGEST:
            return value
        problems.append(f"{name} in config.json is {value!r}; expected a positive whole number")
        return 0

    hidden, heads = size("hidden_size"), size("num_attention_heads")
    layers, inner = size("num_hidden_layers"), size("intermediate_size")
    rows, context = size("vocab_size"), size("max_position_embeddings")
    given = {name for name, value in config.items() if value is not None}
    kv_heads = size("num_key_value_heads") if "num_key_value_heads" in given else heads
    head = size("head_dim") if "head_dim" in given else hidden // max(heads, 1)
    sizes = Sizes(rows, hidden, inner, layers, heads, kv_heads, head, context)
    whole = all(getattr(sizes, name) for name in Sizes.__dataclass_fields__)
    if config.get("rms_norm_eps") is None:
        problems.append("rms_norm_eps in config.json is None; expected a number")
    return sizes if whole else None


def _size_problems(described: Architecture, sizes: Sizes) -> list[str]:
    found = []
    if sizes.heads % sizes.kv_heads:
        found.append(f"{sizes.heads} heads cannot share {sizes.kv_heads} heads of keys and values")
    if sizes.head % 2:
        found.append(f"heads of {sizes.head} numbers cannot be rotated: expected an even number")
    if not described.head_is_free and sizes.heads * sizes.head != sizes.hidden:
        found.append(
            f"{sizes.heads} heads of {sizes.head} numbers are not the hidden size {sizes.hidden},"
            " which llama.cpp takes for granted in this architecture"
        )
    if sizes.layers > 512:
        found.append(f"it has {sizes.layers} layers; llama.cpp runs at most 512")
    return found


def _activation_problems(described: Architecture, config: Mapping[str, Any]) -> list[str]:
    name = config.get("hidden_activation") or config.get("hidden_act") or "silu"
    if name in described.activations:
        return []
    expected = ", ".join(sorted(described.activations))
    return [f"the activation function is {name}; llama.cpp has {expected} built in"]


def _wanted(
    described: Architecture, sizes: Sizes, config: Mapping[str, Any], *, tied: bool
) -> Shapes:
    found = {_EMBEDDING: (sizes.rows, sizes.hidden), _NORM: (sizes.hidden,)}
    if not tied:
        found[_HEAD] = (sizes.rows, sizes.hidden)
    for layer in range(sizes.layers):
        block = described.block(sizes, config)
        found |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
    return found


def _sources(wanted: Shapes, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Under which name the checkpoint has each tensor: a base model's lack the prefix."""
    found = {}
    for name in wanted:
        for spelling in (name, name.removeprefix("model."), f"model.{name}"):
            if spelling in shapes:
                found[name] = spelling
                break
    return found


def _tensor_problems(
    wanted: Shapes,
    sources: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    tied: bool,
) -> list[str]:
    found = []
    for name, expected in wanted.items():
        if name not in sources:
            found.append(f"the checkpoint lacks {name} {list(expected)}")
        elif (given := tuple(shapes[sources[name]])) != expected:
            source = sources[name]
            found.append(f"{source} is {list(given)}; config.json implies {list(expected)}")
    skipped = {_HEAD} if tied else set()
    known = set(sources.values()) | skipped
    found += [
        f"{name[:200]} {list(shape)} has no place in this architecture"
        for name, shape in shapes.items()
        if name not in known and not _BUFFER.search(name)
    ]
    return found


def _placed(
    described: Architecture, sizes: Sizes, wanted: Shapes, sources: Mapping[str, str]
) -> tuple[Placed, ...]:
    names = gguf.get_tensor_name_map(described.arch, sizes.layers)
    orders = {
        "q_proj": _neighbours(sizes.heads, sizes.head),
        "k_proj": _neighbours(sizes.kv_heads, sizes.head),
    }
    found = []
    for name, shape in wanted.items():
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise RuntimeError(f"the gguf package has no name for {name} of {described.arch.name}")
        module = name.rsplit(".", 2)[-2]
        norm = described.norms_from_one and module.endswith("norm")
        found.append(
            Placed(
                name=target,
                source=sources[name],
                shape=shape,
                order=orders.get(module) if described.permuted else None,
                added=1.0 if norm else 0.0,
            )
        )
    return tuple(found)


def _neighbours(heads: int, head: int) -> Tensor:
    """Rows so that those which turn together, i and i + d/2 of a head, become neighbours."""
    return torch.arange(heads * head).view(heads, 2, head // 2).transpose(1, 2).reshape(-1)


def _metadata(
    described: Architecture, sizes: Sizes, config: Mapping[str, Any], more: Mapping[str, Field]
) -> dict[str, Field]:
    keys = gguf.Keys
    arch = gguf.MODEL_ARCH_NAMES[described.arch]
    own = {
        keys.LLM.BLOCK_COUNT: Field("u32", sizes.layers),
        keys.LLM.CONTEXT_LENGTH: Field("u32", sizes.context),
        keys.LLM.EMBEDDING_LENGTH: Field("u32", sizes.hidden),
        keys.LLM.FEED_FORWARD_LENGTH: Field("u32", sizes.inner),
        keys.LLM.VOCAB_SIZE: Field("u32", sizes.rows),
        keys.Attention.HEAD_COUNT: Field("u32", sizes.heads),
        keys.Attention.HEAD_COUNT_KV: Field("u32", sizes.kv_heads),
        keys.Attention.KEY_LENGTH: Field("u32", sizes.head),
        keys.Attention.VALUE_LENGTH: Field("u32", sizes.head),
        keys.Attention.LAYERNORM_RMS_EPS: Field("f32", float(config["rms_norm_eps"])),
        **more,
    }
    general = {
        keys.General.ARCHITECTURE: Field("str", arch),
        keys.General.TYPE: Field("str", gguf.GGUFType.MODEL),
    }
    return general | {key.format(arch=arch): value for key, value in own.items()}

"""Which type each tensor gets: the mixtures of llama-quantize, and the float types.

A kind such as q4_k_m names a mixture: most tensors get one type, those that matter more a finer
one. Source of every rule: llama.cpp, src/llama-quant.cpp (tensor_allows_quantization,
llama_tensor_get_type_impl, tensor_type_fallback) and, for f32, f16 and bf16, conversion/base.py.
Left out are the rules for Falcon and for architectures with parts that are not attention or
feed-forward layers (state spaces, Gemma 3n, encoders).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from gguf import LlamaFileType

from lorikeet.errors import ConfigError
from lorikeet.gguf.blocks import TYPES

_FLOATS = {"f32": "F32", "f16": "F16", "bf16": "BF16"}

_MAIN = {
    "q8_0": "Q8_0",
    "q4_0": "Q4_0",
    "q5_0": "Q5_0",
    "q5_1": "Q5_1",
    "q4_k_s": "Q4_K",
    "q4_k_m": "Q4_K",
    "q5_k_s": "Q5_K",
    "q5_k_m": "Q5_K",
    "q6_k": "Q6_K",
    "q3_k_m": "Q3_K",
    "q2_k": "Q2_K",
}
"""The type of most tensors of a mixture."""

KINDS: tuple[str, ...] = (*_FLOATS, *_MAIN)
"""What a file can be made as."""

_FALLBACK = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""For rows that are no multiple of 256."""

_NEVER = ("_norm.weight", "ffn_gate_inp.weight")
"""Parts of names that are not quantised; neither are position_embd and token_types."""

_CATEGORIES = (
    ("value", "attn_qkv.weight"),
    ("value", "attn_kv_b.weight"),
    ("value", "attn_v.weight"),
    ("key", "attn_k.weight"),
    ("attention output", "attn_output.weight"),
    ("down", "ffn_down"),
)
"""What a name must contain; the first that fits counts. A fused q, k, v counts as a value."""


@dataclass(frozen=True, slots=True)
class Assigned:
    """The types of a file's tensors.

    Attributes:
        types: type by tensor name, in the order in which the tensors were given.
        fallbacks: tensors whose rows do not divide into the blocks of the type that the mixture
            had for them, with that type.
    """

    types: Mapping[str, str]
    fallbacks: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class _Model:
    """What the rules ask about a model.

    Attributes:
        kind: of the file.
        layers: blocks.
        values: tensors of the category "value".
        shared: query heads to a key-value head, rounded down; zero without key-value heads.
        experts: of a layer; zero or one without.
        tied: there is no output tensor, the embedding is used for it.
        large: llama.cpp takes it for one of its models of 70 billion parameters.
        importance: there is an importance matrix.
    """

    kind: str
    layers: int
    values: int
    shared: int
    experts: int
    tied: bool
    large: bool
    importance: bool


def file_type(kind: str) -> int:
    """The number of a kind, as `general.file_type` has it.

    Raises:
        ConfigError: an unknown kind.
    """
    _known(kind)
    name = "ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"
    return int(LlamaFileType[name])


def assign(
    kind: str,
    tensors: Sequence[tuple[str, tuple[int, ...]]],
    *,
    architecture: str,
    layers: int,
    heads: int,
    kv_heads: int,
    experts: int = 0,
    importance: bool = False,
) -> Assigned:
    """The type of every tensor, as llama-quantize chooses it.

    Args:
        kind: one of `KINDS`.
        tensors: names and shapes, the shapes as torch has them ([outputs, inputs]).
        architecture: as `general.architecture` has it.
        layers: blocks of the model.
        heads: query heads.
        kv_heads: key-value heads.
        experts: of a layer, zero without.
        importance: whether the encoders are given importance, which some mixtures depend on.

    Raises:
        ConfigError: an unknown kind.
    """
    _known(kind)
    names = [name for name, _ in tensors]
    model = _Model(
        kind=kind,
        layers=layers,
        values=sum(_category(name) == "value" for name in names),
        shared=heads // kv_heads if kv_heads else 0,
        experts=experts,
        tied="output.weight" not in names,
        large=layers == 80
        and (architecture == "qwen2" or (architecture == "llama" and heads != kv_heads)),
        importance=importance,
    )
    seen: Counter[str] = Counter()
    types, fallbacks = dict.fromkeys(names, "F32"), {}
    for name, shape in sorted(tensors, key=_visited):
        if not _quantised(name, shape):
            continue
        if kind in _FLOATS:
            types[name] = _FLOATS[kind]
            continue
        wanted = _wanted(name, shape[-1], model, seen)
        types[name] = _fitting(wanted, shape[-1])
        if types[name] != wanted:
            fallbacks[name] = wanted
    return Assigned(MappingProxyType(types), MappingProxyType(fallbacks))


def _known(kind: str) -> None:
    if kind not in KINDS:
        raise ConfigError(f"{kind} is not a type of file: choose one of {', '.join(KINDS)}")


def _visited(tensor: tuple[str, tuple[int, ...]]) -> tuple[int, bytes]:
    """Sorts as llama.cpp visits: what is outside the blocks, then block by block, by name."""
    layer = _layer(tensor[0])
    return (-1 if layer is None else layer, tensor[0].encode())


def _layer(name: str) -> int | None:
    found = re.match(r"blk\.(\d+)", name)
    return int(found[1]) if found else None


def _quantised(name: str, shape: tuple[int, ...]) -> bool:
    """Matrices named weight, but for a few. Leading dimensions of one do not count."""
    return (
        any(size > 1 for size in shape[:-1])
        and name.endswith("weight")
        and name not in ("position_embd.weight", "token_types.weight")
        and not any(part in name for part in _NEVER)
    )


def _category(name: str) -> str:
    return next((category for category, part in _CATEGORIES if part in name), "other")


def _wanted(name: str, width: int, model: _Model, seen: Counter[str]) -> str:
    """The type that the mixture has for a tensor; counts the tensors of its category."""
    main = _MAIN[model.kind]
    if name == "output.weight":
        return _for_output(main, width)
    if name in ("token_embd.weight", "per_layer_token_embd.weight"):
        return _for_output(main, width) if model.tied else main
    category = _category(name)
    index = seen[category]
    seen[category] += 1
    if category == "value":
        return _for_value(index, main, model)
    if category == "key":
        return "Q8_0" if model.experts == 8 else main
    if category == "down":
        layer = _layer(name) if model.experts > 1 else None
        return _for_down(index if layer is None else layer, main, model)
    if category == "attention output":
        return _for_attention_output(main, model)
    return main


def _for_output(main: str, width: int) -> str:
    if width % TYPES[main].weights or main == "Q8_0":
        return "Q8_0"
    return "Q6_K"


def _for_value(index: int, main: str, model: _Model) -> str:
    chosen = main
    if model.kind == "q2_k":
        chosen = "Q4_K" if model.shared >= 4 else "Q3_K"
    elif model.kind == "q3_k_m":
        chosen = "Q5_K" if index < 2 else "Q4_K"
    elif model.kind in ("q4_k_m", "q5_k_m") and _more_bits(index, model.values):
        chosen = "Q6_K"
    elif model.kind == "q4_k_s" and index < 4:
        chosen = "Q5_K"
    if model.large and chosen in ("Q3_K", "Q4_K"):  # eight query heads share each value
        chosen = "Q5_K"
    return "Q8_0" if model.experts == 8 else chosen


def _for_down(layer: int, main: str, model: _Model) -> str:
    if model.kind == "q2_k":
        return "Q3_K"
    if model.kind == "q3_k_m":
        return "Q5_K" if layer < model.layers // 16 else "Q4_K"
    if model.kind in ("q4_k_m", "q5_k_m"):
        return "Q6_K" if _more_bits(layer, model.layers) else main
    if layer < model.layers // 8:
        if model.kind == "q4_k_s":
            return "Q5_K"
        if model.importance and model.kind in ("q4_0", "q5_0"):
            return "Q4_1" if model.kind == "q4_0" else "Q5_1"
    return main


def _for_attention_output(main: str, model: _Model) -> str:
    if model.experts == 8:
        return "Q5_K" if model.kind in ("q2_k", "q3_k_m", "q4_k_s", "q4_k_m") else main
    return {"q2_k": "Q3_K", "q3_k_m": "Q4_K"}.get(model.kind, main)


def _more_bits(index: int, count: int) -> bool:
    """The first eighth, the last, and every third between them."""
    first = count // 8
    return index < first or index >= 7 * count // 8 or (index - first) % 3 == 2


def _fitting(wanted: str, width: int) -> str:
    """The type itself, else one of smaller blocks, else float16."""
    if width % TYPES[wanted].weights == 0:
        return wanted
    smaller = _FALLBACK.get(wanted, wanted)
    return smaller if width % TYPES[smaller].weights == 0 else "F16"

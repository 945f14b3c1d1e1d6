"""The architectures that are exported: their tensors, and what llama.cpp runs of their options.

An architecture is what a checkpoint of it holds (names and shapes, from its config.json), how its
numbers become those that llama.cpp expects, and the options that llama.cpp has another mind about.
The facts are those of llama.cpp's `src/models/*.cpp` and of its conversion scripts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import gguf

from lorikeet.gguf.metadata import Field

Shapes = dict[str, tuple[int, ...]]

_TANH_GELU = frozenset({"gelu_pytorch_tanh", "gelu_new", "gelu_fast"})


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes of a model.

    Attributes:
        rows: of the embedding.
        hidden: width of the residual stream.
        inner: width of the gated layer.
        layers: blocks.
        heads: of queries.
        kv_heads: of keys and values.
        head: numbers in a head.
        context: positions.
    """

    rows: int
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head: int
    context: int


@dataclass(slots=True)
class Options:
    """What an architecture's options come to.

    Attributes:
        metadata: keys with a place for the architecture (`{arch}`).
        problems: what llama.cpp cannot run.
        notes: what it runs in another way, and where that shows.
    """

    metadata: dict[str, Field] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Architecture:
    """One `model_type`.

    Attributes:
        arch: GGUF's architecture.
        block: the tensors of one block, without the prefix `model.layers.N.`.
        activations: what config.json may call the activation function.
        defaults: what transformers takes for keys that config.json leaves out.
        options: reads the options that only some architectures have.
        rope: rope types besides `default`.
        theta: base frequency by default.
        local_theta: that of layers with a sliding window, if they have their own.
        partial: whether only a part of each head may be turned.
        permuted: whether llama.cpp turns neighbours, (0, 1), (2, 3), ..., where transformers turns
            halves, (0, d/2), (1, d/2 + 1), ...: rows of q and k then change places.
        norms_from_one: whether a norm multiplies with 1 + w, which llama.cpp wants added.
        head_is_free: whether heads times their size may differ from the hidden size.
        may_untie: whether there may be a head of its own.
    """

    arch: gguf.MODEL_ARCH
    block: Callable[[Sizes, Mapping[str, Any]], Shapes]
    activations: frozenset[str] = frozenset({"silu", "swish"})
    defaults: Mapping[str, Any] = field(default_factory=dict)
    options: Callable[[Sizes, Mapping[str, Any], Options], None] = lambda sizes, config, found: None
    rope: frozenset[str] = frozenset({"linear", "yarn"})
    theta: float = 10_000.0
    local_theta: float | None = None
    partial: bool = False
    permuted: bool = False
    norms_from_one: bool = False
    head_is_free: bool = True
    may_untie: bool = True


def _attention(sizes: Sizes) -> Shapes:
    queries, keys = sizes.heads * sizes.head, sizes.kv_heads * sizes.head
    return {
        "self_attn.q_proj.weight": (queries, sizes.hidden),
        "self_attn.k_proj.weight": (keys, sizes.hidden),
        "self_attn.v_proj.weight": (keys, sizes.hidden),
        "self_attn.o_proj.weight": (sizes.hidden, queries),
    }


def _gated(sizes: Sizes) -> Shapes:
    return {
        "mlp.gate_proj.weight": (sizes.inner, sizes.hidden),
        "mlp.up_proj.weight": (sizes.inner, sizes.hidden),
        "mlp.down_proj.weight": (sizes.hidden, sizes.inner),
    }


def _norms(sizes: Sizes, *names: str) -> Shapes:
    return {f"{name}.weight": (sizes.hidden,) for name in names}


def _biases(weights: Shapes) -> Shapes:
    return {name.replace(".weight", ".bias"): shape[:1] for name, shape in weights.items()}


def _two_norms(sizes: Sizes) -> Shapes:
    return _norms(sizes, "input_layernorm", "post_attention_layernorm")


def _llama(sizes: Sizes, config: Mapping[str, Any]) -> Shapes:
    attention, gated = _attention(sizes), _gated(sizes)
    found = {**_two_norms(sizes), **attention, **gated}
    if config.get("attention_bias"):
        found |= _biases(attention)
    if config.get("mlp_bias"):
        found |= _biases(gated)
    return found


def _plain(sizes: Sizes, config: Mapping[str, Any]) -> Shapes:
    return {**_two_norms(sizes), **_attention(sizes), **_gated(sizes)}


def _qwen2(sizes: Sizes, config: Mapping[str, Any]) -> Shapes:
    biases = _biases(_attention(sizes))
    del biases["self_attn.o_proj.bias"]
    return _plain(sizes, config) | biases


def _head_norms(sizes: Sizes) -> Shapes:
    return {f"self_attn.{name}_norm.weight": (sizes.head,) for name in "qk"}


def _qwen3(sizes: Sizes, config: Mapping[str, Any]) -> Shapes:
    return _plain(sizes, config) | _head_norms(sizes)


def _gemma2(sizes: Sizes, config: Mapping[str, Any]) -> Shapes:
    around_mlp = ("pre_feedforward_layernorm", "post_feedforward_layernorm")
    return _plain(sizes, config) | _norms(sizes, *around_mlp)


def _gemma3(sizes: Sizes, config: Mapping[str, Any]) -> Shapes:
    return _gemma2(sizes, config) | _head_norms(sizes)


def _phi3(sizes: Sizes, config: Mapping[str, Any]) -> Shapes:
    rows = (sizes.heads + 2 * sizes.kv_heads) * sizes.head
    return {
        **_two_norms(sizes),
        "self_attn.qkv_proj.weight": (rows, sizes.hidden),
        "self_attn.o_proj.weight": (sizes.hidden, sizes.heads * sizes.head),
        "mlp.gate_up_proj.weight": (2 * sizes.inner, sizes.hidden),
        "mlp.down_proj.weight": (sizes.hidden, sizes.inner),
    }


def _no_bias(sizes: Sizes, config: Mapping[str, Any], found: Options) -> None:
    if config.get("attention_bias"):
        found.problems.append(
            "attention_bias is true; llama.cpp has no output bias in this architecture"
        )


def _ignored_window(sizes: Sizes, config: Mapping[str, Any], found: Options) -> None:
    """llama.cpp attends to everything here: equal to a sliding window up to its size."""
    window = config.get("sliding_window")
    if window and 0 < window < sizes.context:
        found.notes.append(
            f"llama.cpp attends to everything where this model attends to the last {window:,}"
            " tokens: answers differ in longer contexts"
        )


def _qwen_options(sizes: Sizes, config: Mapping[str, Any], found: Options) -> None:
    _no_bias(sizes, config, found)
    sliding = "sliding_attention" in (config.get("layer_types") or ())
    if config.get("use_sliding_window") or sliding:
        _ignored_window(sizes, config, found)


def _phi3_options(sizes: Sizes, config: Mapping[str, Any], found: Options) -> None:
    _ignored_window(sizes, config, found)
    found.metadata[gguf.Keys.Attention.SLIDING_WINDOW] = Field(
        "u32", min(max(config.get("sliding_window") or 0, 0), 2**31 - 1)
    )


def _gemma_options(sizes: Sizes, config: Mapping[str, Any], found: Options) -> None:
    _no_bias(sizes, config, found)
    if config.get("use_bidirectional_attention"):
        found.problems.append("use_bidirectional_attention is true; llama.cpp attends causally")


def _alternating(
    sizes: Sizes, config: Mapping[str, Any], found: Options, *, period: int, largest: int
) -> None:
    """Gemma 2 and 3: layers with a window, of which every `period`-th attends to everything.

    Args:
        sizes: of the model.
        config: its config.json.
        found: gains keys and problems.
        period: 2 or 6; llama.cpp has the pattern built in.
        largest: blocks of the largest model, by which llama.cpp tells that attention is scaled by
            the width of a head as hidden size / heads, not by the size of a head.
    """
    _gemma_options(sizes, config, found)
    types = config.get("layer_types") or [
        "full_attention"
        if (i + 1) % max(config.get("sliding_window_pattern") or period, 1) == 0
        else "sliding_attention"
        for i in range(sizes.layers)
    ]
    window = config.get("sliding_window")
    built_in = [
        "full_attention" if i % period == period - 1 else "sliding_attention"
        for i in range(sizes.layers)
    ]
    if types != built_in:
        found.problems.append(
            f"layer_types: llama.cpp has it built in that each layer whose number {period} divides"
            " attends to everything and the others to a window"
        )
    if not window or not 0 < window < 2**31:
        found.problems.append(f"sliding_window is {window}; expected a number of tokens")
    else:
        found.metadata[gguf.Keys.Attention.SLIDING_WINDOW] = Field("u32", window)
    scale = sizes.hidden // sizes.heads if sizes.layers == largest else sizes.head
    if config.get("query_pre_attn_scalar", sizes.head) != scale:
        found.problems.append(
            f"query_pre_attn_scalar is {config['query_pre_attn_scalar']}; llama.cpp has {scale}"
            " built in for a model of these sizes"
        )


def _gemma2_options(sizes: Sizes, config: Mapping[str, Any], found: Options) -> None:
    _alternating(sizes, config, found, period=2, largest=46)
    for name, key in (
        ("attn_logit_softcapping", gguf.Keys.LLM.ATTN_LOGIT_SOFTCAPPING),
        ("final_logit_softcapping", gguf.Keys.LLM.FINAL_LOGIT_SOFTCAPPING),
    ):
        cap = config.get(name)
        if cap:
            found.metadata[key] = Field("f32", float(cap))
        else:
            found.problems.append(f"{name} is {cap}; llama.cpp caps these logits in any case")


def _gemma3_options(sizes: Sizes, config: Mapping[str, Any], found: Options) -> None:
    _alternating(sizes, config, found, period=6, largest=62)
    if config.get("attn_logit_softcapping"):
        found.problems.append("attn_logit_softcapping is set; llama.cpp does not cap these logits")
    if cap := config.get("final_logit_softcapping"):
        found.metadata[gguf.Keys.LLM.FINAL_LOGIT_SOFTCAPPING] = Field("f32", float(cap))


_LLAMA_ROPE = frozenset({"linear", "yarn", "llama3", "longrope"})

ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(
        gguf.MODEL_ARCH.LLAMA,
        _llama,
        rope=_LLAMA_ROPE,
        permuted=True,
        defaults={"rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
    ),
    "mistral": Architecture(
        gguf.MODEL_ARCH.LLAMA,
        _plain,
        rope=_LLAMA_ROPE,
        permuted=True,
        options=_ignored_window,
        defaults={
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
        },
    ),
    "qwen2": Architecture(
        gguf.MODEL_ARCH.QWEN2,
        _qwen2,
        options=_qwen_options,
        head_is_free=False,
        defaults={
            "num_key_value_heads": 32,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 32768,
            "sliding_window": 4096,
        },
    ),
    "qwen3": Architecture(
        gguf.MODEL_ARCH.QWEN3,
        _qwen3,
        options=_qwen_options,
        defaults={
            "num_key_value_heads": 32,
            "head_dim": 128,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 32768,
            "sliding_window": 4096,
        },
    ),
    "gemma": Architecture(
        gguf.MODEL_ARCH.GEMMA,
        _plain,
        # The first files say gelu; they were trained with its tanh form and are run so everywhere.
        activations=_TANH_GELU | {"gelu"},
        options=_gemma_options,
        norms_from_one=True,
        may_untie=False,
        defaults={
            "num_key_value_heads": 16,
            "head_dim": 256,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
            "hidden_act": "gelu_pytorch_tanh",
        },
    ),
    "gemma2": Architecture(
        gguf.MODEL_ARCH.GEMMA2,
        _gemma2,
        activations=_TANH_GELU,
        options=_gemma2_options,
        norms_from_one=True,
        may_untie=False,
        defaults={
            "num_key_value_heads": 4,
            "head_dim": 256,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
    ),
    "gemma3_text": Architecture(
        gguf.MODEL_ARCH.GEMMA3,
        _gemma3,
        activations=_TANH_GELU,
        options=_gemma3_options,
        rope=frozenset({"linear"}),
        theta=1_000_000.0,
        local_theta=10_000.0,
        norms_from_one=True,
        defaults={
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 131072,
            "tie_word_embeddings": True,
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
        },
    ),
    "phi3": Architecture(
        gguf.MODEL_ARCH.PHI3,
        _phi3,
        options=_phi3_options,
        rope=frozenset({"longrope"}),
        partial=True,
        head_is_free=False,
        defaults={"rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
    ),
}
"""The architectures by `model_type`."""

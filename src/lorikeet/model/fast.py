"""The fast path: Llama-like models run through `kernels` instead of their own forward pass.

It reads the model's modules at every call, so that adapters may come and go; it renames nothing and
changes no class. Which models it takes is `refusal`; whether it computes what they compute is tried
at load (`model/agreement.py`).

Shapes: T tokens of the packed row, I hidden size, H query heads, K key-value heads, D head size,
S supervised rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lorikeet import kernels
from lorikeet.data.batch import Batch
from lorikeet.kernels import Dropout, Int8Weight, Normal, Projection, quantize_weight
from lorikeet.lora import LoraLinear, carries_dora
from lorikeet.model.attention import Documents, attend
from lorikeet.model.loss import token_nll

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
"""Architectures (transformers' names) whose blocks `_block` describes."""

_STEP = 32
"""The row is padded to a multiple of this: oneDNN compiles its products for every new length."""


@dataclass(frozen=True)
class FastNll:
    """`token_nll` through the kernels.

    Attributes:
        recompute: how many blocks, from the first on, keep only their input and are computed again
            in the backward pass.
        rounded: frozen weights that are multiplied in int8, from `int8_weights`.
    """

    recompute: int = 0
    rounded: Mapping[Tensor, Int8Weight] = field(default_factory=dict, repr=False)

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Nats of each supervised token, [S]; see `lorikeet.model.token_nll`.

        A model that carries DoRA takes its own forward pass: no kernel scales rows.
        """
        if carries_dora(model):
            return token_nll(model, batch)
        return _token_nll(model, batch, self)


def int8_weights(model: Any) -> dict[Tensor, Int8Weight]:
    """Every frozen linear weight of the blocks and the head, rounded to int8."""
    found: dict[Tensor, Int8Weight] = {}
    for layer in model.model.layers:
        for module in layer.modules():
            if _is_frozen(module):
                found[module.weight] = quantize_weight(module.weight)
    if _is_frozen(model.lm_head):  # its logits alone are made in int8
        found[model.lm_head.weight] = quantize_weight(model.lm_head.weight, backward=False)
    return found


def _is_frozen(module: nn.Module) -> TypeGuard[nn.Linear]:
    return type(module) is nn.Linear and not module.weight.requires_grad


def refusal(model: Any) -> str | None:
    """Why the fast path does not take a model; None if it does."""
    config = model.config
    if config.model_type not in MODEL_TYPES:
        return f"its architecture ({config.model_type}) is not one of {', '.join(MODEL_TYPES)}"
    if config.hidden_act != "silu":
        return f"its activation is {config.hidden_act}, not silu"
    if getattr(config, "attention_dropout", 0.0):
        return f"it drops attention weights (attention_dropout {config.attention_dropout})"
    if next(model.parameters()).device.type != "cpu":
        return "its kernels have been measured on CPUs only"
    return None


@dataclass(frozen=True)
class _Pass:
    """What every block needs to know of a forward pass: the packed row, dropout, int8 weights."""

    cu_seqlens: Tensor
    documents: Documents
    cos: Tensor
    sin: Tensor
    dropout_key: int | None = None  # None without dropout
    rounded: Mapping[Tensor, Int8Weight] = field(default_factory=dict)

    @staticmethod
    def over(body: Any, x: Tensor, positions: Tensor, lengths: Sequence[int]) -> _Pass:
        """The pass over hidden rows x [T, I] of documents of these lengths."""
        # float32 angles, where transformers rounds them to the model's dtype
        wide = x.new_empty(0, dtype=torch.promote_types(x.dtype, torch.float32))
        cos, sin = (table[0].contiguous() for table in body.rotary_emb(wide, positions[None]))
        ends = torch.tensor([0, *lengths]).cumsum(0).int()
        return _Pass(ends, Documents.of(lengths, device=x.device, dtype=x.dtype), cos, sin)

    def projection(self, module: Any) -> Projection:
        """A linear module, adapted or not, as the kernels take it."""
        if not isinstance(module, LoraLinear):
            if type(module) is not nn.Linear:
                raise TypeError(
                    f"the fast path cannot run a {type(module).__name__}; use --fast off"
                )
            return Projection(module.weight, module.bias, rounded=self.rounded.get(module.weight))
        frozen: Any = module.base.weight
        plain = Projection(frozen, module.bias, rounded=self.rounded.get(frozen))
        if not module.enabled:
            return plain
        A, B = module.factors
        return plain._replace(A=A, B=B, scale=module.scale)

    def dropout(self, modules: Sequence[nn.Module], site: int) -> Dropout | None:
        """The mask at a site, a number of its own for every input that modules share."""
        rates = {m.dropout for m in modules if isinstance(m, LoraLinear)} - {0.0}
        if self.dropout_key is None or not rates:
            return None
        if len(rates) > 1:
            raise ValueError(f"adapters that share an input have different dropouts: {rates}")
        return Dropout(rates.pop(), _key(self.dropout_key, site))


_Stream = tuple[Tensor, Tensor | None]  # two terms of the residual stream
_SITES = 4  # inputs that adapters share in a block: of q k v, of o, of gate and up, of down


def _key(first: int, site: int) -> int:
    """32 well-mixed bits (the finaliser of MurmurHash3) out of a step's key and a site."""
    h = (first + site * 0x9E3779B1) & 0xFFFFFFFF
    h = ((h ^ h >> 16) * 0x85EBCA6B) & 0xFFFFFFFF
    h = ((h ^ h >> 13) * 0xC2B2AE35) & 0xFFFFFFFF
    return h ^ h >> 16


def first_block(model: Any, hidden: Tensor, batch: Batch) -> Tensor:
    """The first block's output [T, I] for hidden rows [T, I] of a batch's documents."""
    run = _Pass.over(model.model, hidden, batch.positions, batch.lengths)
    return torch.add(*_block(model.model.layers[0], 0, (hidden, None), run, None))


def _token_nll(model: Any, batch: Batch, settings: FastNll) -> Tensor:
    body = model.model
    ids, positions, lengths = _padded(batch)
    x = body.embed_tokens(ids)
    run = replace(
        _Pass.over(body, x, positions, lengths),
        dropout_key=int(torch.randint(2**31, ())) if model.training else None,
        rounded=settings.rounded if model.training else {},
    )
    stream: _Stream = (x, None)
    for number, layer in enumerate(body.layers):
        # After the last attention only the rows that predict something are of use.
        rows = batch.rows if number == len(body.layers) - 1 else None
        arguments = (layer, number, stream, run, rows)
        if number < settings.recompute and torch.is_grad_enabled():
            stream = checkpoint(_block, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            stream = _block(*arguments)
    _, hidden = _normalise(body.norm, *stream)
    return _head(model.lm_head, hidden.rows, batch.targets, run)


def _padded(batch: Batch) -> tuple[Tensor, Tensor, list[int]]:
    """ids and positions [T], T a multiple of `_STEP`, and the documents' lengths; pads are a
    document of their own at the end, of which nothing is supervised."""
    pads = -batch.tokens % _STEP
    if not pads:
        return batch.ids, batch.positions, batch.lengths
    ids = torch.cat([batch.ids, batch.ids.new_zeros(pads)])
    positions = torch.cat([batch.positions, torch.arange(pads, device=batch.ids.device)])
    return ids, positions, [*batch.lengths, pads]


def _block(
    layer: Any, number: int, stream: _Stream, run: _Pass, rows: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One decoder block over [T, I], or its output for `rows` [S, I] alone.

    The residual stream comes and goes as two terms, which the next norm adds.
    """
    attention, mlp, site = layer.self_attn, layer.mlp, number * _SITES
    inputs = [attention.q_proj, attention.k_proj, attention.v_proj]
    x, normal = _normalise(layer.input_layernorm, *stream)
    q, k, v = kernels.project(
        normal, [run.projection(m) for m in inputs], dropout=run.dropout(inputs, site)
    )
    o = _attention(attention, q, k, v, run)
    if rows is not None:
        o, x = o[rows], x[rows]
    output = [attention.o_proj]
    (delta,) = kernels.project(
        o, [run.projection(m) for m in output], dropout=run.dropout(output, site + 1)
    )
    x, normal = _normalise(layer.post_attention_layernorm, x, delta)
    gates, down = [mlp.gate_proj, mlp.up_proj], [mlp.down_proj]
    delta = kernels.gated_mlp(
        normal,
        *(run.projection(m) for m in gates + down),
        dropout=(run.dropout(gates, site + 2), run.dropout(down, site + 3)),
    )
    return x, delta


def _attention(module: Any, q: Tensor, k: Tensor, v: Tensor, run: _Pass) -> Tensor:
    """q [T, H D], k and v [T, K D] -> [T, H D]."""
    q, k, v = (x.unflatten(1, (-1, module.head_dim)) for x in (q, k, v))
    if hasattr(module, "q_norm"):  # Qwen 3 normalises every head
        q, k = _normalise_heads(module.q_norm, q), _normalise_heads(module.k_norm, k)
    q, k = kernels.rotate(q, run.cos, run.sin), kernels.rotate(k, run.cos, run.sin)
    window = _window(module)
    if kernels.attention.takes(q):
        o = kernels.attend(q, k, v, run.cu_seqlens, scale=module.scaling, window=window)
        return o.flatten(1)
    q, k, v = (x[None].transpose(1, 2) for x in (q, k, v))
    options = {"scaling": module.scaling, "sliding_window": window}
    return attend(module, q, k, v, None, run.documents, **options)[0][0].flatten(1)


def _window(module: Any) -> int | None:
    """The layer's sliding window; Mistral has one for all layers, in its configuration."""
    if hasattr(module, "sliding_window"):
        return module.sliding_window
    return getattr(module.config, "sliding_window", None)


def _normalise(norm: Any, x: Tensor, delta: Tensor | None) -> tuple[Tensor, Normal]:
    """The stream x + delta and its norm, [T, I]."""
    return kernels.add_rms_norm(x, delta, norm.weight, norm.variance_epsilon)


def _normalise_heads(norm: Any, x: Tensor) -> Tensor:
    """The norm of every head of [T, H, D]."""
    return kernels.rms_norm(x.flatten(0, 1), norm.weight, norm.variance_epsilon).view(x.shape)


def _head(head: nn.Module, hidden: Tensor, targets: Tensor, run: _Pass) -> Tensor:
    """Nats of the targets [S] from normalised hidden rows [S, I]."""
    if type(head) is nn.Linear:
        rounded = run.rounded.get(head.weight)
        return kernels.head_nll(hidden, head.weight, head.bias, targets, rounded=rounded)
    logits = head(hidden)  # the head itself has an adapter, or trained tokens
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(wide), targets, reduction="none")

"""The fast path: Llama-like models run through `kernels` instead of their own forward pass.

It reads the model's modules at every call, so that adapters may come and go; it renames nothing and
changes no class. Which models it takes is `refusal`; whether it computes what they compute is tried
at load (`model/agreement.py`).

Shapes: T tokens of the packed row, I hidden size, H query heads, K key-value heads, D head size,
S supervised rows (`model/row.py` lays them out).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lorikeet import kernels
from lorikeet.data.batch import Batch
from lorikeet.kernels import Dropout, Int8Weight, Normal, Projection, quantize_weight
from lorikeet.lora import LoraLinear
from lorikeet.model.attention import Documents, attend
from lorikeet.model.rope import longest_unscaled
from lorikeet.model.row import SITES, Row, Sizes, dropout_keys, key_tensor, lay_out, least

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
"""Architectures (transformers' names) whose blocks `_block` describes."""


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
        """Nats of each supervised token, [S]; see `lorikeet.model.token_nll`."""
        numbers = dropout_keys(model)
        keys = numbers if batch.ids.is_cpu or not numbers else key_tensor(numbers, batch.ids.device)
        return self.of_row(model, lay_out(batch, least(batch), keys=keys))

    def of_row(self, model: Any, row: Row) -> Tensor:
        """Nats of each target of a row, [S]: 0 where it is `IGNORED`.

        No value of a tensor is read, so that a GPU is never waited for.
        """
        body = model.model
        x = body.embed_tokens(row.ids)
        rounded = self.rounded if model.training else {}
        run = _Pass.over(body, x, row, rounded=rounded)
        stream: _Stream = (x, None)
        for number, layer in enumerate(body.layers):
            # After the last attention only the rows that predict something are of use.
            rows = row.rows if number == len(body.layers) - 1 else None
            arguments = (layer, number, stream, run, rows)
            if number < self.recompute and torch.is_grad_enabled():
                stream = checkpoint(
                    _block, *arguments, use_reentrant=False, preserve_rng_state=False
                )
            else:
                stream = _block(*arguments)
        _, hidden = _normalise(body.norm, *stream)
        return _head(model.lm_head, hidden.rows, row.targets, run)


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
    if longest_unscaled(config) != math.inf:
        return "its rotary angles follow the longest document of a row"
    if config.hidden_act != "silu":
        return f"its activation is {config.hidden_act}, not silu"
    if getattr(config, "attention_dropout", 0.0):
        return f"it drops attention weights (attention_dropout {config.attention_dropout})"
    return None


@dataclass(frozen=True)
class _Pass:
    """What every block needs to know of a forward pass: the row, its angles, int8 weights."""

    row: Row
    cos: Tensor
    sin: Tensor
    dtype: torch.dtype
    rounded: Mapping[Tensor, Int8Weight] = field(default_factory=dict)

    @staticmethod
    def over(
        body: Any, x: Tensor, row: Row, *, rounded: Mapping[Tensor, Int8Weight] | None = None
    ) -> _Pass:
        """The pass over hidden rows x [T, I]."""
        # float32 angles, where transformers rounds them to the model's dtype
        wide = x.new_empty(0, dtype=torch.promote_types(x.dtype, torch.float32))
        cos, sin = (table[0].contiguous() for table in body.rotary_emb(wide, row.positions[None]))
        return _Pass(row, cos, sin, x.dtype, rounded or {})

    @cached_property
    def documents(self) -> Documents:
        """How the row is cut for the attention that takes documents one by one."""
        if self.row.lengths is None:
            raise RuntimeError(
                "no attention that reads its documents from a tensor takes this model"
            )
        lengths = [length for length in self.row.lengths if length]
        return Documents.of(lengths, device=self.cos.device, dtype=self.dtype)

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
        return plain._replace(A=A, B=B, gain=module.gain(), scale=module.scale)

    def dropout(self, modules: Sequence[nn.Module], site: int) -> Dropout | None:
        """The mask at a site, a number of its own for every input that modules share."""
        rates = {m.dropout for m in modules if isinstance(m, LoraLinear)} - {0.0}
        if self.row.keys is None or not rates:
            return None
        if len(rates) > 1:
            raise ValueError(f"adapters that share an input have different dropouts: {rates}")
        return Dropout(rates.pop(), self.row.keys[site])


_Stream = tuple[Tensor, Tensor | None]  # two terms of the residual stream


def first_block(model: Any, hidden: Tensor, batch: Batch) -> Tensor:
    """The first block's output [T, I] for hidden rows [T, I] of a batch's documents."""
    sizes = Sizes(batch.tokens, len(batch.lengths), batch.supervised_tokens)
    run = _Pass.over(model.model, hidden, lay_out(batch, sizes))
    return torch.add(*_block(model.model.layers[0], 0, (hidden, None), run, None))


def _block(
    layer: Any, number: int, stream: _Stream, run: _Pass, rows: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One decoder block over [T, I], or its output for `rows` [S, I] alone.

    The residual stream comes and goes as two terms, which the next norm adds.
    """
    attention, mlp, site = layer.self_attn, layer.mlp, number * SITES
    inputs = [attention.q_proj, attention.k_proj, attention.v_proj]
    x, normal = _normalise(layer.input_layernorm, *stream)
    q, k, v = kernels.project(
        normal, [run.projection(m) for m in inputs], dropout=run.dropout(inputs, site)
    )
    o = _attention(attention, q, k, v, run)
    if rows is not None:
        o, x = o.index_select(0, rows), x.index_select(0, rows)
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
    if getattr(module, "use_rope", True):  # SmolLM 3 leaves it out in some blocks
        q, k = kernels.rotate(q, run.cos, run.sin), kernels.rotate(k, run.cos, run.sin)
    window = _window(module)
    if kernels.attention.takes(q):
        options = {"scale": module.scaling, "window": window, "max_seqlen": run.row.max_seqlen}
        return kernels.attend(q, k, v, run.row.cu_seqlens, **options).flatten(1)
    q, k, v = (x[None].transpose(1, 2) for x in (q, k, v))
    own = {"scaling": module.scaling, "sliding_window": window}
    return attend(module, q, k, v, None, run.documents, **own)[0][0].flatten(1)


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

"""The fast path: Llama-like models run through `kernels` instead of their own forward pass.

It reads the model's modules at every call, so that adapters may come and go; it renames nothing and
changes no class. Which models it takes is `refusal`; whether it computes what they compute is tried
at load (`model/agreement.py`).

Shapes: T tokens of the packed row, I hidden size, H query heads, K key-value heads, D head size,
S supervised rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lorikeet import kernels
from lorikeet.data.batch import Batch
from lorikeet.kernels import Dropout, Projection
from lorikeet.lora import LoraLinear
from lorikeet.model.attention import Documents, attend

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
"""Architectures (transformers' names) whose blocks `_block` describes."""

_STEP = 64
"""The row is padded to a multiple of this: oneDNN compiles its products for every new length."""


@dataclass(frozen=True)
class FastNll:
    """`token_nll` through the kernels.

    Attributes:
        recompute: how many blocks, from the first on, keep only their input and are computed again
            in the backward pass.
    """

    recompute: int = 0

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Nats of each supervised token, [S]; see `lorikeet.model.token_nll`."""
        return _token_nll(model, batch, self.recompute)


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
class _Row:
    """What every block needs to know of the packed row."""

    cu_seqlens: Tensor
    documents: Documents
    cos: Tensor
    sin: Tensor


class _Drops:
    """The dropout masks of a forward pass, one for every input that adapters share."""

    def __init__(self, model: nn.Module, first_key: int) -> None:
        self._model = model
        self._first_key = first_key

    def of(self, modules: Sequence[nn.Module], site: int) -> Dropout | None:
        """The mask at a site (a number of its own for every shared input), None without dropout."""
        rates = {m.dropout for m in modules if isinstance(m, LoraLinear)} - {0.0}
        if not self._model.training or not rates:
            return None
        if len(rates) > 1:
            raise ValueError(f"adapters that share an input have different dropouts: {rates}")
        return Dropout(rates.pop(), _key(self._first_key, site))


_SITES = 4  # inputs that adapters share in a block: of q k v, of o, of gate and up, of down


def _key(first: int, site: int) -> int:
    """32 well-mixed bits (the finaliser of MurmurHash3) out of a step's key and a site."""
    h = (first + site * 0x9E3779B1) & 0xFFFFFFFF
    h = ((h ^ h >> 16) * 0x85EBCA6B) & 0xFFFFFFFF
    h = ((h ^ h >> 13) * 0xC2B2AE35) & 0xFFFFFFFF
    return h ^ h >> 16


def first_block(model: Any, hidden: Tensor, batch: Batch) -> Tensor:
    """The first block's output [T, I] for hidden rows [T, I] of a batch's documents."""
    row = _row(model.model, hidden, batch.positions, batch.lengths)
    return _block(model.model.layers[0], 0, hidden, row, _Drops(model, 0), None)


def _row(body: Any, x: Tensor, positions: Tensor, lengths: Sequence[int]) -> _Row:
    # float32 angles, where transformers rounds them to the model's dtype
    wide = x.new_empty(0, dtype=torch.promote_types(x.dtype, torch.float32))
    cos, sin = (table[0].contiguous() for table in body.rotary_emb(wide, positions[None]))
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    return _Row(ends, Documents.of(lengths, device=x.device, dtype=x.dtype), cos, sin)


def _token_nll(model: Any, batch: Batch, recompute: int) -> Tensor:
    body = model.model
    ids, positions, lengths = _padded(batch)
    x = body.embed_tokens(ids)
    row = _row(body, x, positions, lengths)
    drops = _Drops(model, int(torch.randint(2**31, ())) if model.training else 0)
    for number, layer in enumerate(body.layers):
        # After the last attention only the rows that predict something are of use.
        rows = batch.rows if number == len(body.layers) - 1 else None
        if number < recompute and torch.is_grad_enabled():
            x = checkpoint(
                _block,
                *(layer, number, x, row, drops, rows),
                use_reentrant=False,
                preserve_rng_state=False,
            )
        else:
            x = _block(layer, number, x, row, drops, rows)
    hidden = kernels.rms_norm(x, body.norm.weight, body.norm.variance_epsilon)
    return _head(model.lm_head, hidden, batch.targets)


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
    layer: Any, number: int, x: Tensor, row: _Row, drops: _Drops, rows: Tensor | None
) -> Tensor:
    """One decoder block, [T, I] -> [T, I], or -> [S, I] if only `rows` are asked for."""
    attention, mlp, site = layer.self_attn, layer.mlp, number * _SITES
    inputs = [attention.q_proj, attention.k_proj, attention.v_proj]
    normal = _normalise(layer.input_layernorm, x)
    q, k, v = kernels.project(
        normal, [_projection(m) for m in inputs], dropout=drops.of(inputs, site)
    )
    o = _attention(attention, q, k, v, row)
    if rows is not None:
        o, x = o[rows], x[rows]
    output = [attention.o_proj]
    (x,) = kernels.project(
        o, [_projection(output[0])], dropout=drops.of(output, site + 1), residual=x
    )
    gates, down = [mlp.gate_proj, mlp.up_proj], [mlp.down_proj]
    return kernels.gated_mlp(
        _normalise(layer.post_attention_layernorm, x),
        *(_projection(m) for m in gates + down),
        residual=x,
        dropout=(drops.of(gates, site + 2), drops.of(down, site + 3)),
    )


def _attention(module: Any, q: Tensor, k: Tensor, v: Tensor, row: _Row) -> Tensor:
    """q [T, H D], k and v [T, K D] -> [T, H D]."""
    q, k, v = (x.unflatten(1, (-1, module.head_dim)) for x in (q, k, v))
    if hasattr(module, "q_norm"):  # Qwen 3 normalises every head
        q, k = _normalise(module.q_norm, q), _normalise(module.k_norm, k)
    q, k = kernels.rotate(q, row.cos, row.sin), kernels.rotate(k, row.cos, row.sin)
    window = _window(module)
    if kernels.attention.takes(q):
        o = kernels.attend(q, k, v, row.cu_seqlens, scale=module.scaling, window=window)
        return o.flatten(1)
    q, k, v = (x[None].transpose(1, 2) for x in (q, k, v))
    options = {"scaling": module.scaling, "sliding_window": window}
    return attend(module, q, k, v, None, row.documents, **options)[0][0].flatten(1)


def _window(module: Any) -> int | None:
    """The layer's sliding window; Mistral has one for all layers, in its configuration."""
    if hasattr(module, "sliding_window"):
        return module.sliding_window
    return getattr(module.config, "sliding_window", None)


def _normalise(norm: Any, x: Tensor) -> Tensor:
    """The norm over the last dimension of [..., I]."""
    flat = x.reshape(-1, x.shape[-1])
    return kernels.rms_norm(flat, norm.weight, norm.variance_epsilon).view(x.shape)


def _projection(module: Any) -> Projection:
    if isinstance(module, LoraLinear):
        if not module.enabled:
            return Projection(module.weight, module.bias)
        factors = (module.lora_A, module.lora_B, module.scale)
        return Projection(module.weight, module.bias, *factors)
    if type(module) is not nn.Linear:
        raise TypeError(f"the fast path cannot run a {type(module).__name__}; use --fast off")
    return Projection(module.weight, module.bias)


def _head(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    """Nats of the targets [S] from normalised hidden rows [S, I]."""
    if type(head) is nn.Linear:
        return kernels.head_nll(hidden, head.weight, head.bias, targets)
    logits = head(hidden)  # the head itself has an adapter
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(wide), targets, reduction="none")

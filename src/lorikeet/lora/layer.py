"""LoRA around one frozen layer: y = W x + b + scale · B A drop(x).

Hu et al. 2021 (arXiv:2106.09685), equation 3. A and B are float32 masters; the products run in
the base's dtype. Nothing here writes the base's weights.
"""

from __future__ import annotations

import copy
import math
from typing import Literal, TypeVar, final

import torch
import torch.nn.functional as F
from torch import nn

Init = Literal["kaiming", "gaussian"]
_Base = TypeVar("_Base", nn.Linear, nn.Embedding)


@final
class LoraLinear(nn.Module):
    """A frozen linear layer and its low-rank update.

    Attributes:
        base: the wrapped layer, weight [out, in].
        lora_A: float32 [r, in].
        lora_B: float32 [out, r].
        scale: what B A is multiplied by.
        dropout: probability that an entry of the adapter's input is dropped in training.
        enabled: False makes the layer answer as its base alone does.
    """

    def __init__(self, base: nn.Linear, *, r: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.base = base
        self.lora_A, self.lora_B = _masters(base.weight, r, base.in_features, base.out_features)
        self.scale = scale
        self.dropout = dropout
        self.enabled = True
        self.train(base.training)

    @property
    def r(self) -> int:
        """Rank of the update."""
        return self.lora_A.shape[0]

    @property
    def weight(self) -> torch.Tensor:
        """The base's weight [out, in]."""
        return self.base.weight

    @property
    def bias(self) -> torch.Tensor | None:
        """The base's bias [out], if it has one."""
        return self.base.bias

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return self.base.in_features

    @property
    def out_features(self) -> int:
        """Width of the output."""
        return self.base.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [..., in] to [..., out]."""
        y = self.base(x)
        if not self.enabled:
            return y
        dtype = self.base.weight.dtype
        A, B = self.lora_A.to(dtype), self.lora_B.to(dtype)
        h = F.linear(F.dropout(x, self.dropout, self.training), A)
        return torch.add(y, F.linear(h, B), alpha=self.scale)

    @torch.no_grad()
    def reset(self, generator: torch.Generator, init: Init = "kaiming") -> None:
        """Draw A from `generator` (on the CPU, whatever the layer's device) and set B to zero.

        "kaiming" is U(-1/sqrt(in), 1/sqrt(in)), nn.Linear's own default and PEFT's; "gaussian" is
        N(0, 1/r²), as PEFT. On the meta device nothing is drawn.
        """
        _reset(self, generator, init)

    @torch.no_grad()
    def delta(self) -> torch.Tensor:
        """scale · B A, float32 [out, in]: what the adapter adds to the weight."""
        return self.scale * (self.lora_B @ self.lora_A)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A new layer with weight W + delta, summed in float32 and rounded once to W's dtype."""
        return _with_weight(self.base, _rounded_sum(self.base.weight, self.delta()))

    def extra_repr(self) -> str:
        """What `print(model)` shows of the adapter."""
        return f"r={self.r}, scale={self.scale:g}, dropout={self.dropout:g}"


@final
class LoraEmbedding(nn.Module):
    """A frozen embedding and its low-rank update, y = E[x] + scale · (A[:, x])ᵀ Bᵀ.

    Some models (Gemma 3) scale inside the embedding, by its `embed_scale`; the update is scaled
    with it, as in PEFT, so that `delta` always adds to the stored weight.

    Attributes:
        base: the wrapped layer, weight [num_embeddings, embedding_dim].
        lora_A: float32 [r, num_embeddings].
        lora_B: float32 [embedding_dim, r].
        scale: what B A is multiplied by.
        enabled: False makes the layer answer as its base alone does.
    """

    def __init__(self, base: nn.Embedding, *, r: int, scale: float) -> None:
        super().__init__()
        self.base = base
        sizes = (base.num_embeddings, base.embedding_dim)
        self.lora_A, self.lora_B = _masters(base.weight, r, *sizes)
        self.scale = scale
        self.enabled = True
        self.train(base.training)

    @property
    def r(self) -> int:
        """Rank of the update."""
        return self.lora_A.shape[0]

    @property
    def weight(self) -> torch.Tensor:
        """The base's weight [num_embeddings, embedding_dim]."""
        return self.base.weight

    @property
    def num_embeddings(self) -> int:
        """Rows of the table."""
        return self.base.num_embeddings

    @property
    def embedding_dim(self) -> int:
        """Width of a row."""
        return self.base.embedding_dim

    @property
    def padding_idx(self) -> int | None:
        """The row that never receives a gradient, if there is one."""
        return self.base.padding_idx

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map token ids [...] to [..., embedding_dim]."""
        y = self.base(x)
        if not self.enabled:
            return y
        # The gathered rows are cast, not the whole table.
        h = F.embedding(x, self.lora_A.T, self.base.padding_idx).to(y.dtype)
        update = F.linear(h, self.lora_B.to(y.dtype))
        return torch.add(y, update * output_scale(self.base), alpha=self.scale)

    @torch.no_grad()
    def reset(self, generator: torch.Generator, init: Init = "kaiming") -> None:
        """Draw A from N(0, 1/r²) with `generator` (on the CPU) and set B to zero.

        An embedding multiplies A by a one-hot vector: exactly one column is read, so there is no
        fan-in for "kaiming" to even out (with the vocabulary as fan-in A would vanish). Both
        values of `init` therefore draw the Gaussian. On the meta device nothing is drawn.
        """
        _reset(self, generator, "gaussian")

    @torch.no_grad()
    def delta(self) -> torch.Tensor:
        """scale · (B A)ᵀ, float32 [num_embeddings, embedding_dim]: what is added to the weight."""
        return self.scale * (self.lora_A.T @ self.lora_B.T)

    @torch.no_grad()
    def merged(self) -> nn.Embedding:
        """A new layer with weight E + delta, summed in float32 and rounded once to E's dtype."""
        return _with_weight(self.base, _rounded_sum(self.base.weight, self.delta()))

    def extra_repr(self) -> str:
        """What `print(model)` shows of the adapter."""
        return f"r={self.r}, scale={self.scale:g}"


LoraLayer = LoraLinear | LoraEmbedding


def output_scale(embedding: nn.Embedding) -> float | torch.Tensor:
    """By what an embedding multiplies its rows: `embed_scale`, transformers' name for it, or 1."""
    scale = getattr(embedding, "embed_scale", 1.0)
    return scale.to(embedding.weight.dtype) if isinstance(scale, torch.Tensor) else float(scale)


def _masters(weight: torch.Tensor, r: int, fan_in: int, fan_out: int) -> list[nn.Parameter]:
    """A [r, fan_in] and B [fan_out, r], both zero, beside `weight`."""
    shapes = ((r, fan_in), (fan_out, r))
    return [nn.Parameter(torch.zeros(s, dtype=torch.float32, device=weight.device)) for s in shapes]


def _reset(layer: LoraLayer, generator: torch.Generator, init: Init) -> None:
    if layer.lora_A.is_meta:
        return
    drawn = torch.empty(layer.lora_A.shape, dtype=torch.float32)
    if init == "kaiming":
        nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
    else:
        drawn.normal_(0.0, 1.0 / layer.r, generator=generator)
    layer.lora_A.copy_(drawn)
    layer.lora_B.zero_()


def _rounded_sum(weight: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    wide = torch.promote_types(weight.dtype, torch.float32)
    return (weight.to(wide) + delta).to(weight.dtype)


def _with_weight(base: _Base, weight: torch.Tensor) -> _Base:
    """A copy of `base` that holds `weight`; its class and other settings are kept."""
    # The memo answers deepcopy's request for the old weight, which is thus never copied.
    frozen = nn.Parameter(weight, requires_grad=False)
    return copy.deepcopy(base, {id(base.weight): frozen})

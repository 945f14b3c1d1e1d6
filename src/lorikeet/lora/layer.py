"""LoRA around one frozen layer: y = W x + b + scale · B A drop(x).

Hu et al. 2021 (arXiv:2106.09685), equation 3; with a magnitude, DoRA (Liu et al. 2024,
arXiv:2402.09353). A, B and the magnitude are float32 masters; the products run in the base's dtype.
Nothing here writes the base's weights.
"""

from __future__ import annotations

import copy
import math
from typing import Literal, TypeVar, final

import torch
import torch.nn.functional as F
from torch import nn

Init = Literal["kaiming", "gaussian", "pissa"]
_Base = TypeVar("_Base", bound=nn.Module)


@final
class LoraLinear(nn.Module):
    """A frozen linear layer and its low-rank update.

    With a magnitude m (DoRA, equation 5) the layer's weight is m · V / ‖V‖, row by row of
    V = W + scale · B A. The norm counts as a constant in the backward pass (section 4.3).

    PiSSA (Meng et al. 2024, arXiv:2404.02948) trains the largest singular triplets of W, which
    leave the frozen weight. Here W stays as it is, and what A and B were at the start is
    subtracted from the update: scale · (B A - B₀ A₀), the same function, and the base stays one.

    Attributes:
        base: the wrapped layer, weight [out, in]; or a Conv1D, which stores it transposed.
        lora_A: float32 [r, in].
        lora_B: float32 [out, r].
        magnitude: float32 [out], ‖W‖ by row at first; None without DoRA.
        start_down, start_up: A₀ and B₀, frozen; None without PiSSA.
        scale: what B A is multiplied by.
        dropout: probability that an entry of the adapter's input is dropped in training.
        enabled: False makes the layer answer as its base alone does.
    """

    magnitude: nn.Parameter | None
    start_down: torch.Tensor | None
    start_up: torch.Tensor | None

    def __init__(
        self,
        base: nn.Module,
        *,
        r: int,
        scale: float,
        dropout: float = 0.0,
        dora: bool = False,
    ) -> None:
        super().__init__()
        self.base = base
        self.transposed = not isinstance(base, nn.Linear)
        self.lora_A, self.lora_B = _masters(self.weight, r, self.in_features, self.out_features)
        self.magnitude = nn.Parameter(_row_norms(self._matrix)) if dora else None
        self.register_buffer("start_down", None)
        self.register_buffer("start_up", None)
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
        """The base's weight, as it stores it."""
        weight: torch.Tensor = self.base.weight  # type: ignore[assignment]
        return weight

    @property
    def bias(self) -> torch.Tensor | None:
        """The base's bias [out], if it has one."""
        bias: torch.Tensor | None = self.base.bias  # type: ignore[assignment]
        return bias

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return self._matrix.shape[1]

    @property
    def out_features(self) -> int:
        """Width of the output."""
        return self._matrix.shape[0]

    @property
    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A [R, in] and B [out, R] of the whole update, float32; R is 2 r with PiSSA, else r."""
        if self.start_down is None or self.start_up is None:
            return self.lora_A, self.lora_B
        return torch.cat([self.lora_A, self.start_down]), torch.cat(
            [self.lora_B, -self.start_up], 1
        )

    @property
    def _matrix(self) -> torch.Tensor:
        """W [out, in]."""
        return self.weight.t() if self.transposed else self.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [..., in] to [..., out]."""
        y: torch.Tensor = self.base(x)
        if not self.enabled:
            return y
        dtype = self.weight.dtype
        A, B = (factor.to(dtype) for factor in self.factors)
        dropped = F.dropout(x, self.dropout, self.training)
        update = F.linear(F.linear(dropped, A), B)
        if (gain := self.gain()) is None:
            return torch.add(y, update, alpha=self.scale)
        if self.dropout and self.training:  # the direction sees the same dropped input throughout
            plain = F.linear(dropped, self._matrix)
        else:
            plain = y if self.bias is None else y - self.bias
        ratio = gain.to(dtype)
        return y + (ratio - 1) * plain + ratio * self.scale * update

    def gain(self) -> torch.Tensor | None:
        """m / ‖V‖, float32 [out], which DoRA scales outputs by; None without DoRA.

        Its gradient goes to the magnitude alone.
        """
        return None if self.magnitude is None else self.magnitude / self._norms()

    @torch.no_grad()
    def _norms(self) -> torch.Tensor:
        """‖W + scale · B A‖ by row, float32 [out], without forming the product.

        ‖w + s b A‖² = ‖w‖² + 2 s b · (A w) + s² b (A Aᵀ) bᵀ for a row w of W and b of B.
        """
        A, B = self.factors
        cross = F.linear(self._matrix, A.to(self.weight.dtype)).to(A.dtype)
        squares = _row_norms(self._matrix).square() + 2 * self.scale * (B * cross).sum(1)
        squares += self.scale**2 * (B @ (A @ A.t()) * B).sum(1)
        return squares.clamp_min(0).sqrt()

    @torch.no_grad()
    def reset(self, generator: torch.Generator, init: Init = "kaiming") -> None:
        """Draw A from `generator` (on the CPU, whatever the layer's device) and set B to zero.

        "kaiming" is U(-1/sqrt(in), 1/sqrt(in)), nn.Linear's own default and PEFT's; "gaussian" is
        N(0, 1/r²), as PEFT. "pissa" draws nothing: A and B take the r largest singular triplets
        of W between them (equations 2 and 3). On the meta device nothing is drawn.
        """
        if init != "pissa":
            _reset(self, generator, init)
        elif not self.lora_A.is_meta:
            U, S, V = torch.linalg.svd(self._matrix.float(), full_matrices=False)
            root = (S[: self.r] / self.scale).sqrt()
            self.lora_A.copy_(root[:, None] * V[: self.r])
            self.lora_B.copy_(U[:, : self.r] * root)
            self.start_down, self.start_up = (
                self.lora_A.detach().clone(),
                self.lora_B.detach().clone(),
            )

    @torch.no_grad()
    def delta(self) -> torch.Tensor:
        """What the adapter adds to the stored weight, float32; with DoRA the whole difference."""
        A, B = self.factors
        delta = self.scale * (B @ A)
        if self.magnitude is not None:
            total = self._matrix.to(delta.dtype) + delta
            total *= (self.magnitude / total.norm(dim=1))[:, None]
            delta = total - self._matrix.to(delta.dtype)
        return delta.t() if self.transposed else delta

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """A new layer with weight W + delta, summed in float32 and rounded once to W's dtype."""
        return _with_weight(self.base, _rounded_sum(self.weight, self.delta()))

    def extra_repr(self) -> str:
        """What `print(model)` shows of the adapter."""
        dora = "" if self.magnitude is None else ", dora"
        return f"r={self.r}, scale={self.scale:g}, dropout={self.dropout:g}{dora}"


class AroundEmbedding(nn.Module):
    """What stands in the place of a frozen embedding and answers for it; each kind says how.

    Attributes:
        base: the wrapped layer, weight [num_embeddings, embedding_dim].
        enabled: False makes the layer answer as its base alone does.
    """

    def __init__(self, base: nn.Embedding) -> None:
        super().__init__()
        self.base = base
        self.enabled = True
        self.train(base.training)

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


@final
class LoraEmbedding(AroundEmbedding):
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
        super().__init__(base)
        sizes = (base.num_embeddings, base.embedding_dim)
        self.lora_A, self.lora_B = _masters(base.weight, r, *sizes)
        self.scale = scale

    @property
    def r(self) -> int:
        """Rank of the update."""
        return self.lora_A.shape[0]

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
        fan-in for "kaiming" to even out (with the vocabulary as fan-in A would vanish). All
        values of `init` therefore draw the Gaussian. On the meta device nothing is drawn.
        """
        _reset(self, generator, "gaussian")

    @property
    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B."""
        return self.lora_A, self.lora_B

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


def _row_norms(matrix: torch.Tensor) -> torch.Tensor:
    """‖w‖ of every row, summed in float32."""
    wide = torch.promote_types(matrix.dtype, torch.float32)
    return torch.linalg.vector_norm(matrix.detach(), dim=1, dtype=wide).float()


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

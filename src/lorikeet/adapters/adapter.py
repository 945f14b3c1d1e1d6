"""An adapter by itself: named low-rank updates, no model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from lorikeet.errors import AdapterError
from lorikeet.lora import Vocabulary

Kind = Literal["linear", "conv1d", "embedding"]


@dataclass(frozen=True, slots=True, eq=False)
class Update:
    """What an adapter does to one weight.

    A linear layer's W [out, in] gains scale · B A. Of a Conv1D (GPT-2's linear layer) W is the
    transpose of what is stored, [in, out]; of an embedding too, [rows, dim] with A [r, rows] and
    B [dim, r]. With a magnitude m the result is m · (W + scale B A) / ‖W + scale B A‖, row by row
    of W (DoRA: Liu et al. 2024, arXiv:2402.09353, equation 5).

    Attributes:
        A: float32 [r, in].
        B: float32 [out, r].
        scale: what B A is multiplied by.
        kind: what is adapted.
        magnitude: float32 [out], or None without DoRA.
    """

    A: Tensor
    B: Tensor
    scale: float
    kind: Kind = "linear"
    magnitude: Tensor | None = None

    @property
    def r(self) -> int:
        """Rank of the factors."""
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the weight as it is stored."""
        size = (self.B.shape[0], self.A.shape[1])
        return size if self.kind == "linear" else size[::-1]

    def delta(self) -> Tensor:
        """scale · B A, float32 [out, in]: what plain LoRA adds to W."""
        return self.scale * (self.B @ self.A)

    def applied(self, weight: Tensor) -> Tensor:
        """The adapted weight, float32 and as it is stored, for a weight of any dtype.

        Raises:
            AdapterError: the shapes do not fit.
        """
        if tuple(weight.shape) != self.shape:
            found = list(weight.shape)
            raise AdapterError(f"the weight is {found}, but the adapter fits {list(self.shape)}")
        total = (weight if self.kind == "linear" else weight.t()).float() + self.delta()
        if self.magnitude is not None:
            total *= (self.magnitude / total.norm(dim=1))[:, None]
        return total if self.kind == "linear" else total.t()


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """Rows of the input embedding or the head that take the places of the base's, or are new.

    A head that shares the embedding's weight has the same rows; whether it does is for the model to
    say.

    Attributes:
        module: its full name, such as `model.embed_tokens`.
        ids: whose rows they are, each once.
        rows: float32 [n, dim].
    """

    module: str
    ids: tuple[int, ...]
    rows: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """Updates by module name, and where they come from.

    Attributes:
        updates: by the full name of the module, such as `model.layers.0.self_attn.q_proj`.
        base_model: the model it was trained on, a path or a hub id; empty if not said.
        provenance: what Lorikeet wrote about the run; empty for adapters of other tools.
        dropout: on the updates' input in training.
        whole: parameters of the base that were trained whole, by full name: those of the modules in
            `modules_to_save`, and biases as `bias` says (PEFT's "none", "all", "lora_only").
        tokens: the rows of single tokens that were trained, by module.
        vocabulary: what the base's vocabulary has gained, as far as the adapter says it.
        copies: PEFT's copies of base weights, by the name of the base's parameter; they must equal
            the base's own as far as the base has those rows. Those of adapted modules are not
            written again.
    """

    updates: Mapping[str, Update]
    base_model: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    dropout: float = 0.0
    copies: Mapping[str, Tensor] = field(default_factory=dict)
    whole: Mapping[str, Tensor] = field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()
    bias: Literal["none", "all", "lora_only"] = "none"
    tokens: tuple[Tokens, ...] = ()
    vocabulary: Vocabulary | None = None

    @property
    def size(self) -> int:
        """Numbers in all factors and magnitudes, in what was trained whole and in tokens' rows."""
        tensors = [t for u in self.updates.values() for t in (u.A, u.B, u.magnitude)]
        tensors += [*self.whole.values(), *(tokens.rows for tokens in self.tokens)]
        return sum(t.numel() for t in tensors if t is not None)

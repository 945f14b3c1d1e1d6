"""Single tokens that are trained: rows of the input embedding, and of a head that is tied to it.

The rows take the places of the base's, as PEFT's `trainable_token_indices` do; they are no
differences. The base's weight is never written. Of a tied head the logits of these tokens come from
the same rows; a head with a weight of its own stays as it is.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import final

import torch
import torch.nn.functional as F
from torch import nn

from lorikeet.errors import AdapterError
from lorikeet.lora.layer import output_scale
from lorikeet.lora.targets import base_modules, layer_kind

_SHOWN = 8  # ids in an error; the rest is counted


@final
class TokenEmbedding(nn.Module):
    """A frozen embedding, n rows of which are trained: y = rows[slot of x] where x has one.

    Attributes:
        base: the wrapped layer, weight [num_embeddings, embedding_dim].
        tokens: the ids of the rows, int64 [n], in the order of the adapter's file.
        slots: which row an id has, int64 [num_embeddings]; -1 for none.
        rows: float32 [n, embedding_dim], the base's at first; computed with in the base's dtype.
        enabled: False makes the layer answer as its base alone does.
    """

    tokens: torch.Tensor
    slots: torch.Tensor

    def __init__(self, base: nn.Embedding, tokens: Sequence[int]) -> None:
        super().__init__()
        self.base = base
        device = base.weight.device
        ids = torch.tensor(list(tokens), dtype=torch.int64, device=device)
        slots = torch.full((base.num_embeddings,), -1, dtype=torch.int64, device=device)
        slots[ids] = torch.arange(len(ids), device=device)
        self.register_buffer("tokens", ids, persistent=False)
        self.register_buffer("slots", slots, persistent=False)
        self.rows = nn.Parameter(base.weight.detach()[ids].float())
        self._padding: int | None = None  # as in the base, the padding's row gets no gradient here
        if base.padding_idx is not None and base.padding_idx in tokens:
            self._padding = list(tokens).index(base.padding_idx)
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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map token ids [...] to [..., embedding_dim]."""
        y: torch.Tensor = self.base(x)
        if not self.enabled:
            return y
        slots = self.slots[x]
        own = F.embedding(slots.clamp_min(0), self.rows, self._padding).to(y.dtype)
        return torch.where((slots >= 0)[..., None], own * output_scale(self.base), y)

    def extra_repr(self) -> str:
        """What `print(model)` shows of the adapter."""
        return f"tokens={len(self.tokens)}"


@final
class TokenHead(nn.Module):
    """A frozen head that shares the embedding's weight: trained tokens have their logits by rows.

    Attributes:
        base: the wrapped layer, weight [vocabulary, in].
        enabled: False makes the layer answer as its base alone does.
    """

    def __init__(self, base: nn.Linear, embedding: TokenEmbedding) -> None:
        super().__init__()
        self.base = base
        self._embedding = (embedding,)  # in a tuple: the rows are the embedding's parameters alone
        self.enabled = True
        self.train(base.training)

    @property
    def weight(self) -> torch.Tensor:
        """The base's weight [vocabulary, in]."""
        return self.base.weight

    @property
    def bias(self) -> torch.Tensor | None:
        """The base's bias [vocabulary], if it has one."""
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
        """Map [..., in] to logits [..., vocabulary]."""
        y: torch.Tensor = self.base(x)
        if not self.enabled:
            return y
        (embedding,) = self._embedding
        bias = None if self.base.bias is None else self.base.bias[embedding.tokens]
        own = F.linear(x, embedding.rows.to(self.weight.dtype), bias)
        # A product's output is not needed for its gradient, so that no copy of the logits is made.
        return y.index_copy_(-1, embedding.tokens, own)


TokenLayer = TokenEmbedding | TokenHead


def token_layers_around(
    model: nn.Module,
    tokens: Sequence[int],
    *,
    adapted: Collection[str] = (),
    whole: Collection[str] = (),
) -> dict[str, TokenLayer]:
    """New layers around the input embedding and what shares its weight, by name.

    The model does not use them yet.

    Args:
        model: without adapters.
        tokens: the ids whose rows are trained; none gives no layer.
        adapted: names of the modules that get another adapter.
        whole: full names of the parameters that are trained whole.

    Raises:
        AdapterError: ids that are doubled or that the embedding lacks; an embedding or a tied head
            that is adapted or trained whole, or of a class that computes something else.
    """
    if not tokens:
        return {}
    modules = dict(base_modules(model))
    get_embedding = getattr(model, "get_input_embeddings", None)  # only transformers' models
    embedding = get_embedding() if get_embedding else None
    name = next((n for n, module in modules.items() if module is embedding), None)
    if name is None or not isinstance(embedding, nn.Embedding):
        raise AdapterError(
            "trained tokens need a model with an embedding of tokens, and this one names none"
        )
    tied = {
        n: module
        for n, module in modules.items()
        if n != name and module._parameters.get("weight") is embedding.weight
    }
    problems = [] if layer_kind(embedding) == "embedding" else [_unknown(name, embedding)]
    problems += [_unknown(n, head) for n, head in tied.items() if layer_kind(head) != "linear"]
    for n in (name, *tied):
        shares = "" if n == name else f" and shares the weight of {name}"
        if n in adapted:
            problems.append(f"{n} is adapted{shares}; train the tokens or adapt it, not both")
        if f"{n}.weight" in whole:
            problems.append(f"{n} is trained whole{shares}; train the tokens or all, not both")
    problems += _misnamed(tokens, embedding.num_embeddings)
    if problems:
        raise AdapterError("the tokens to be trained do not fit the model:", problems)
    wrapper = TokenEmbedding(embedding, tokens)
    heads = {n: TokenHead(h, wrapper) for n, h in tied.items() if isinstance(h, nn.Linear)}
    return {name: wrapper, **heads}


def token_layers(model: nn.Module) -> dict[str, TokenLayer]:
    """The layers that give trained tokens their rows, by the name of the module that each wraps."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, TokenEmbedding | TokenHead)
    }


def _unknown(name: str, module: nn.Module) -> str:
    return f"{name} is of class {type(module).__name__}, of which single rows cannot be trained"


def _misnamed(tokens: Sequence[int], size: int) -> list[str]:
    outside = [token for token in tokens if not 0 <= token < size]
    doubled = [token for token in dict.fromkeys(tokens) if tokens.count(token) > 1]
    problems = []
    if outside:
        problems.append(f"ids that the embedding of {size} rows lacks: {_listed(outside)}")
    if doubled:
        problems.append(f"ids given more than once: {_listed(doubled)}")
    return problems


def _listed(ids: Sequence[int]) -> str:
    more = f" and {len(ids) - _SHOWN} more" if len(ids) > _SHOWN else ""
    return ", ".join(map(str, ids[:_SHOWN])) + more

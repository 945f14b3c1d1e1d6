"""Single tokens that are trained: rows of the input embedding and of the head.

The rows take the places of the base's, as PEFT's `trainable_token_indices` do; they are no
differences. The base's weight is never written. Of a tied head the logits of these tokens come from
the embedding's rows; a head with a weight of its own has rows of its own, if any.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import final

import torch
import torch.nn.functional as F
from torch import nn

from lorikeet.config import LoraConfig
from lorikeet.errors import AdapterError
from lorikeet.lora.layer import AroundEmbedding, output_scale
from lorikeet.lora.targets import layer_kind
from lorikeet.lora.vocabulary import listed, tables, vocabulary


@final
class TokenEmbedding(AroundEmbedding):
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
        super().__init__(base)
        ids, self.rows = _own_rows(base.weight, tokens)
        slots = torch.full((base.num_embeddings,), -1, dtype=torch.int64, device=ids.device)
        slots[ids] = torch.arange(len(ids), device=ids.device)
        self.register_buffer("tokens", ids, persistent=False)
        self.register_buffer("slots", slots, persistent=False)
        self._padding: int | None = None  # as in the base, the padding's row gets no gradient here
        if base.padding_idx is not None and base.padding_idx in tokens:
            self._padding = list(tokens).index(base.padding_idx)

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
    """A frozen head in which n tokens have their logits by trained rows.

    Attributes:
        base: the wrapped layer, weight [vocabulary, in].
        tokens: the ids of the rows, int64 [n].
        rows: float32 [n, in], the base's at first; None if they are the embedding's, whose weight
            the head shares.
        enabled: False makes the layer answer as its base alone does.
    """

    tokens: torch.Tensor
    rows: nn.Parameter | None

    def __init__(self, base: nn.Linear, source: TokenEmbedding | Sequence[int]) -> None:
        super().__init__()
        self.base = base
        # In a tuple: the rows are the embedding's parameters alone.
        self._embedding = (source,) if isinstance(source, TokenEmbedding) else None
        if isinstance(source, TokenEmbedding):
            ids, rows = source.tokens, None
        else:
            ids, rows = _own_rows(base.weight, source)
        self.register_buffer("tokens", ids, persistent=False)
        self.register_parameter("rows", rows)
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
        rows = self._embedding[0].rows if self._embedding else self.rows
        assert rows is not None
        bias = None if self.base.bias is None else self.base.bias[self.tokens]
        own = F.linear(x, rows.to(self.weight.dtype), bias)
        # A product's output is not needed for its gradient, so that no copy of the logits is made.
        return y.index_copy_(-1, self.tokens, own)

    def extra_repr(self) -> str:
        """What `print(model)` shows of the adapter."""
        return f"tokens={len(self.tokens)}, {'tied' if self.rows is None else 'rows of its own'}"


TokenLayer = TokenEmbedding | TokenHead


def _own_rows(weight: torch.Tensor, tokens: Sequence[int]) -> tuple[torch.Tensor, nn.Parameter]:
    """Ids as a tensor, and the rows that train: float32 copies of the base's."""
    ids = torch.tensor(list(tokens), dtype=torch.int64, device=weight.device)
    return ids, nn.Parameter(weight.detach()[ids].float())


def trained_ids(
    model: nn.Module, config: LoraConfig, *, whole: Collection[str] = ()
) -> dict[str, list[int]]:
    """The ids whose rows a run trains, by the name of the embedding or head that the rows are of.

    Those of `trainable_tokens` (see `ids_by_table`), and the new tokens: in the embedding and in a
    head with a weight of its own, except where all is trained.

    Args:
        model: without adapters; it has grown by the configuration's new tokens.
        config: what to train.
        whole: full names of the parameters that are trained whole.

    Raises:
        AdapterError: names that are no embedding and no head, or new tokens that are not those
            that the model's vocabulary has gained.
    """
    ids, grown = ids_by_table(model, config.trainable_tokens), vocabulary(model)
    gained, wanted = grown.texts if grown else [], config.new_tokens or []
    if gained != wanted:
        raise AdapterError(
            f"lora.new_tokens is {listed(wanted) or 'empty'}, but what the vocabulary of the model"
            f" has gained is {listed(gained) or 'nothing'}; give the same to grow_vocabulary first,"
            " or load the base anew"
        )
    if grown is None:
        return ids
    found = tables(model)
    apart = [*found.heads, *(name for name in found.tied if name in ids)]
    for names in ([found.name, *found.tied], *([name] for name in apart)):
        if not all(f"{name}.weight" in whole for name in names):
            ids[names[0]] = [*ids.get(names[0], []), *grown.ids]
    return ids


def ids_by_table(
    model: nn.Module, given: Sequence[int] | Mapping[str, Sequence[int]] | None
) -> dict[str, list[int]]:
    """Ids by the full name of the embedding or head that their rows are of.

    A list means the embedding, and a head that shares its weight. A mapping means the modules that
    it names, by the ends of their names, as in PEFT. What shares the embedding's weight is left out
    if it has the same ids.

    Raises:
        AdapterError: names that are no embedding and no head.
    """
    if not given:
        return {}
    found = tables(model)
    if not isinstance(given, Mapping):
        return {found.name: list(given)}
    ids: dict[str, list[int]] = {}
    problems = []
    for key, own in given.items():
        named = [name for name in found.all if name == key or name.endswith(f".{key}")]
        if len(named) == 1 and named[0] not in ids:
            ids[named[0]] = list(own)
        else:
            problems.append(f"{key!r} names {' and '.join(named) or 'none of them'}")
    if problems:
        known = listed(list(found.all))
        raise AdapterError(f"rows of tokens are trained in one of {known} each, but:", problems)
    return {
        name: own
        for name, own in ids.items()
        if own and not (name in found.tied and own == ids.get(found.name))
    }


def token_layers_around(
    model: nn.Module,
    ids: Mapping[str, Sequence[int]],
    *,
    adapted: Collection[str] = (),
    whole: Collection[str] = (),
) -> dict[str, TokenLayer]:
    """New layers around the input embedding, what shares its weight, and the head, by name.

    The model does not use them yet. What shares the embedding's weight has its rows, unless it has
    ids of its own that are others.

    Args:
        model: without adapters.
        ids: whose rows are trained, by module, from `trained_ids`; none gives no layer.
        adapted: names of the modules that get another adapter.
        whole: full names of the parameters that are trained whole.

    Raises:
        AdapterError: ids that are doubled or that the embedding lacks; an embedding or a head that
            is adapted or trained whole beside them, or of a class that computes something else.
    """
    if not ids:
        return {}
    found = tables(model)
    shared = [found.name, *found.tied] if found.name in ids else []
    concerned = {name: found.all[name] for name in found.all if name in ids or name in shared}
    problems = []
    for name, module in concerned.items():
        wanted = "embedding" if name == found.name else "linear"
        if layer_kind(module) != wanted:
            problems.append(_unknown(name, module))
        tie = f" and shares the weight of {found.name}" if name in found.tied else ""
        if name in adapted:
            problems.append(f"{name} is adapted{tie}; train the tokens or adapt it, not both")
        if f"{name}.weight" in whole:
            problems.append(f"{name} is trained whole{tie}; train the tokens or all, not both")
    for own in dict.fromkeys(tuple(own) for own in ids.values()):
        problems += _misnamed(own, found.embedding.num_embeddings)
    if problems:
        raise AdapterError("the tokens to be trained do not fit the model:", problems)
    layers: dict[str, TokenLayer] = {}
    if found.name in ids:
        layers[found.name] = embedding = TokenEmbedding(found.embedding, ids[found.name])
    for name, module in concerned.items():
        if isinstance(module, nn.Linear):
            same = name in shared and list(ids.get(name, ids[found.name])) == list(ids[found.name])
            layers[name] = TokenHead(module, embedding if same else ids[name])
    return layers


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
        problems.append(f"ids that the embedding of {size} rows lacks: {listed(outside)}")
    if doubled:
        problems.append(f"ids given more than once: {listed(doubled)}")
    return problems

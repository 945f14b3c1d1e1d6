"""The vocabulary of a model: the layers with a row for every token, and what was added to them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

from tokenizers import AddedToken
from torch import nn

from lorikeet.errors import AdapterError
from lorikeet.lora.targets import base_modules

MARK = "_lorikeet_vocabulary"
"""The attribute of a model that says what its vocabulary has gained."""
_SHOWN = 8  # entries in an error; the rest is counted


@dataclass(frozen=True, slots=True)
class NewToken:
    """A token that a tokenizer gains; the other attributes are those of its `AddedToken`.

    Ours are not special, so that answers show them, and are looked for in a text as it is written.
    """

    id: int
    text: str
    special: bool = False
    normalized: bool = False
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False

    def __str__(self) -> str:
        return f"{self.text} ({self.id})"

    def added(self) -> AddedToken:
        """As the tokenizer wants it."""
        return AddedToken(
            self.text,
            special=self.special,
            normalized=self.normalized,
            single_word=self.single_word,
            lstrip=self.lstrip,
            rstrip=self.rstrip,
        )


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What a base's vocabulary gains.

    Attributes:
        tokens: in the order of their ids.
        rows: how many rows embedding and head have with them.
        base_rows: how many they had before.
    """

    tokens: tuple[NewToken, ...]
    rows: int
    base_rows: int

    @property
    def ids(self) -> list[int]:
        """The tokens' ids."""
        return [token.id for token in self.tokens]

    @property
    def new_rows(self) -> list[int]:
        """The rows that are not the base's: those of the tokens, and all that were added."""
        return sorted({*self.ids, *range(self.base_rows, self.rows)})

    @property
    def texts(self) -> list[str]:
        """The tokens' texts."""
        return [token.text for token in self.tokens]

    def __str__(self) -> str:
        return listed([str(token) for token in self.tokens]) or f"{self.rows} rows"

    def summary(self) -> dict[str, Any]:
        """For an adapter's provenance: the number of rows, and of every token what is not usual."""
        plain = asdict(NewToken(0, ""))
        tokens = [
            {k: v for k, v in asdict(token).items() if k in ("id", "text") or v != plain[k]}
            for token in self.tokens
        ]
        return {"rows": self.rows, "base_rows": self.base_rows, "new_tokens": tokens}


@dataclass(frozen=True, slots=True)
class Tables:
    """The layers of a model that have a row for every token.

    Attributes:
        name: of the input embedding, such as `model.embed_tokens`.
        embedding: the input embedding.
        tied: by name, what shares its weight.
        heads: by name, an output head with a weight of its own; at most one.
    """

    name: str
    embedding: nn.Embedding
    tied: dict[str, nn.Module]
    heads: dict[str, nn.Module]

    @property
    def all(self) -> dict[str, nn.Module]:
        """All of them by name, the embedding first."""
        return {self.name: self.embedding, **self.tied, **self.heads}


def tables(model: nn.Module) -> Tables:
    """Find them, without the adapters that they may carry.

    Raises:
        AdapterError: the model names no embedding of tokens.
    """
    modules = dict(base_modules(model))
    # Only transformers' models have these methods.
    embedding = _unwrapped(getattr(model, "get_input_embeddings", lambda: None)())
    head = _unwrapped(getattr(model, "get_output_embeddings", lambda: None)())
    name = next((n for n, module in modules.items() if module is embedding), None)
    if name is None or not isinstance(embedding, nn.Embedding):
        raise AdapterError(
            "trained tokens need a model with an embedding of tokens, and this one names none"
        )
    weight = embedding.weight
    tied = {n: m for n, m in modules.items() if n != name and m._parameters.get("weight") is weight}
    heads = {n: m for n, m in modules.items() if m is head and n not in tied and n != name}
    return Tables(name, embedding, tied, heads)


def _unwrapped(module: Any) -> Any:
    """The base's module in an adapted layer."""
    base = getattr(module, "base", None)
    return base if isinstance(base, nn.Module) else module


def vocabulary(model: nn.Module) -> Vocabulary | None:
    """What a model's vocabulary has gained; None for a model as it was loaded."""
    found: Vocabulary | None = model.__dict__.get(MARK)
    return found


def unseen_tokens(model: nn.Module, examples: Iterable[Sequence[int]]) -> list[str]:
    """A warning if there are new tokens that no example has, else nothing.

    Args:
        model: its vocabulary may have grown.
        examples: the ids of each.
    """
    grown = vocabulary(model)
    if grown is None:
        return []
    lacking = set(grown.ids)
    for ids in examples:
        lacking.difference_update(ids)
    texts = [str(token) for token in grown.tokens if token.id in lacking]
    if not texts:
        return []
    return [
        f"no training example has the new tokens {listed(texts)}; all that can be learnt is to"
        " avoid them (were the data read before the tokenizer knew them?)"
    ]


def listed(entries: Sequence[object]) -> str:
    """The first entries of a list, and how many more there are."""
    more = f" and {len(entries) - _SHOWN} more" if len(entries) > _SHOWN else ""
    return ", ".join(map(str, entries[:_SHOWN])) + more


def leading(entries: Iterable[object]) -> str:
    """The first entries of what may have no end; empty if there are none."""
    first = list(map(str, islice(entries, _SHOWN + 1)))
    return ", ".join(first[:_SHOWN]) + " and more" * (len(first) > _SHOWN)

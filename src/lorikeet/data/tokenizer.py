"""What this part needs of a tokenizer, and the few facts about one that are asked everywhere.

Every fast tokenizer of transformers fits; nothing here imports that library.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from lorikeet.errors import ModelError


class Tokenizer(Protocol):
    """A fast tokenizer: one that reports where in the text each token came from."""

    is_fast: bool
    bos_token_id: int | None
    eos_token_id: int | None
    all_special_tokens: list[str]
    all_special_ids: list[int]
    added_tokens_decoder: Mapping[int, Any]
    chat_template: str | dict[str, str] | None

    def __call__(
        self,
        text: Sequence[str],
        *,
        add_special_tokens: bool = ...,
        return_offsets_mapping: bool = ...,
        return_attention_mask: bool = ...,
        return_token_type_ids: bool = ...,
        verbose: bool = ...,
    ) -> Mapping[str, Any]:
        """Tokenise a list of texts."""

    def apply_chat_template(
        self,
        conversation: Sequence[Sequence[Mapping[str, str]]],
        *,
        chat_template: str,
        add_generation_prompt: bool,
        tokenize: bool,
    ) -> list[str]:
        """Render a list of conversations."""

    def decode(
        self,
        token_ids: Sequence[int],
        *,
        skip_special_tokens: bool,
        clean_up_tokenization_spaces: bool,
    ) -> str:
        """Turn ids into text."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """A tokenised text: ids, and for each the characters `starts[i]` to `ends[i]` it came from."""

    ids: list[int]
    starts: list[int]
    ends: list[int]


def check_fast(tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer that cannot say where a token came from.

    Raises:
        ModelError: the tokenizer is a slow one.
    """
    if not tokenizer.is_fast:
        raise ModelError(
            f"{type(tokenizer).__name__} is a slow tokenizer, which cannot say which characters a"
            " token came from; expected a model folder with a tokenizer.json"
        )


def tokenise(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Tokens]:
    """Tokenise texts as they are: no BOS, no EOS, nothing cut."""
    if not texts:
        return []
    encoded = tokenizer(
        list(texts),
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return [
        Tokens(ids, [start for start, _ in offsets], [end for _, end in offsets])
        for ids, offsets in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]


def token_ids(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Tokenise as `tokenise` does, without asking for offsets."""
    if not texts:
        return []
    encoded = tokenizer(
        list(texts),
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return list(encoded["input_ids"])


def adds_bos(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer itself begins every text with its BOS token."""
    ids = tokenizer(["x"], return_attention_mask=False, return_token_type_ids=False)["input_ids"][0]
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]


def special_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """Control tokens, text to id: those with a role (EOS, ...) and all added as special."""
    named = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    added = tokenizer.added_tokens_decoder.items()
    return dict(named) | {str(token): index for index, token in added if token.special}

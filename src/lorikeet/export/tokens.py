"""The text and type of every id of a tokenizer, as llama.cpp wants them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gguf

from lorikeet.errors import ModelError
from lorikeet.export.pieces import space_tokens
from lorikeet.gguf.metadata import Field

BYTE = re.compile(r"<0x[0-9A-F]{2}>")
"""Tokens that stand for a byte, where a tokenizer falls back to bytes."""

_KEYS = gguf.Keys.Tokenizer
_TYPES = gguf.TokenType
_SHOWN = 8


@dataclass(frozen=True, slots=True)
class Tokens:
    """Every id's text and type.

    Attributes:
        texts: the texts, no two of them equal.
        types: numbers of `gguf.TokenType`.
    """

    texts: list[str]
    types: list[int]

    def metadata(self) -> dict[str, Field]:
        """As keys."""
        return {_KEYS.LIST: Field("str", self.texts), _KEYS.TOKEN_TYPE: Field("i32", self.types)}


def list_tokens(
    spec: Mapping[str, Any], vocab: Mapping[str, int], *, rows: int, unknown: str | None = None
) -> Tokens:
    """Text and type of every id.

    Args:
        spec: a tokenizer.json.
        vocab: the ids of its model by token.
        unknown: the token for what has none, if it is to be known as such.
        rows: of the embedding; ids without a token become unused ones.

    Raises:
        ModelError: ids beyond the embedding, or texts that GGUF has no place for.
    """
    texts: list[str | None] = [None] * rows
    types = [int(_TYPES.UNUSED)] * rows
    problems = []
    byte_fallback = bool(spec["model"].get("byte_fallback"))

    def put(index: int, text: str, kind: gguf.TokenType) -> None:
        if 0 <= index < rows:
            texts[index], types[index] = text, int(kind)
        else:
            problems.append(f"token {index} ({text!r}) is beyond the embedding's {rows:,} rows")

    for text, index in vocab.items():
        is_byte = byte_fallback and BYTE.fullmatch(text)
        put(index, text, _TYPES.BYTE if is_byte else _TYPES.NORMAL)
    spaces = space_tokens(spec)
    for token in spec["added_tokens"]:
        if token["content"] not in spaces:
            special = _TYPES.CONTROL if token["special"] else _TYPES.USER_DEFINED
            put(token["id"], token["content"], special)
    if unknown is not None:
        put(vocab[unknown], unknown, _TYPES.UNKNOWN)
    named = [text if text is not None else f"[PAD{i}]" for i, text in enumerate(texts)]
    problems += _text_problems(named)
    if problems:
        more = len(problems) - _SHOWN
        shown = problems[:_SHOWN] + ([f"and {more} more"] if more > 0 else [])
        raise ModelError("the vocabulary cannot be written as GGUF:", shown)
    return Tokens(named, types)


def overlapping(spec: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Pairs of added tokens, the end of one the beginning of the other, of which llama.cpp finds
    the second where the tokenizer finds the first.

    A tokenizer looks for them from the left, of those that begin at one place for the longest, and
    for those that see normalized text only in what is left of it; llama.cpp looks for the longest
    of all first, wherever it is.

    Args:
        spec: a tokenizer.json.
    """
    own = [t for t in spec["added_tokens"] if t["content"] not in space_tokens(spec)]
    later = {token["content"]: bool(token.get("normalized")) for token in own}
    begins: dict[str, list[str]] = {}
    for text in later:
        for cut in range(1, len(text)):
            begins.setdefault(text[:cut], []).append(text)
    found = []
    for first in later:
        for cut in range(1, len(first)):
            for second in begins.get(first[cut:], ()):
                both = first[:cut] + second
                longer = len(second.encode()) >= len(first.encode())
                from_left = later[first] <= later[second]
                if longer and from_left and not both.startswith(second):
                    found.append((first, second))
    return list(dict.fromkeys(found))


def _text_problems(texts: list[str]) -> list[str]:
    """What llama.cpp would stop at: equal texts, and texts that end before they begin."""
    found, seen = [], dict[str, int]()
    for index, text in enumerate(texts):
        if not text or "\0" in text:
            found.append(f"token {index} ({text!r}) is empty or holds a NUL")
        elif (first := seen.setdefault(text, index)) != index:
            found.append(f"tokens {first} and {index} are both {text!r}")
    return found

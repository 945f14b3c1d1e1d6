"""How a byte-level tokenizer splits text before it merges, and llama.cpp's name for that.

A GGUF file does not hold the rules, only a name (`tokenizer.ggml.pre`) for rules that are built
into llama.cpp (src/llama-vocab.cpp, `llm_tokenizer_bpe`). So the rules of a tokenizer.json must be
one of those known here, letter by letter; anything else is refused. That each entry of the table
splits as llama.cpp does is tested against llama.cpp. What remains is the age of Unicode's tables:
llama.cpp and the `tokenizers` package may not agree on whether a character of the latest versions
is a letter (2 of 4,000 strings of random characters).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lorikeet.errors import ModelError

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_MARKED_WORDS = r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+"
_LOWER, _UPPER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+"
_CAPITAL = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"

LLAMA3 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*{_REST}"
QWEN2 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*{_REST}"
QWEN35 = rf"{_CONTRACTIONS}|{_MARKED_WORDS}|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*{_REST}"
TEKKEN = rf"{_CASED}|{_CAPITAL}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*{_REST}"
GPT4O = (
    rf"{_CASED}{_CONTRACTIONS}?|{_CAPITAL}{_CONTRACTIONS}?|\p{{N}}{{1,3}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*{_REST}"
)

_BY_CASE = (
    "words with letters outside ASCII: this tokenizer splits them where case changes and keeps"
    " combining marks (as of Hindi) with them, llama.cpp neither"
)


@dataclass(frozen=True, slots=True)
class Split:
    """One of llama.cpp's ways to split.

    Attributes:
        steps: of the pre-tokenizer, as `_steps` writes them.
        whole_words: whether a piece that is a token stays whole, whatever the merges say (the
            flag `ignore_merges` of a tokenizer.json).
        limits: classes of strings that llama.cpp splits otherwise.
    """

    steps: tuple[str, ...]
    whole_words: bool = False
    limits: tuple[str, ...] = ()


_GPT2 = "bytes, split as GPT-2 does"
_BYTES = "bytes"


def _pattern(regex: str) -> str:
    return f"split at {regex}"


SPLITS: Mapping[str, Split] = {
    "gpt-2": Split((_GPT2,)),
    "smollm": Split(("single digits", _GPT2)),
    "llama-bpe": Split((_pattern(LLAMA3), _BYTES), whole_words=True),
    "smaug-bpe": Split((_pattern(LLAMA3), _BYTES)),
    "qwen2": Split((_pattern(QWEN2), _BYTES)),
    "qwen35": Split((_pattern(QWEN35), _BYTES)),
    "tekken": Split((_pattern(TEKKEN), _BYTES), whole_words=True, limits=(_BY_CASE,)),
    "gpt-4o": Split((_pattern(GPT4O), _BYTES), limits=(_BY_CASE,)),
}
"""The ways by llama.cpp's name."""


def identify(spec: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """Find llama.cpp's name for a byte-level tokenizer's way to split.

    Args:
        spec: a tokenizer.json.

    Returns:
        The value of `tokenizer.ggml.pre`, and classes of strings that llama.cpp splits otherwise.

    Raises:
        ModelError: llama.cpp has no such way; shows the structure and what is known.
    """
    limits: tuple[str, ...] = ()
    normalizer = parts(spec.get("normalizer"), "normalizers")
    if [part.get("type") for part in normalizer] == ["NFC"]:
        limits = ("text that is not in Unicode's composed form (NFC): llama.cpp takes it as it is",)
    elif normalizer:
        raise _unknown(spec, "a normalizer that llama.cpp does not have")
    steps = tuple(_step(part) for part in parts(spec.get("pre_tokenizer"), "pretokenizers"))
    whole_words = bool(spec["model"].get("ignore_merges"))
    for name, split in SPLITS.items():
        if (split.steps, split.whole_words) == (steps, whole_words):
            return name, limits + split.limits
    raise _unknown(spec, "a way to split text that is not known to be one of llama.cpp's")


def parts(described: Any, key: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, in order; `key` is where a sequence has them."""
    if described is None:
        return []
    if described.get("type") == "Sequence":
        return [part for inner in described[key] for part in parts(inner, key)]
    return [described]


def _step(part: Mapping[str, Any]) -> str:
    """A step in words that are equal only if it does the same."""
    kind = part.get("type")
    if kind == "ByteLevel" and not part.get("add_prefix_space", True):
        return _GPT2 if part.get("use_regex", True) else _BYTES
    if kind == "Digits" and part.get("individual_digits"):
        return "single digits"
    if kind == "Split" and part.get("behavior") == "Isolated" and not part.get("invert"):
        regex = part.get("pattern", {}).get("Regex")
        if isinstance(regex, str):
            return _pattern(regex)
    return json.dumps(part, ensure_ascii=False)


def _unknown(spec: Mapping[str, Any], what: str) -> ModelError:
    lists = ("vocab", "merges")
    model = {key: value for key, value in spec["model"].items() if key not in lists and value}
    shown = {key: spec.get(key) for key in ("normalizer", "pre_tokenizer")} | {"model": model}
    return ModelError(
        f"the tokenizer has {what}, so its GGUF file would answer with other tokens:",
        [
            *(f"{key}: {json.dumps(v, ensure_ascii=False)[:600]}" for key, v in shown.items()),
            f"known are: {', '.join(SPLITS)}",
        ],
    )

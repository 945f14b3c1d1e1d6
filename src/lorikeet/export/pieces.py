"""Tokenizers like sentencepiece's: which text they see, and scores that merge as they do.

llama.cpp's SPM (src/llama-vocab.cpp, `llm_tokenizer_spm_session`) joins the two neighbours whose
joint text is the token with the highest score, the leftmost if several are; a tokenizer.json lists
the pairs that may be joined, in order. Both do the same if every pair whose joint text is a token
is listed, and pairs for one token are not interleaved with those for another: so it is where the
list was made from a sentencepiece model, and it is checked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorikeet.errors import ModelError
from lorikeet.export.pretokenizer import parts

SPACE = "\u2581"
"""What stands for a space in pieces."""

_UNMERGED = -1e6  # a float32 holds it exactly; what no pair makes is joined last, if ever


@dataclass(frozen=True, slots=True)
class Spelling:
    """What a tokenizer does to a text before it merges.

    Attributes:
        prefix: whether a space comes before a text and after special tokens.
        collapses: whether runs of spaces become one.
        limits: classes of strings that llama.cpp spells otherwise.
    """

    prefix: bool
    collapses: bool = False
    limits: tuple[str, ...] = ()


LEADING = (
    "text that begins with a space, at its start or after a special token: llama.cpp puts another"
    " space before it"
)
_AFTER_SPECIAL = (
    "text after a special token: llama.cpp puts a space before it, this tokenizer only before"
    " the very first text"
)
_NO_PREFIX = (
    "text that does not begin with a special token: this tokenizer puts a space before it,"
    " llama.cpp none (with one, every turn of a conversation would gain a space)"
)
LITERAL = f"text with the character {SPACE} (U+2581) itself, which spells spaces in tokens"


def spelling(spec: Mapping[str, Any], *, special_first: bool) -> Spelling | None:
    """What a tokenizer.json does to a text, or None if llama.cpp has nothing like it.

    Args:
        spec: a tokenizer.json.
        special_first: whether chats begin with a special token. A tokenizer may put a space before
            the very first text only; llama.cpp puts it after special tokens, too, or nowhere, which
            is right for such chats.
    """
    normalizer = parts(spec.get("normalizer"), "normalizers")
    collapses = bool(normalizer) and _replaced(normalizer[0]) in {(" {2,}", " "), (" +", " ")}
    normalizer = normalizer[collapses:]
    limits = (LITERAL,) if space_tokens(spec) else ()
    splitter = parts(spec.get("pre_tokenizer"), "pretokenizers")
    # Spaces are gone when this one looks for them (Gemma).
    splitter = [p for p in splitter if not (normalizer and _splits_spaces(p))]
    kinds = [part.get("type") for part in normalizer]
    if not splitter and normalizer and _replaced(normalizer[-1]) == (" ", SPACE):
        if kinds == ["Replace"]:
            return Spelling(False, collapses, limits)
        if kinds == ["Prepend", "Replace"] and normalizer[0].get("prepend") == SPACE:
            return Spelling(True, collapses, limits)
    if not normalizer and len(splitter) == 1:
        scheme = _metaspace(splitter[0], spec["model"])
        if scheme == "never":
            return Spelling(False, collapses, limits)
        if scheme == "always":
            return Spelling(True, collapses, (*limits, LEADING))
        if scheme == "first":
            more = (_NO_PREFIX,) if special_first else (LEADING, _AFTER_SPECIAL)
            return Spelling(not special_first, collapses, (*limits, *more))
    return None


def _replaced(part: Mapping[str, Any]) -> tuple[str | None, str | None] | None:
    """Pattern and replacement of a step that replaces."""
    if part.get("type") != "Replace":
        return None
    pattern = part.get("pattern", {})
    return pattern.get("String", pattern.get("Regex")), part.get("content")


def _splits_spaces(part: Mapping[str, Any]) -> bool:
    return part.get("type") == "Split" and part.get("pattern") == {"String": " "}


def _metaspace(part: Mapping[str, Any], model: Mapping[str, Any]) -> str | None:
    """Where a Metaspace step puts a space, or None if it does more than llama.cpp."""
    if part.get("type") != "Metaspace" or part.get("replacement") != SPACE:
        return None
    tokens = (entry if isinstance(entry, str) else entry[0] for entry in model["vocab"])
    if part.get("split", True) and any(SPACE in token[1:] for token in tokens):
        return None  # it keeps apart what these tokens would join
    scheme = part.get("prepend_scheme")
    return scheme if isinstance(scheme, str) else None


def space_tokens(spec: Mapping[str, Any]) -> frozenset[str]:
    """Added tokens that are nothing but spaces, which merging makes, too (Gemma).

    As added tokens llama.cpp would print them as they are spelt, with U+2581 for a space.
    """
    vocab = spec["model"]["vocab"]
    return frozenset(
        token["content"]
        for token in spec["added_tokens"]
        if not token["special"] and not token["content"].strip(SPACE) and token["content"] in vocab
    )


def merge_scores(
    vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], *, added: frozenset[str]
) -> dict[str, float]:
    """A score for every token, so that the highest is joined first: minus the order of its pair.

    Args:
        vocab: ids by token.
        merges: the pairs that are joined, the first before the others.
        added: tokens that are found before anything is merged.

    Raises:
        ModelError: no scores lead to the same tokens, with examples.
    """
    scores: dict[str, float] = {}
    problems = []
    last, listed = "", set(merges)
    for left, right in merges:
        joined = left + right
        if joined in scores and joined != last:
            problems.append(f"{joined!r} is made early by one pair and late by another")
        scores.setdefault(joined, -float(len(scores)))
        last = joined
    for token in vocab:
        if token in added:
            continue
        for left, right in _halves(token, vocab):
            if (left, right) not in listed:
                problems.append(
                    f"{left!r} and {right!r} are not joined, though {token!r} is a token"
                )
    if problems:
        raise ModelError(
            "llama.cpp cannot merge as this tokenizer does, so its GGUF file would answer with"
            " other tokens; a tokenizer made from a sentencepiece model can be exported:",
            [*problems[:5], f"{len(problems):,} such findings in all"],
        )
    return {token: scores.get(token, _UNMERGED) for token in vocab}


def _halves(token: str, vocab: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    for cut in range(1, len(token)):
        if token[:cut] in vocab and token[cut:] in vocab:
            yield token[:cut], token[cut:]

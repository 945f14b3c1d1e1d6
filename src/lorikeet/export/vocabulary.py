"""A tokenizer as the keys `tokenizer.*` of a GGUF file.

What counts is the tokenizer as Lorikeet loads it, which is what a model was trained with:
transformers rebuilds some tokenizers rather than to take their tokenizer.json at its word. Three
kinds of llama.cpp's (src/llama-vocab.cpp) are written: `gpt2` (BPE on bytes, whose way to split is
identified by `pretokenizer.py`), `llama` (BPE on characters, as sentencepiece's) and `t5`
(unigrams). Where llama.cpp cannot reproduce a tokenizer on some class of strings, the class is
among the limits; where it cannot reproduce it at all, the tokenizer is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gguf

from lorikeet.data.tokenizer import special_tokens
from lorikeet.errors import ModelError
from lorikeet.export.pieces import LEADING, LITERAL, SPACE, merge_scores, space_tokens, spelling
from lorikeet.export.pretokenizer import identify
from lorikeet.export.tokens import BYTE, list_tokens, overlapping
from lorikeet.gguf.metadata import Field

_KEYS = gguf.Keys.Tokenizer
_PAD_SCORE = -1e6
_ENDS = (
    "the end of a text: this tokenizer puts EOS there, llama.cpp nothing, for it would put it after"
    " prompts, too, which then are not answered"
)
_RUNS = "runs of spaces: this tokenizer makes one of them, llama.cpp keeps all"


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A tokenizer in GGUF's words.

    Attributes:
        metadata: every key that begins with `tokenizer.`.
        limits: classes of strings that llama.cpp gives other tokens, for the user to read.
    """

    metadata: dict[str, Field]
    limits: tuple[str, ...]


def describe(tokenizer: Any, *, rows: int) -> Vocabulary:
    """Describe a fast tokenizer of transformers.

    Args:
        tokenizer: as it is loaded.
        rows: of the embedding; ids without a token become unused ones.

    Raises:
        ModelError: llama.cpp has none that gives the same tokens.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"{type(tokenizer).__name__} is a slow tokenizer, whose rules cannot be read; expected"
            " a model folder with a tokenizer.json"
        )
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    model, limits = _model(spec, rows=rows, special_first=_special_first(tokenizer))
    metadata = {
        **model,
        **_special_ids(tokenizer),
        **_chat_templates(tokenizer.chat_template),
    }
    limits = (*limits, *_added_limits(spec), *([_ENDS] if _around(tokenizer)[1] else []))
    return Vocabulary(metadata, limits)


def _model(
    spec: Mapping[str, Any], *, rows: int, special_first: bool
) -> tuple[dict[str, Field], tuple[str, ...]]:
    model = spec["model"]
    kind = model.get("type")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if kind == "BPE" and model.get(option):
            raise ModelError(f"the tokenizer's BPE has a {option}, which llama.cpp has not")
    if kind == "BPE" and model.get("byte_fallback"):
        return _characters(spec, rows=rows, special_first=special_first)
    if kind == "BPE":
        return _bytes(spec, rows=rows)
    if kind == "Unigram":
        return _unigrams(spec, rows=rows, special_first=special_first)
    raise ModelError(
        f"the tokenizer is a {kind}; llama.cpp has BPE on bytes, BPE with byte fallback and"
        " unigrams for language models"
    )


def _bytes(spec: Mapping[str, Any], *, rows: int) -> tuple[dict[str, Field], tuple[str, ...]]:
    """BPE on bytes, such as GPT-2's."""
    name, limits = identify(spec)
    tokens = list_tokens(spec, spec["model"]["vocab"], rows=rows)
    missing = set(_byte_letters()) - set(spec["model"]["vocab"])
    if missing and spec["model"].get("unk_token"):
        limits = (*limits, f"text with any of {len(missing)} bytes that have no token")
    return {
        _KEYS.MODEL: Field("str", "gpt2"),
        _KEYS.PRE: Field("str", name),
        **tokens.metadata(),
        _KEYS.MERGES: Field("str", [" ".join(pair) for pair in _merges(spec)]),
    }, limits


def _byte_letters() -> list[str]:
    """The letters that stand for bytes 0 to 255 (GPT-2, encoder.py, `bytes_to_unicode`)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable}
    letters |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [letters[byte] for byte in range(256)]


def _characters(
    spec: Mapping[str, Any], *, rows: int, special_first: bool
) -> tuple[dict[str, Field], tuple[str, ...]]:
    """BPE on characters with bytes for unknown ones, such as Llama 2's."""
    vocab = spec["model"]["vocab"]
    found = spelling(spec, special_first=special_first)
    if found is None or spec["model"].get("ignore_merges"):
        raise _no_spelling(spec)
    if missing := 256 - sum(1 for token in vocab if BYTE.fullmatch(token)):
        raise ModelError(
            f"the tokenizer lacks {missing} of the 256 byte tokens <0x00> to <0xFF>; llama.cpp"
            " stops at text that needs them"
        )
    added = frozenset(token["content"] for token in spec["added_tokens"])
    scores = merge_scores(vocab, _merges(spec), added=added - space_tokens(spec))
    unknown = spec["model"].get("unk_token")
    tokens = list_tokens(spec, vocab, rows=rows, unknown=unknown if unknown in vocab else None)
    return {
        _KEYS.MODEL: Field("str", "llama"),
        _KEYS.PRE: Field("str", "default"),
        **tokens.metadata(),
        _KEYS.SCORES: Field("f32", [scores.get(text, _PAD_SCORE) for text in tokens.texts]),
        _KEYS.ADD_PREFIX: Field("bool", found.prefix),
    }, (*found.limits, *([_RUNS] if found.collapses else []))


def _no_spelling(spec: Mapping[str, Any]) -> ModelError:
    shown = {key: spec.get(key) for key in ("normalizer", "pre_tokenizer")}
    return ModelError(
        "the tokenizer changes or splits text in a way that llama.cpp does not, so its GGUF"
        " file would answer with other tokens:",
        [
            *(f"{key}: {json.dumps(v, ensure_ascii=False)[:600]}" for key, v in shown.items()),
            f"known are: {SPACE} for each space, with or without one put before the text"
            " (Llama 2, Mistral, Gemma)",
        ],
    )


def _unigrams(
    spec: Mapping[str, Any], *, rows: int, special_first: bool
) -> tuple[dict[str, Field], tuple[str, ...]]:
    """Unigrams, such as T5's."""
    model = spec["model"]
    found = spelling(spec, special_first=special_first)
    unknown = model.get("unk_id")
    # Where llama.cpp makes one space of many, it puts one before the text in any case.
    if found is None or unknown is None or (found.collapses and not found.prefix):
        raise _no_spelling(spec)
    vocab = {text: index for index, (text, _) in enumerate(model["vocab"])}
    scores = [float(score) for _, score in model["vocab"]]
    tokens = list_tokens(spec, vocab, rows=rows, unknown=model["vocab"][unknown][0])
    limits = [*found.limits, LITERAL, "text with two equally likely ways to split it"]
    if found.collapses:
        limits = [limit for limit in limits if limit != LEADING]
        limits.append("spaces at the ends of a text: llama.cpp takes them away")
    if model.get("byte_fallback"):
        limits.append("characters without a token: llama.cpp takes the unknown token, not bytes")
    return {
        _KEYS.MODEL: Field("str", "t5"),
        _KEYS.PRE: Field("str", "default"),
        **tokens.metadata(),
        _KEYS.SCORES: Field("f32", (scores + [_PAD_SCORE] * rows)[:rows]),
        _KEYS.ADD_PREFIX: Field("bool", found.prefix),
        _KEYS.REMOVE_EXTRA_WS: Field("bool", found.collapses),
    }, tuple(limits)


def _merges(spec: Mapping[str, Any]) -> list[tuple[str, str]]:
    pairs = (m.split(" ", 1) if isinstance(m, str) else m for m in spec["model"]["merges"])
    return [(left, right) for left, right in pairs]


def _around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens that a tokenizer puts before and after a text."""
    bare = tokenizer("x", add_special_tokens=False)["input_ids"]
    full = tokenizer("x")["input_ids"]
    start = next(
        (i for i in range(len(full)) if full[i : i + len(bare)] == bare),
        len(full),
    )
    return full[:start], full[start + len(bare) :]


def _special_ids(tokenizer: Any) -> dict[str, Field]:
    """Ids with a role, and whether the tokenizer itself puts BOS before a text.

    Raises:
        ModelError: there is no EOS token, or the tokenizer adds what llama.cpp does not.
    """
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if eos is None:
        raise ModelError(
            "the tokenizer has no EOS token, and llama.cpp would take another token for it: name"
            " one as eos_token in tokenizer_config.json"
        )
    before, after = _around(tokenizer)
    if before not in ([], [bos]) or after not in ([], [eos]):
        raise ModelError(
            f"the tokenizer puts tokens {before} before a text and {after} after it; llama.cpp"
            f" knows BOS ({bos}) before and EOS ({eos}) after"
        )
    ids = {
        _KEYS.BOS_ID: bos,
        _KEYS.EOS_ID: eos,
        _KEYS.UNK_ID: tokenizer.unk_token_id,
        _KEYS.PAD_ID: tokenizer.pad_token_id,
        _KEYS.EOT_ID: turn_end(tokenizer),
    }
    return {
        **{key: Field("u32", index) for key, index in ids.items() if index is not None},
        _KEYS.ADD_BOS: Field("bool", bool(before)),
        _KEYS.ADD_EOS: Field("bool", False),
    }


def turn_end(tokenizer: Any) -> int | None:
    """The special token that the chat template puts after an assistant's words, if it does."""
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "qyq"}]
    after = _rendered(tokenizer, turns).rpartition("qyq")[2]
    special = special_tokens(tokenizer)
    found = [(after.find(token), token) for token in special if token in after]
    return special[min(found)[1]] if found else None


def _special_first(tokenizer: Any) -> bool:
    """Whether the chat template begins conversations with a special token."""
    text = _rendered(tokenizer, [{"role": "user", "content": "x"}])
    return text.startswith(tuple(special_tokens(tokenizer)))


def _rendered(tokenizer: Any, turns: list[dict[str, str]]) -> str:
    """A conversation as text; empty if there is no template, or it wants other turns."""
    if not tokenizer.chat_template:
        return ""
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False))
    except Exception:  # a template is a program of its user
        return ""


def _chat_templates(template: str | Mapping[str, str] | None) -> dict[str, Field]:
    if not template:
        return {}
    if isinstance(template, str):
        return {_KEYS.CHAT_TEMPLATE: Field("str", template)}
    others = {name: text for name, text in template.items() if name != "default"}
    found = {
        _KEYS.CHAT_TEMPLATE_N.format(name=name): Field("str", text) for name, text in others.items()
    }
    if others:
        found[_KEYS.CHAT_TEMPLATES] = Field("str", list(others))
    if "default" in template:
        found[_KEYS.CHAT_TEMPLATE] = Field("str", template["default"])
    return found


def _added_limits(spec: Mapping[str, Any]) -> list[str]:
    """What added tokens do to the text around them, which llama.cpp does not."""
    flags = {
        "lstrip": "swallow spaces before them",
        "rstrip": "swallow spaces after them",
        "single_word": "are found only as whole words",
    }
    if spec["model"].get("byte_fallback") and spec.get("normalizer"):
        flags["normalized"] = "are found as if spelt with the normalizer's spaces"
    found = []
    for flag, does in flags.items():
        names = [token["content"] for token in spec["added_tokens"] if token.get(flag)]
        if names:
            shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
            found.append(f"text around {shown}: here they {does}, in llama.cpp not")
    if pairs := overlapping(spec):
        first, second = pairs[0]
        more = f" and {len(pairs) - 1} pairs more" if len(pairs) > 1 else ""
        found.append(
            f"text where {first!r} and {second!r} overlap{more}: here the one that begins first is"
            " found, in llama.cpp the longer one"
        )
    return found

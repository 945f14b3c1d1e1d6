"""What will be trained on, token by token: in colour, in brackets without it, or as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from rich.text import Text

from lorikeet.data.example import Example
from lorikeet.data.tokenizer import Tokenizer, special_tokens

# Two shades that alternate, so that neighbouring tokens can be told apart.
_SUPERVISED = ("black on green", "black on bright_green")
_PROMPT = ("dim", "dim reverse")
_PENDING = 8  # no character has more pieces; past this the text really holds U+FFFD


def preview_text(
    examples: Sequence[Example], tokenizer: Tokenizer, *, colour: bool = True
) -> list[Text]:
    """Show each example: supervised tokens green, the others dim, control tokens bold.

    Args:
        examples: what to show.
        tokenizer: the one that made the ids.
        colour: with False nothing is styled and supervised stretches stand in `[[ ]]`.

    Returns:
        One `rich` text per example, under a headline with its origin and counts.
    """
    special = frozenset(special_tokens(tokenizer).values())
    show = _coloured if colour else _bracketed
    return [_headline(example) + show(example, tokenizer, special) for example in examples]


def preview_json(examples: Sequence[Example], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Return each example as plain values: origin, counts, and `tokens` of id, text, supervised."""
    return [
        {
            "origin": example.origin,
            "truncated": example.truncated,
            "supervised_tokens": example.supervised_tokens,
            "text_bytes": example.text_bytes,
            "tokens": [
                {"id": index, "text": text, "supervised": supervised}
                for index, text, supervised in zip(
                    example.ids,
                    token_texts(example.ids, tokenizer),
                    example.supervised,
                    strict=True,
                )
            ],
        }
        for example in examples
    ]


def token_texts(ids: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """Return the text that each token adds; joined they are the text of all of them.

    A character made of several tokens belongs to the last of them; the others add nothing.
    """
    texts: list[str] = []
    context = done = 0  # the text of ids[context:done] is known; it settles leading spaces
    known = ""
    for i in range(len(ids)):
        text = _decode(ids[context : i + 1], tokenizer)
        if text.endswith("\ufffd") and i + 1 - done < _PENDING and i + 1 < len(ids):
            texts.append("")
            continue
        texts.append(text[len(known) :])
        context, done = done, i + 1
        known = _decode(ids[context:done], tokenizer)
    return texts


def _decode(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    return tokenizer.decode(
        list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )


def _headline(example: Example) -> Text:
    cut = ", truncated" if example.truncated else ""
    counts = f"{len(example.ids)} tokens, {example.supervised_tokens} supervised{cut}"
    return Text().append(f"{example.origin}: {counts}\n", style="bold")


def _coloured(example: Example, tokenizer: Tokenizer, special: frozenset[int]) -> Text:
    result = Text()
    texts = token_texts(example.ids, tokenizer)
    shade = 0
    for index, text, supervised in zip(example.ids, texts, example.supervised, strict=True):
        style = (_SUPERVISED if supervised else _PROMPT)[shade]
        result.append(_visible(text), style=style + (" bold" if index in special else ""))
        shade ^= bool(text)  # pieces of a character show nothing
    return result


def _bracketed(example: Example, tokenizer: Tokenizer, special: frozenset[int]) -> Text:
    del special  # control tokens are written out; without colour there is nothing to add
    texts = zip(token_texts(example.ids, tokenizer), example.supervised, strict=True)
    result = Text()
    for supervised, stretch in groupby(texts, key=lambda pair: pair[1]):
        text = "".join(text for text, _ in stretch)
        result.append(f"[[{text}]]" if supervised else text)
    return result


def _visible(text: str) -> str:
    """Line ends would have no colour of their own."""
    return text.replace("\n", "↵\n")

"""The preview shows every token once, and the mask also without colour."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from rich.console import Console

from lorikeet.data.layout import Turns
from lorikeet.data.preview import preview_json, preview_text, token_texts
from lorikeet.data.render import Renderer

ROW = Turns(
    (
        {"role": "user", "content": "[bold]Hi[/] 🎉"},
        {"role": "assistant", "content": "Line\nナイス"},
    )
)


def examples(tokenizer: Any, row: Turns = ROW, **options: Any) -> Any:
    return Renderer(tokenizer, **options).example(row, origin="d.jsonl:7")


def test_without_colour_the_mask_is_in_brackets(tiny_chat: Any) -> None:
    text = preview_text(examples(tiny_chat), tiny_chat, colour=False)[0].plain
    headline, body = text.split("\n", 1)
    assert headline.startswith("d.jsonl:7: ")
    assert body == (
        "<|im_start|>user\n[bold]Hi[/] 🎉<|im_end|>\n<|im_start|>assistant\n"
        "[[Line\nナイス<|im_end|>]]"
    )


def test_colours_follow_the_mask_and_alternate(tiny_chat: Any) -> None:
    example = examples(tiny_chat)[0]
    text = preview_text([example], tiny_chat)[0]
    assert "[bold]Hi[/]" in text.plain  # markup in the data stays text
    styles = [str(span.style) for span in text.spans[1:]]
    shown = [i for i, piece in enumerate(token_texts(example.ids, tiny_chat)) if piece]
    assert len(styles) == len(shown)
    assert [("green" in style) for style in styles] == [example.supervised[i] for i in shown]
    assert styles[-1].endswith(" bold")
    assert all(a != b for a, b in pairwise(styles) if "bold" not in a + b)
    output = io.StringIO()
    Console(file=output, force_terminal=True, width=200).print(text)
    assert "\x1b[" in output.getvalue()


def test_truncation_is_said(tiny: Any) -> None:
    text = preview_text(examples(tiny, max_length=24), tiny, colour=False)[0].plain
    assert text.split("\n")[0].endswith(", truncated")


def test_json(tiny: Any) -> None:
    example = examples(tiny)[0]
    shown = json.loads(json.dumps(preview_json([example], tiny)))[0]
    assert shown["origin"] == "d.jsonl:7"
    assert (shown["truncated"], shown["text_bytes"]) == (False, example.text_bytes)
    assert [token["id"] for token in shown["tokens"]] == list(example.ids)
    assert [token["supervised"] for token in shown["tokens"]] == list(example.supervised)
    learnt = "".join(token["text"] for token in shown["tokens"] if token["supervised"])
    assert learnt == " Line\nナイス</s>"


def test_token_texts_of_broken_characters(tiny: Any) -> None:
    ids = tiny("a🎉b\ufffdc")["input_ids"]
    assert "".join(token_texts(ids, tiny)) == "a🎉b\ufffdc"
    broken = [*tiny("🎉")["input_ids"][:2]] * 9
    assert "".join(token_texts(broken, tiny)) == tiny.decode(broken)
    assert token_texts([], tiny) == []


@pytest.mark.parametrize(
    "name", ["models/stories260k", "shapes/tinyllama-1.1b-chat", "shapes/llama-3.1-8b"]
)
def test_token_texts_join_to_the_text(real: Callable[[str], Any], name: str) -> None:
    tokenizer = real(name)
    ids = tokenizer("Once 🎉 日本\n\n  x</s> y")["input_ids"]
    joined = "".join(token_texts(ids, tokenizer))
    assert joined == tokenizer.decode(ids, clean_up_tokenization_spaces=False)

"""The chat template of a file, and whether llama.cpp is to put BOS before a conversation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lorikeet import starter
from lorikeet.data import Renderer
from lorikeet.export.chat import Chat
from lorikeet.gguf.metadata import Field
from lorikeet.model import load_tokenizer

ADDS = {"tokenizer.ggml.add_bos_token": Field("bool", True)}


def of(folder: Path, template: str = "auto") -> Chat:
    return Chat.of(Renderer(load_tokenizer(folder), template=template))


def test_the_template_that_was_trained_with_is_in_the_file() -> None:
    own = of(starter.folder())
    assert own.metadata({})["tokenizer.chat_template"].value == own.template
    assert "messages" in own.template
    assert "### Instruction" in of(starter.folder(), "alpaca").template


@pytest.mark.parametrize(
    ("shape", "template", "begins"),
    [
        ("tinyllama-1.1b-chat", "chat", False),  # <|user|> ... and no <s>
        ("tinyllama-1.1b-chat", "alpaca", True),  # the tokenizer has the say
        ("llama-3.1-8b", "alpaca", True),
        ("smollm2-135m-instruct", "chat", True),  # <|im_start|> is its BOS
        ("smollm-135m", "instruction-response", False),
    ],
)
def test_bos_is_where_it_was_in_training(
    shape: str, template: str, begins: bool, shared: Callable[[str], Path]
) -> None:
    chat = of(shared(f"shapes/{shape}"), template)
    assert chat.begins is begins
    said = chat.metadata(ADDS).get("tokenizer.ggml.add_bos_token")
    assert (said is not None and said.value is False) == (not begins)
    assert "tokenizer.ggml.add_bos_token" not in chat.metadata({})


def test_a_template_that_cannot_be_tried_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "picky.jinja"
    file.write_text("{{ raise_exception('three turns, please') }}", encoding="utf-8")
    chat = of(starter.folder(), str(file))
    assert chat.begins is None
    assert set(chat.metadata(ADDS)) == {"tokenizer.chat_template"}

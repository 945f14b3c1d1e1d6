"""The chat template of a file, and whether llama.cpp is to put BOS before a conversation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lorikeet import starter
from lorikeet.data import Renderer
from lorikeet.errors import ModelError
from lorikeet.export.chat import Chat, configured_ends, ending
from lorikeet.gguf.metadata import Field
from lorikeet.model import load_tokenizer

WORDS = {
    "tokenizer.ggml.tokens": Field("str", ["a", "</s>", "<|done|>", "<|im_end|>", "<|stop|>"]),
    "tokenizer.ggml.eos_token_id": Field("u32", 1),
}
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


def test_tokens_that_end_answers_have_three_places() -> None:
    eom, eot = (f"tokenizer.ggml.{name}_token_id" for name in ("eom", "eot"))
    assert ending(WORDS, [1]) == ({}, ())
    assert ending(WORDS, [1, 3]) == ({}, ())  # llama.cpp knows <|im_end|> by its name
    assert ending(WORDS, [4, 3, 2, 99, -1]) == ({eom: Field("u32", 2), eot: Field("u32", 4)}, ())
    turned = {**WORDS, eot: Field("u32", 4)}
    assert ending(turned, [1, 2, 4]) == ({eom: Field("u32", 2)}, ())
    assert ending(turned, [0, 1, 2, 4]) == ({eom: Field("u32", 0)}, ("<|done|>",))


def test_ends_in_a_models_own_files(tmp_path: Path) -> None:
    assert configured_ends(tmp_path, {"eos_token_id": [4, 5]}) == {4, 5}
    file = tmp_path / "generation_config.json"
    for text, expected in (
        ('{"eos_token_id": 3}', {3}),
        ('{"eos_token_id": [1, "x", null, true, 2]}', {1, 2}),
        ('{"eos_token_id": null}', set()),
    ):
        file.write_text(text, encoding="utf-8")
        assert configured_ends(tmp_path, {"eos_token_id": 9}) == expected
    file.write_text("[", encoding="utf-8")
    with pytest.raises(ModelError, match="cannot read"):
        configured_ends(tmp_path, {})

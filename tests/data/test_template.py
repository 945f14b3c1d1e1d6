"""Templates are found by name, run in the sandbox, and say what is wrong with them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorikeet.data.template import ALPACA, INSTRUCTION_RESPONSE, load_template
from lorikeet.errors import DataError

CONVERSATION = [{"role": "user", "content": "q"}]


def test_auto_takes_the_tokenizers_own(tiny: Any, tiny_chat: Any, chatml: str) -> None:
    plain = load_template("auto", tiny)
    assert (plain.name, plain.text, plain.own) == (
        "instruction-response",
        INSTRUCTION_RESPONSE,
        False,
    )
    own = load_template("auto", tiny_chat)
    assert (own.name, own.text, own.own) == ("chat", chatml, True)
    assert own.sha256 == hashlib.sha256(chatml.encode()).hexdigest()
    assert load_template("alpaca", tiny_chat).text == ALPACA


def test_named_templates(make_tokenizer: Callable[..., Any], chatml: str) -> None:
    tokenizer = make_tokenizer(eos="</s>", chat_template=chatml + " ")
    tokenizer.chat_template = {"default": chatml, "tool_use": "other"}
    assert load_template("auto", tokenizer).text == chatml
    tokenizer.chat_template = {"tool_use": "other"}
    with pytest.raises(DataError, match="needs a tokenizer with a chat template"):
        load_template("chat", tokenizer)


def test_no_such_template(tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no template alpacca; expected auto, chat"):
        load_template("alpacca", tiny)
    with pytest.raises(DataError, match="needs a tokenizer with a chat template"):
        load_template("chat", tiny)
    (tmp_path / "latin.jinja").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match="cannot be read"):
        load_template(str(tmp_path / "latin.jinja"), tiny)


def test_a_syntax_error_names_its_line(tiny: Any, tmp_path: Path) -> None:
    path = tmp_path / "bad.jinja"
    path.write_text("{% for m in messages %}\nok\n{{ m.content }\n{% endfor %}")
    with pytest.raises(DataError, match=r"bad\.jinja, line 3: unexpected '}'"):
        load_template(str(path), tiny)


def test_a_file_sees_what_chat_templates_see(tiny: Any, tmp_path: Path) -> None:
    path = tmp_path / "all.jinja"
    path.write_text(
        "{{ bos_token }}{% for m in messages %}\n    {% if true %}\n{{ m.role }}={{ m.content }}"
        "{% endif %}{% endfor %}{{ eos_token }}{{ add_generation_prompt }}"
    )
    template = load_template(str(path), tiny)
    text = template.render(tiny, [CONVERSATION], origins=["t"], add_generation_prompt=True)
    assert text == ["<s>user=q</s>True"]  # trim_blocks and lstrip_blocks are on
    assert template.render(tiny, [], origins=[], add_generation_prompt=True) == []


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content + 3 }}", "can only concatenate str"),
        ("{{ messages.append(1) }}", "is not safely callable|unsafe|access to"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ],
)
def test_a_failing_template_names_the_row(
    tiny: Any, tmp_path: Path, source: str, message: str
) -> None:
    path = tmp_path / "fails.jinja"
    path.write_text("{% if messages | length > 1 %}" + source + "{% endif %}")
    template = load_template(str(path), tiny)
    conversations = [CONVERSATION, CONVERSATION * 2]
    with pytest.raises(DataError, match=r"d:2: the template .* the turns user, user: ") as caught:
        template.render(tiny, conversations, origins=["d:1", "d:2"], add_generation_prompt=False)
    assert caught.match(message)

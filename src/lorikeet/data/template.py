"""Chat templates: the tokenizer's own, two plain ones for base models, or the user's Jinja file.

All of them are Jinja chat templates and are rendered by the tokenizer's `apply_chat_template`: in
its sandbox, with the variables (`messages`, `bos_token`, `eos_token`, `add_generation_prompt`) and
functions (`raise_exception`) that every tool knows. A user message made from an instruction with
an input also carries `instruction`, `input` and `input_name`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from lorikeet.data.layout import Message
from lorikeet.data.tokenizer import Tokenizer
from lorikeet.errors import DataError

# The generation prompt ends before the space and the response begins with it: a token that
# holds the space (" Paris") then belongs to the response and never crosses the boundary.
INSTRUCTION_RESPONSE = """\
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{ 'Response: ' + message['content'] | trim }}{{ eos_token }}{{ '\\n\\n' }}
{%- elif message['role'] == 'user' and message['input'] -%}
{{ 'Instruction: ' + message['instruction'] | trim + '\\n' }}
{{- message['input_name'] + ': ' + message['input'] | trim + '\\n' }}
{%- elif message['role'] == 'user' -%}
{{ 'Instruction: ' + message['content'] | trim + '\\n' }}
{%- else -%}
{{ message['content'] | trim + '\\n\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'Response:' }}{%- endif -%}
"""

# The wording of Stanford Alpaca (github.com/tatsu-lab/stanford_alpaca), with and without an input.
# Its first paragraph gives way to a system message, and is not repeated in later turns.
ALPACA = """\
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{ '### Response:\\n' + message['content'] | trim }}{{ eos_token }}{{ '\\n\\n' }}
{%- elif message['role'] == 'system' -%}
{{ message['content'] | trim + '\\n\\n' }}
{%- else -%}
{%- if loop.first -%}
{{ 'Below is an instruction that describes a task' }}
{%- if message['input'] -%}
{{ ', paired with an input that provides further context' }}
{%- endif -%}
{{ '. Write a response that appropriately completes the request.\\n\\n' }}
{%- endif -%}
{%- if message['input'] -%}
{{ '### Instruction:\\n' + message['instruction'] | trim }}
{{- '\\n\\n### Input:\\n' + message['input'] | trim + '\\n\\n' }}
{%- else -%}
{{ '### Instruction:\\n' + message['content'] | trim + '\\n\\n' }}
{%- endif -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '### Response:\\n' }}{%- endif -%}
"""

BUILT_IN = {"instruction-response": INSTRUCTION_RESPONSE, "alpaca": ALPACA}


@dataclass(frozen=True)
class Template:
    """A chat template.

    Attributes:
        name: chat, instruction-response, alpaca, or the path of a Jinja file.
        text: the Jinja source.
        own: whether it is the tokenizer's own, which alone decides about BOS.
    """

    name: str
    text: str
    own: bool = False

    @property
    def sha256(self) -> str:
        """Hash of the Jinja source."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def render(
        self,
        tokenizer: Tokenizer,
        conversations: Sequence[Sequence[Message]],
        *,
        origins: Sequence[str],
        add_generation_prompt: bool,
    ) -> list[str]:
        """Render conversations to texts.

        Args:
            tokenizer: runs the template.
            conversations: the messages of each.
            origins: where each came from, for messages.
            add_generation_prompt: whether to end with the header of an assistant turn.

        Raises:
            DataError: the template fails; names the first conversation on which it does.
        """
        try:
            return self._apply(tokenizer, conversations, add_generation_prompt)
        except Exception:  # a template is a program of its user: it may fail in any way
            for conversation, origin in zip(conversations, origins, strict=True):
                self._apply_one(tokenizer, conversation, origin, add_generation_prompt)
            raise

    def _apply(
        self,
        tokenizer: Tokenizer,
        conversations: Sequence[Sequence[Message]],
        add_generation_prompt: bool,
    ) -> list[str]:
        if not conversations:
            return []
        return tokenizer.apply_chat_template(
            [list(conversation) for conversation in conversations],
            chat_template=self.text,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
        )

    def _apply_one(
        self, tokenizer: Tokenizer, conversation: Sequence[Message], origin: str, prompt: bool
    ) -> None:
        try:
            self._apply(tokenizer, [conversation], prompt)
        except Exception as error:
            roles = ", ".join(message["role"] for message in conversation)
            raise DataError(
                f"{origin}: the template {self.name} cannot render the turns {roles}: {error}"
            ) from error


def load_template(name: str, tokenizer: Tokenizer) -> Template:
    """Find a template by its name.

    Args:
        name: auto (the tokenizer's own if it has one, else instruction-response), chat,
            instruction-response, alpaca, or the path of a Jinja file.
        tokenizer: holds the template `chat` and runs every template.

    Raises:
        DataError: no such template or file, or a syntax error (with its line).
    """
    if name == "auto":
        name = "chat" if tokenizer.chat_template else "instruction-response"
    if name == "chat":
        template = Template(name, _own_text(tokenizer), own=True)
    elif name in BUILT_IN:
        template = Template(name, BUILT_IN[name])
    else:
        template = Template(name, _file_text(name))
    _check_syntax(template, tokenizer)
    return template


def _own_text(tokenizer: Tokenizer) -> str:
    template = tokenizer.chat_template
    if isinstance(template, dict):  # named templates; "default" is the one for plain chat
        template = template.get("default")
    if not template:
        raise DataError(
            "the template chat needs a tokenizer with a chat template, and this one has none;"
            f" expected {', '.join(BUILT_IN)} or a Jinja file"
        )
    return template


def _file_text(name: str) -> str:
    path = Path(name).expanduser()
    if not path.is_file():
        raise DataError(
            f"there is no template {name}; expected auto, chat, {', '.join(BUILT_IN)},"
            " or the path of a Jinja file"
        )
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the template {name} cannot be read: {error}") from error


def _check_syntax(template: Template, tokenizer: Tokenizer) -> None:
    """Compile it: what else may be wrong depends on the messages and shows when they come."""
    try:
        template._apply(tokenizer, [[{"role": "user", "content": "x"}]], True)
    except jinja2.TemplateSyntaxError as error:
        raise DataError(f"the template {template.name}, line {error.lineno}: {error}") from error
    except Exception:
        return

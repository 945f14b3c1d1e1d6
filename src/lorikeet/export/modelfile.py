"""Ollama's Modelfile for a GGUF file: the chat template in Go's language, stop tokens, parameters.

A template that mentions `.Messages` is executed once for a conversation, with `.System`, all system
messages, beside it; neighbours of the same role are merged before (ollama, template/template.go,
`Execute` and `collate`). A message given by SYSTEM comes first where a conversation has none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorikeet.data import Renderer
from lorikeet.data.tokenizer import special_tokens
from lorikeet.errors import ModelError
from lorikeet.export.dialect import Dialect, Turn, find_dialect

_PARAMETERS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
    "max_new_tokens": "num_predict",
}
"""Keys of a generation_config.json, and Ollama's words for them."""


@dataclass(frozen=True, slots=True)
class Modelfile:
    """A Modelfile.

    Attributes:
        text: what the file holds.
        template: its TEMPLATE alone.
        notes: what the chat template does that Ollama will not, for the user to read.
    """

    text: str
    template: str
    notes: tuple[str, ...]


def modelfile(
    gguf_name: str,
    renderer: Renderer,
    *,
    adds_bos: bool,
    generation: Mapping[str, Any] | None = None,
) -> Modelfile:
    """Write a Modelfile.

    Args:
        gguf_name: of the GGUF file, beside the Modelfile.
        renderer: the tokenizer and the template that the model was trained with.
        adds_bos: whether the GGUF file says that BOS comes before every text
            (`tokenizer.ggml.add_bos_token`); the template then leaves out its own.
        generation: the model's generation_config.json.

    Raises:
        ModelError: the chat template cannot be translated, with what it does.
    """
    tokenizer = renderer.tokenizer
    names = {index: text for text, index in special_tokens(tokenizer).items()}
    bos = names.get(tokenizer.bos_token_id) if tokenizer.bos_token_id is not None else None

    def say(turns: Sequence[Turn], prompt: bool) -> str:
        (text,) = renderer.template.render(
            tokenizer,
            [[dict(turn) for turn in turns]],
            origins=["probe"],
            add_generation_prompt=prompt,
        )
        return text.removeprefix(bos) if bos and adds_bos else text

    found = find_dialect(say)
    template = go_template(found.dialect)
    notes = list(found.notes)
    if "strftime_now" in renderer.template.text:
        notes.append("the date in the chat template: Ollama will always say today's")
    given = generation or {}
    ids = given.get("eos_token_id")
    stops = renderer.stop_ids() | set(ids if isinstance(ids, list) else [ids])
    lines = [
        f"FROM ./{_one_line(gguf_name)}",
        f"TEMPLATE {_quoted(template)}",
        *([f"SYSTEM {_quoted(found.dialect.default)}"] if found.dialect.default else []),
        *(f"PARAMETER stop {_quoted(names[index])}" for index in sorted(stops & set(names))),
        *_parameters(given),
    ]
    return Modelfile("\n".join(lines) + "\n", template, tuple(notes))


def _one_line(name: str) -> str:
    if "\n" in name or "\r" in name:
        raise ModelError(f"the file name {name!r} has line breaks, which a Modelfile cannot name")
    return name


def _quoted(text: str) -> str:
    """A value as a Modelfile spells it: there are no escapes."""
    if '"""' in text or text.endswith('"'):
        raise ModelError(
            f"a Modelfile has no way to spell quotation marks as in {text[-80:]!r}, which the chat"
            " template writes"
        )
    plain = '"' not in text and "\n" not in text
    return f'"{text}"' if plain else f'"""{text}"""'


def _parameters(generation: Mapping[str, Any]) -> list[str]:
    """PARAMETER lines; greedy decoding is a temperature of 0."""
    if generation.get("do_sample") is False:
        return ["PARAMETER temperature 0"]
    found = []
    for name, word in _PARAMETERS.items():
        value = generation.get(name)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            found.append(f"PARAMETER {word} {value}")
    return found


def go_template(dialect: Dialect) -> str:
    """What says in Go's template language the same as `dialect.say`.

    Two things are as in Ollama's own templates: a last message of the assistant stays open, to be
    continued, and system messages in the middle of a conversation stay there where they can. Line
    breaks between actions are trimmed (`{{-`); those beside fixed text would be part of it.
    """
    opening = _literal(dialect.opening)
    if opening and dialect.system and not dialect.joined:
        opening = f"{{{{ if not .System }}}}{opening}{{{{ end }}}}"
    start = "{{- $first := true }}" if dialect.joined and not dialect.last else ""
    said = "".join(
        f'{{{{ {"else " if i else "- "}if eq .Role "{role}" }}}}{text}'.replace("{{ - ", "{{- ")
        for i, (role, text) in enumerate(_branches(dialect))
    )
    prompt = f'{{{{ if and $last (ne .Role "assistant") }}}}{_literal(dialect.prompt)}{{{{ end }}}}'
    return "\n".join(
        [
            f"{start}{opening}{{{{ range $i, $_ := .Messages }}}}",
            "{{- $last := eq (len (slice $.Messages $i)) 1 }}",
            f"{said}{{{{ end }}}}{prompt}",
            "{{- end }}",
        ]
    )


def _branches(dialect: Dialect) -> list[tuple[str, str]]:
    """What is said for a message of each role."""
    content = "{{ .Content }}"
    asking, asked = map(_literal, dialect.user)
    answering, answered = map(_literal, dialect.assistant)
    found = []
    if dialect.system:
        before, after = map(_literal, dialect.system)
        if dialect.joined:
            where = "$last" if dialect.last else "$first"
            asking += (
                f"{{{{ if and {where} $.System }}}}{before}{{{{ $.System }}}}{after}{{{{ end }}}}"
            )
        else:
            found = [("system", before + content + after)]
    if dialect.joined and not dialect.last:
        asked += "{{ $first = false }}"
    if answered:
        answered = f"{{{{ if not $last }}}}{answered}{{{{ end }}}}"
    return [
        *found,
        ("user", asking + content + asked),
        ("assistant", answering + content + answered),
    ]


def _literal(text: str) -> str:
    """Fixed text; two braces would begin an action, also with the first of what follows."""
    text = text.replace("{{", '{{ "{{" }}')
    return text[:-1] + '{{ "{" }}' if text.endswith("{") else text

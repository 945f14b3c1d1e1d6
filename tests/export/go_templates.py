"""Go's text/template, as much of it as chat templates need, executed as Ollama does.

Text outside braces stands as it is; `{{-` and `-}}` take away the white space beside them; `$` is
the data, `.` the element of the innermost `range`; `and`, `or` and `not` know Go's empty values
(pkg.go.dev/text/template).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_ACTION = re.compile(r"\{\{(- )?(.*?)( -)?\}\}", re.DOTALL)
_WORD = re.compile(r'"(?:[^"\\]|\\.)*"|:=|[()=,]|[^\s()=,]+')


@dataclass
class Node:
    """A piece of text, an action, or a block with its branches."""

    words: list[str]
    text: str | None = None
    body: list[Node] = field(default_factory=list)
    otherwise: list[Node] = field(default_factory=list)


def execute(template: str, messages: Sequence[Mapping[str, str]], *, system: str = "") -> str:
    """What Ollama sends to a model.

    Args:
        template: Go's language.
        messages: roles and contents.
        system: the Modelfile's SYSTEM, for conversations that do not begin with such a message.
    """
    turns = [dict(turn) for turn in messages]
    if system and turns[0]["role"] != "system":
        turns.insert(0, {"role": "system", "content": system})
    collated: list[dict[str, str]] = []
    for turn in turns:
        if collated and collated[-1]["Role"] == turn["role"]:
            collated[-1]["Content"] += "\n\n" + turn["content"]
        else:
            collated.append({"Role": turn["role"], "Content": turn["content"]})
    systems = "\n\n".join(turn["content"] for turn in turns if turn["role"] == "system")
    data = {"System": systems, "Messages": collated}
    return _run(parse(template), {"$": data}, data)


def parse(template: str) -> list[Node]:
    """The nodes of a template."""
    tokens: list[Node] = []
    at, trim = 0, False
    for match in _ACTION.finditer(template):
        text = template[at : match.start()]
        text = text.lstrip() if trim else text
        tokens.append(Node([], text=text.rstrip() if match[1] else text))
        tokens.append(Node(_WORD.findall(match[2])))
        at, trim = match.end(), bool(match[3])
    tokens.append(Node([], text=template[at:].lstrip() if trim else template[at:]))
    nodes, end = _block(tokens, 0)
    assert end == len(tokens), "an end without a beginning"
    return nodes


def _block(tokens: list[Node], at: int) -> tuple[list[Node], int]:
    """The nodes up to the `end` or `else` that belongs to them, and its place."""
    found: list[Node] = []
    while at < len(tokens):
        node = tokens[at]
        first = node.words[0] if node.words else ""
        if first in ("end", "else"):
            return found, at
        at += 1
        if first in ("if", "range"):
            node.body, at = _block(tokens, at)
            at = _rest(node, tokens, at)
        found.append(node)
    return found, at


def _rest(node: Node, tokens: list[Node], at: int) -> int:
    """The `else` of a block, if it has one, and where the block ends."""
    words = tokens[at].words
    if words[0] == "end":
        return at + 1
    if words[1:]:  # else if: a block in the place of the other branch, with the same end
        inner = Node(words[1:])
        inner.body, at = _block(tokens, at + 1)
        node.otherwise = [inner]
        return _rest(inner, tokens, at)
    node.otherwise, at = _block(tokens, at + 1)
    assert tokens[at].words == ["end"]
    return at + 1


def _run(nodes: list[Node], variables: dict[str, Any], dot: Any) -> str:
    out = ""
    for node in nodes:
        words = node.words
        if node.text is not None:
            out += node.text
        elif words[0] == "if":
            chosen = node.body if _value(words[1:], variables, dot) else node.otherwise
            out += _run(chosen, variables, dot)
        elif words[0] == "range":
            index, comma, element, sign = words[1:5]
            assert (comma, sign) == (",", ":=")
            for i, item in enumerate(_value(words[5:], variables, dot)):
                variables |= {index: i, element: item}
                out += _run(node.body, variables, item)
        elif words[1:2] in ([":="], ["="]):
            assert words[1] == ":=" or words[0] in variables, f"{words[0]} is not declared"
            variables[words[0]] = _value(words[2:], variables, dot)
        else:
            out += str(_value(words, variables, dot))
    return out


def _value(words: list[str], variables: dict[str, Any], dot: Any) -> Any:
    """A function's value for its arguments, or a single argument's."""
    arguments: list[Any] = []
    at = 0
    while at < len(words):
        if words[at] == "(":
            depth, end = 1, at + 1
            while depth:
                depth += {"(": 1, ")": -1}.get(words[end], 0)
                end += 1
            arguments.append(_value(words[at + 1 : end - 1], variables, dot))
            at = end
        else:
            arguments.append(_operand(words[at], variables, dot))
            at += 1
    function, *values = arguments
    return function(*values) if callable(function) else function


def _all(*values: Any) -> Any:
    return next((value for value in values if not value), values[-1])


FUNCTIONS = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "not": lambda a: not a,
    "and": _all,
    "or": lambda *values: next((value for value in values if value), values[-1]),
    "len": len,
    "slice": lambda items, start: items[start:],
}


def _operand(word: str, variables: dict[str, Any], dot: Any) -> Any:
    if word in FUNCTIONS:
        return FUNCTIONS[word]
    if word in ("true", "false"):
        return word == "true"
    if word.isdigit():
        return int(word)
    if word.startswith('"'):
        return word[1:-1].encode().decode("unicode_escape")
    name, _, fields = word.partition(".")
    value = variables[name] if name else dot
    for key in filter(None, fields.split(".")):
        value = value[key]
    return value

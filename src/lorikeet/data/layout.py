"""Rows -> turns: which columns hold what, recognised by name, and every row checked.

    messages            messages | conversations: a list of {role, content} or {from, value}
    prompt-completion   prompt, completion: texts, or lists of messages
    instruction         instruction, response | output | answer, and maybe input | context
    text                text

The layout that fits the most rows is taken; of several that fit equally, the first of this list.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorikeet.data.formats import first_problems, kind_of
from lorikeet.data.source import Rows
from lorikeet.errors import DataError

Message = dict[str, str]
"""`role` (system, user or assistant) and `content`; a user message that came from an instruction
with an input also holds `instruction`, `input` and `input_name`, which a template may show apart.
"""


@dataclass(frozen=True, slots=True)
class Text:
    """A plain document, trained on from its first to its last token."""

    text: str


@dataclass(frozen=True, slots=True)
class Turns:
    """A conversation.

    Attributes:
        messages: the turns, in order.
        context: this many messages at the beginning are never supervised: the messages of the
            column `prompt`, whose assistant turns are examples to the model and not its task.
    """

    messages: tuple[Message, ...]
    context: int = 0

    @property
    def prompt(self) -> list[Message]:
        """What comes before the last assistant turn."""
        return list(self.messages[: self._last()])

    @property
    def response(self) -> str:
        """The content of the last assistant turn."""
        return self.messages[self._last()]["content"]

    def _last(self) -> int:
        return max(i for i, message in enumerate(self.messages) if message["role"] == "assistant")


Row = Text | Turns


@dataclass(frozen=True)
class Layout:
    """What the columns mean.

    Attributes:
        name: messages, prompt-completion, instruction or text.
        columns: part of the layout to the column that holds it.
        ignored: columns that are not used, and keys of messages (`messages.name`).
    """

    name: str
    columns: dict[str, str]
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Form:
    required: dict[str, tuple[str, ...]]
    optional: dict[str, tuple[str, ...]]


_FORMS = {
    "messages": _Form({"messages": ("messages", "conversations")}, {}),
    "prompt-completion": _Form({"prompt": ("prompt",), "completion": ("completion",)}, {}),
    "instruction": _Form(
        {"instruction": ("instruction",), "response": ("response", "output", "answer")},
        {"input": ("input", "context")},
    ),
    "text": _Form({"text": ("text",)}, {}),
}
_MESSAGE_KEYS = {"role", "content", "from", "value", "weight", "tool_calls", "function_call"}
_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}


def detect(rows: Rows) -> Layout:
    """Recognise the layout by the column names.

    Raises:
        DataError: no layout fits; names the columns found and the accepted ones.
    """
    counts = Counter(column for row in rows.rows for column in row)
    fits = {name: sum(_fits(form, row) for row in rows.rows) for name, form in _FORMS.items()}
    name = max(fits, key=lambda name: fits[name])  # the first of several equals
    if not fits[name]:
        raise DataError(
            f"{rows.name}: columns {', '.join(map(str, counts)) or '(none)'} fit no known layout;"
            " expected one of",
            [f"{name}: {_describe(form)}" for name, form in _FORMS.items()],
        )
    form = _FORMS[name]
    columns = {}
    for part, names in (form.required | form.optional).items():
        column = max(names, key=lambda column: counts[column])
        if counts[column]:
            columns[part] = column
    used = set(columns.values())
    ignored = [str(column) for column in counts if column not in used]
    return Layout(name, columns, (*ignored, *_ignored_keys(rows, columns.values())))


def _ignored_keys(rows: Rows, columns: Collection[str]) -> list[str]:
    """Keys that messages have beside what is said and by whom, each once."""
    entries = (
        (column, entry)
        for row in rows.rows
        for column in columns
        if isinstance(row.get(column), list)
        for entry in row[column]
        if isinstance(entry, dict)
    )
    found = {f"{column}.{key}": key for column, entry in entries for key in entry}
    return [name for name, key in found.items() if key not in _MESSAGE_KEYS]


def normalise(rows: Rows, layout: Layout) -> list[Row]:
    """Turn every row into a `Text` or `Turns`, parallel to `rows.rows`.

    Raises:
        DataError: with every missing column, wrong type, empty response, unknown role and
            conversation without an answer, each with its origin.
    """
    convert = _CONVERTERS[layout.name]
    result: list[Row] = []
    problems: list[str] = []
    for row, origin in zip(rows.rows, rows.origins, strict=True):
        found: list[str] = []
        result.append(convert(row, layout.columns, found))
        problems.extend(f"{origin}: {problem}" for problem in found)
    if problems:
        noun = "problem" if len(problems) == 1 else "problems"
        raise DataError(
            f"{rows.name}, read as {layout.name}: {len(problems)} {noun} in its rows",
            first_problems(problems),
        )
    return result


def _fits(form: _Form, row: Mapping[str, Any]) -> bool:
    return all(any(name in row for name in names) for names in form.required.values())


def _describe(form: _Form) -> str:
    required = ", ".join(" or ".join(names) for names in form.required.values())
    optional = "".join(f", and maybe {' or '.join(names)}" for names in form.optional.values())
    return required + optional


def _text_row(row: Mapping[str, Any], columns: Mapping[str, str], problems: list[str]) -> Row:
    return Text(_string(row, columns["text"], problems))


def _instruction_row(
    row: Mapping[str, Any], columns: Mapping[str, str], problems: list[str]
) -> Row:
    instruction = _string(row, columns["instruction"], problems)
    response = _string(row, columns["response"], problems)
    message: Message = {"role": "user", "content": instruction}
    column = columns.get("input")
    if column is not None and row.get(column) is not None:  # null and absent mean none
        extra = _string(row, column, problems, may_be_empty=True)
        if extra.strip():
            message["content"] = f"{instruction}\n\n{extra}"
            message |= {"instruction": instruction, "input": extra}
            message["input_name"] = column.capitalize()
    return Turns((message, {"role": "assistant", "content": response}))


def _prompt_row(row: Mapping[str, Any], columns: Mapping[str, str], problems: list[str]) -> Row:
    prompt, completion = row.get(columns["prompt"]), row.get(columns["completion"])
    if isinstance(prompt, list) or isinstance(completion, list):
        before = _side(row, columns["prompt"], "user", problems)
        after = _side(row, columns["completion"], "assistant", problems)
        _check_roles(before + after, problems)
        if not any(message["role"] == "assistant" for message in after):
            problems.append(f"{columns['completion']} has no assistant turn")
        return Turns((*before, *after), context=len(before))
    user = _string(row, columns["prompt"], problems)
    assistant = _string(row, columns["completion"], problems)
    return Turns(({"role": "user", "content": user}, {"role": "assistant", "content": assistant}))


def _messages_row(row: Mapping[str, Any], columns: Mapping[str, str], problems: list[str]) -> Row:
    messages = _messages(row, columns["messages"], problems)
    _check_roles(messages, problems)
    return Turns(tuple(messages))


_CONVERTERS: dict[str, Callable[[Mapping[str, Any], Mapping[str, str], list[str]], Row]] = {
    "messages": _messages_row,
    "prompt-completion": _prompt_row,
    "instruction": _instruction_row,
    "text": _text_row,
}


def _side(row: Mapping[str, Any], column: str, role: str, problems: list[str]) -> list[Message]:
    """One side of a prompt and completion of which at least one is a list of messages."""
    if isinstance(row.get(column), str):
        return [{"role": role, "content": _string(row, column, problems)}]
    return _messages(row, column, problems)


def _messages(row: Mapping[str, Any], column: str, problems: list[str]) -> list[Message]:
    value = row.get(column)
    if not isinstance(value, list) or not value:
        found = "an empty list" if value == [] else kind_of(value)
        problems.append(f"{column}: expected a list of messages, found {found}")
        return []
    messages = (_message(entry, f"{column}[{i}]", problems) for i, entry in enumerate(value))
    return [message for message in messages if message is not None]


def _message(entry: object, place: str, problems: list[str]) -> Message | None:
    if not isinstance(entry, dict):
        problems.append(f"{place}: expected an object, found {kind_of(entry)}")
        return None
    keys = ("from", "value") if "from" in entry and "role" not in entry else ("role", "content")
    name = entry.get(keys[0])
    role = _ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        found = f"role {name!r}" if keys[0] in entry else f"keys {', '.join(map(str, entry))}"
        problems.append(f"{place}: expected a role system, user or assistant, found {found}")
        return None
    own: list[str] = []
    for calls in ("tool_calls", "function_call"):
        if entry.get(calls):
            own.append(f"{calls}: calls of tools cannot be trained on; write them into {keys[1]}")
    if entry.get("weight", 1) != 1:
        own.append(f"weight {entry['weight']}: every turn counts alike; --data.supervise chooses")
    content = _string(entry, keys[1], own, may_be_empty=role != "assistant")
    problems.extend(f"{place}: {problem}" for problem in own)
    return {"role": role, "content": content}


def _check_roles(messages: Sequence[Message], problems: list[str]) -> None:
    roles = [message["role"] for message in messages if message["role"] != "system"]
    if problems:
        return  # roles that could not be read would be complained about twice
    if "assistant" not in roles:
        problems.append("no assistant turn: there is nothing to learn")
    elif roles[0] == "assistant":
        problems.append("the first turn is the assistant's: it answers nothing")


def _string(
    row: Mapping[str, Any], column: str, problems: list[str], *, may_be_empty: bool = False
) -> str:
    value = row.get(column)
    if column not in row:
        problems.append(f"{column} is missing")
    elif not isinstance(value, str):
        problems.append(f"{column}: expected text, found {kind_of(value)}")
    elif not may_be_empty and not value.strip():
        problems.append(f"{column} is empty")
    elif not _is_unicode(value):
        problems.append(f"{column} holds half of a surrogate pair, which is no valid Unicode text")
    else:
        return value
    return ""


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True

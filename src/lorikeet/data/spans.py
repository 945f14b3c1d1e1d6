"""Where in a rendered conversation the supervised characters are.

An assistant turn begins where the generation prompt ends, and ends with the control token that the
template puts behind its content::

    <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello<|im_end|>\\n
    |------------ render(messages[:1], add_generation_prompt) -|
    |------------ render(messages[:2]) ---------------------------------------|
                                                            [---------------)

A few templates rewrite earlier turns once there are later ones (they drop the reasoning, say), so
that the shorter rendering is no prefix of the whole. Such a turn is found by its content, which is
searched after those of the messages before it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from lorikeet.data.layout import Message, Turns
from lorikeet.data.template import Template
from lorikeet.data.tokenizer import Tokenizer
from lorikeet.errors import DataError

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Found:
    """A rendered conversation and its supervised characters.

    Attributes:
        text: the conversation up to the end of its last assistant turn; what the template puts
            after that predicts nothing.
        spans: the supervised characters, start and past-the-end of each turn.
        ends_with_special: whether the text ends with a control token.
        prompt: what the model is given in order to produce the last turn.
        prompt_is_prefix: whether the text begins with the prompt.
        rewritten: whether the template shows a turn otherwise once there are later ones.
    """

    text: str
    spans: list[Span]
    ends_with_special: bool
    prompt: str
    prompt_is_prefix: bool
    rewritten: bool


def find_spans(
    rows: Sequence[Turns],
    origins: Sequence[str],
    *,
    tokenizer: Tokenizer,
    template: Template,
    special: re.Pattern[str],
    last_only: bool,
) -> list[Found]:
    """Render conversations and find their supervised characters.

    Args:
        rows: the conversations.
        origins: where each came from, for messages.
        tokenizer: runs the template.
        template: the chat template.
        special: matches every control token of the tokenizer.
        last_only: whether only the last assistant turn of each row is supervised.

    Raises:
        DataError: the template fails, or shows a response so that it cannot be found.
    """
    wanted = [
        _supervised_turns(row, origin, last_only=last_only)
        for row, origin in zip(rows, origins, strict=True)
    ]
    wholes = template.render(
        tokenizer, [row.messages for row in rows], origins=origins, add_generation_prompt=False
    )
    before = iter(_rendered(rows, origins, wanted, tokenizer, template, prompts=True))
    after = iter(_rendered(rows, origins, wanted, tokenizer, template, prompts=False))
    result = []
    for row, origin, whole, turns in zip(rows, origins, wholes, wanted, strict=True):
        last = len(row.messages) - 1
        edges = [(next(before), whole if turn == last else next(after)) for turn in turns]
        result.append(_found(row, origin, whole, turns, edges, special))
    return result


def _rendered(
    rows: Sequence[Turns],
    origins: Sequence[str],
    wanted: Sequence[Sequence[int]],
    tokenizer: Tokenizer,
    template: Template,
    *,
    prompts: bool,
) -> list[str]:
    """What is before every wanted turn (prompts), or goes up to it, unless that is all there is."""
    conversations: list[Sequence[Message]] = []
    names = []
    for row, origin, turns in zip(rows, origins, wanted, strict=True):
        for turn in turns:
            end = turn if prompts else turn + 1
            if end < len(row.messages):
                conversations.append(row.messages[:end])
                names.append(origin)
    return template.render(tokenizer, conversations, origins=names, add_generation_prompt=prompts)


def _supervised_turns(row: Turns, origin: str, *, last_only: bool) -> list[int]:
    turns = [
        i
        for i, message in enumerate(row.messages)
        if message["role"] == "assistant" and i >= row.context
    ]
    if not turns:
        raise DataError(f"{origin}: no assistant turn: there is nothing to learn")
    return turns[-1:] if last_only else turns


def _found(
    row: Turns,
    origin: str,
    whole: str,
    turns: Sequence[int],
    edges: Sequence[tuple[str, str]],
    special: re.Pattern[str],
) -> Found:
    contents = [message["content"].strip() for message in row.messages]
    as_before = [whole.startswith(before) and whole.startswith(after) for before, after in edges]
    places = [] if all(as_before) else _places(whole, contents)
    spans = []
    for turn, (before, after), same in zip(turns, edges, as_before, strict=True):
        if same:
            spans.append(_in_segment(whole, contents[turn], (len(before), len(after)), special))
        elif places[turn] >= 0:
            spans.append(_at_place(whole, contents[turn], places[turn], special))
        else:
            raise DataError(
                f"{origin}: the template rewrites the turn {contents[turn][:40]!r} so that its"
                " tokens cannot be told; use another template, or --data.supervise last"
            )
    _, end, stopped = spans[-1]
    return Found(
        text=whole[:end],
        spans=[(start, end) for start, end, _ in spans],
        ends_with_special=stopped,
        prompt=edges[-1][0],
        prompt_is_prefix=whole.startswith(edges[-1][0]),
        rewritten=not all(as_before),
    )


def _in_segment(
    whole: str, content: str, segment: Span, special: re.Pattern[str]
) -> tuple[int, int, bool]:
    """Start and end of a turn in its segment, and whether a control token ends it."""
    start, limit = segment
    place = whole.find(content, start, limit)
    if place >= 0:
        end = place + len(content)
        stop = special.search(whole, end, limit)
    else:  # the template changed the content: all of the segment up to its last control token
        stops = list(special.finditer(whole, start, limit))
        end = start + len(whole[start:limit].rstrip())
        stop = stops[-1] if stops else None
    return (start, stop.end(), True) if stop else (start, end, False)


def _at_place(
    whole: str, content: str, place: int, special: re.Pattern[str]
) -> tuple[int, int, bool]:
    """The same for a turn that was searched: only a control token right behind it is its own."""
    end = place + len(content)
    stop = special.match(whole, end + (whole[end : end + 1] == " "))
    return (place, stop.end(), True) if stop else (place, end, False)


def _places(whole: str, contents: Sequence[str]) -> list[int]:
    """Where each content is, searched after those before it; -1 where it is not."""
    places = []
    cursor = 0
    for content in contents:
        place = whole.find(content, cursor)
        places.append(place)
        cursor = place + len(content) if place >= 0 else cursor
    return places

"""Where in a rendered conversation the supervised characters are.

An assistant turn begins where the generation prompt ends, and ends with the control token that the
template puts behind its content::

    <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello<|im_end|>\\n
    |------------ render(messages[:1], add_generation_prompt) -|
    |------------ render(messages[:2]) ---------------------------------------|
                                                            [---------------)

A few templates rewrite earlier turns once there are later ones (they drop the reasoning, say), so
that the shorter rendering is no prefix of the whole. The same conversation with a placeholder for
every content then tells what stands between them. Where that does not add up, because the template
changes contents, a turn is found by its content, searched after those of the messages before it.
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
        as_before = [whole.startswith(a) and whole.startswith(b) for a, b in edges]
        contents = [message["content"].strip() for message in row.messages]
        places: list[Span | None] = []
        if not all(as_before):
            places = _between(whole, row.messages, tokenizer, template) or _searched(
                whole, contents
            )
        result.append(_found(contents, origin, whole, turns, edges, as_before, places, special))
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
    contents: Sequence[str],
    origin: str,
    whole: str,
    turns: Sequence[int],
    edges: Sequence[tuple[str, str]],
    as_before: Sequence[bool],
    places: Sequence[Span | None],
    special: re.Pattern[str],
) -> Found:
    spans = []
    for turn, (before, after), same in zip(turns, edges, as_before, strict=True):
        place = None if same else places[turn]
        if same and not whole[len(before) : len(after)].strip():
            raise DataError(
                f"{origin}: the template does not show the turn {contents[turn][:40]!r};"
                " use another template"
            )
        if same:
            spans.append(_in_segment(whole, contents[turn], (len(before), len(after)), special))
        elif place:
            spans.append(_at_place(whole, place, special))
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


def _at_place(whole: str, place: Span, special: re.Pattern[str]) -> tuple[int, int, bool]:
    """The same for the place of a content: only a control token right behind it is its own."""
    start, end = place
    stop = special.match(whole, end + (whole[end : end + 1] == " "))
    return (start, stop.end(), True) if stop else (start, end, False)


def _between(
    whole: str, messages: Sequence[Message], tokenizer: Tokenizer, template: Template
) -> list[Span | None]:
    """Where each content is, by what the template puts between them; empty if that cannot be told.

    A search would find an answer such as `a` in the markup: `assistant` has one, too.
    """
    marks = [f"\ue000{number}\ue001" for number in range(len(messages))]
    marked = [{**m, "content": mark} for m, mark in zip(messages, marks, strict=True)]
    try:
        shown = template.render(tokenizer, [marked], origins=[""], add_generation_prompt=False)[0]
    except DataError:  # a template that reads its contents
        return []
    pieces = re.split("|".join(map(re.escape, marks)), shown)
    if re.findall("|".join(map(re.escape, marks)), shown) != marks:
        return []
    own = [message["content"] for message in messages]
    for contents in (own, [content.strip() for content in own]):
        if "".join(p + c for p, c in zip(pieces, [*contents, ""], strict=True)) == whole:
            places: list[Span | None] = []
            end = 0
            for piece, content in zip(pieces, contents, strict=False):
                start = end + len(piece)
                end = start + len(content)
                places.append((start, end))
            return places
    return []


def _searched(whole: str, contents: Sequence[str]) -> list[Span | None]:
    """Where each content is, searched after those before it; None where it is not."""
    places: list[Span | None] = []
    cursor = 0
    for content in contents:
        place = whole.find(content, cursor)
        places.append((place, place + len(content)) if place >= 0 else None)
        cursor = place + len(content) if place >= 0 else cursor
    return places

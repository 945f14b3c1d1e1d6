"""Layouts are recognised by their columns; rows that do not fit are all named."""

from __future__ import annotations

from typing import Any

import pytest

from lorikeet.data.layout import Row, Text, Turns, detect, normalise
from lorikeet.data.source import Rows
from lorikeet.errors import DataError

USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}


def rows(*entries: dict[str, Any]) -> Rows:
    origins = [f"d.jsonl:{i + 1}" for i in range(len(entries))]
    return Rows("d.jsonl", list(entries), origins, sha256="", format="jsonl")


def one(entry: dict[str, Any]) -> tuple[str, Row]:
    read = rows(entry)
    layout = detect(read)
    return layout.name, normalise(read, layout)[0]


def problems(*entries: dict[str, Any]) -> tuple[str, ...]:
    read = rows(*entries)
    with pytest.raises(DataError) as caught:
        normalise(read, detect(read))
    return caught.value.problems


def test_text() -> None:
    assert one({"text": " once "}) == ("text", Text(" once "))


@pytest.mark.parametrize("response", ["response", "output", "answer"])
def test_instruction(response: str) -> None:
    name, row = one({"instruction": "q", response: "a", "category": "x"})
    assert (name, row) == ("instruction", Turns((USER, ANSWER)))


@pytest.mark.parametrize("column", ["input", "context"])
def test_instruction_with_input(column: str) -> None:
    _, row = one({"instruction": "q", column: "more", "response": "a"})
    assert isinstance(row, Turns)
    assert row.messages[0] == {
        "role": "user",
        "content": "q\n\nmore",
        "instruction": "q",
        "input": "more",
        "input_name": column.capitalize(),
    }


@pytest.mark.parametrize("empty", ["", "  \n", None])
def test_an_empty_input_is_none(empty: str | None) -> None:
    assert one({"instruction": "q", "input": empty, "output": "a"})[1] == Turns((USER, ANSWER))


def test_prompt_completion() -> None:
    expected = ("prompt-completion", Turns((USER, ANSWER)))
    assert one({"prompt": "q", "completion": "a"}) == expected


@pytest.mark.parametrize("prompt", ["q", [USER]])
@pytest.mark.parametrize("completion", ["a", [ANSWER]])
def test_prompt_completion_as_messages(prompt: object, completion: object) -> None:
    _, row = one({"prompt": prompt, "completion": completion})
    assert isinstance(row, Turns)
    assert row.messages == (USER, ANSWER)


def test_turns_of_a_prompt_are_context() -> None:
    _, row = one({"prompt": [SYSTEM, USER, ANSWER, USER], "completion": [ANSWER]})
    assert row == Turns((SYSTEM, USER, ANSWER, USER, ANSWER), context=4)


def test_messages() -> None:
    expected = ("messages", Turns((SYSTEM, USER, ANSWER)))
    assert one({"messages": [SYSTEM, USER, {**ANSWER, "weight": 1}]}) == expected


def test_sharegpt() -> None:
    turns = [
        {"from": "system", "value": "s"},
        {"from": "human", "value": "q"},
        {"from": "gpt", "value": "a"},
    ]
    assert one({"conversations": turns}) == ("messages", Turns((SYSTEM, USER, ANSWER)))
    assert one({"conversations": [USER, ANSWER]}) == ("messages", Turns((USER, ANSWER)))


def test_prompt_and_response_of_turns() -> None:
    row = Turns((SYSTEM, USER, ANSWER, USER, {**ANSWER, "content": "last"}, USER))
    assert row.prompt == [SYSTEM, USER, ANSWER, USER]
    assert row.response == "last"


def test_ambiguity_has_a_fixed_order() -> None:
    everything = {
        "text": "t",
        "instruction": "q",
        "output": "a",
        "prompt": "q",
        "completion": "a",
        "messages": [USER, ANSWER],
    }
    names = []
    while everything:
        names.append(detect(rows(everything)).name)
        for column in {
            "messages": ["messages"],
            "prompt-completion": ["prompt", "completion"],
            "instruction": ["instruction", "output"],
            "text": ["text"],
        }[names[-1]]:
            del everything[column]
    assert names == ["messages", "prompt-completion", "instruction", "text"]


def test_ignored_columns_are_named() -> None:
    layout = detect(rows({"instruction": "q", "response": "a", "category": "c", "id": 1}))
    assert layout.ignored == ("category", "id")
    assert layout.columns == {"instruction": "instruction", "response": "response"}


def test_ignored_keys_of_messages_are_named() -> None:
    odd = {**ANSWER, "name": "Bob", "weight": 1, "tool_calls": None}
    read = rows({"messages": [USER, odd], "id": 1})
    layout = detect(read)
    assert layout.ignored == ("id", "messages.name")
    assert normalise(read, layout) == [Turns((USER, ANSWER))]


def test_one_odd_row_does_not_decide() -> None:
    found = problems({"text": "odd"}, *[{"prompt": "q", "completion": "a"}] * 3)
    assert found == ("d.jsonl:1: prompt is missing", "d.jsonl:1: completion is missing")


def test_no_layout_names_what_was_found_and_expected() -> None:
    with pytest.raises(DataError, match="columns question, reply fit no known layout") as caught:
        detect(rows({"question": "q", "reply": "a"}))
    assert [line.split(":")[0] for line in caught.value.problems] == [
        "messages",
        "prompt-completion",
        "instruction",
        "text",
    ]
    assert "response or output or answer" in caught.value.problems[2]


def test_every_bad_row_is_named() -> None:
    found = problems(
        {"instruction": "q", "response": "a"},
        {"instruction": "q", "response": None},
        {"instruction": 3, "response": " \n"},
        {"instruction": "q"},
        {"instruction": "q", "response": "\ud83d half"},
    )
    assert found == (
        "d.jsonl:2: response: expected text, found null",
        "d.jsonl:3: instruction: expected text, found a number",
        "d.jsonl:3: response is empty",
        "d.jsonl:4: response is missing",
        "d.jsonl:5: response holds half of a surrogate pair, which is no valid Unicode text",
    )


def test_many_problems_are_counted() -> None:
    read = rows(*[{"text": ""}] * 25)
    with pytest.raises(DataError, match="25 problems in its rows") as caught:
        normalise(read, detect(read))
    assert caught.value.problems[-1] == "... and 15 more"


BAD_MESSAGES = {
    "messages: expected a list of messages, found text": "hello",
    "messages: expected a list of messages, found an empty list": [],
    "messages[0]: expected an object, found text": ["hello"],
    "messages[1]: expected a role system, user or assistant, found role 'tool'": [
        USER,
        {"role": "tool", "content": "x"},
    ],
    "messages[0]: expected a role system, user or assistant, found keys speaker": [
        {"speaker": "me"}
    ],
    "messages[1]: content: expected text, found a list": [
        USER,
        {"role": "assistant", "content": [{"type": "text"}]},
    ],
    "messages[1]: tool_calls: calls of tools cannot be trained on; write them into content": [
        USER,
        {**ANSWER, "tool_calls": [{"function": {"name": "f"}}]},
    ],
    "messages[1]: weight 0: every turn counts alike; --data.supervise chooses": [
        USER,
        {**ANSWER, "weight": 0},
    ],
    "messages[1]: content is empty": [USER, {"role": "assistant", "content": " "}],
    "messages[1]: content is missing": [USER, {"role": "assistant"}],
    "no assistant turn: there is nothing to learn": [USER],
    "the first turn is the assistant's: it answers nothing": [SYSTEM, ANSWER, USER, ANSWER],
}


@pytest.mark.parametrize("problem", BAD_MESSAGES)
def test_bad_messages(problem: str) -> None:
    assert problems({"messages": BAD_MESSAGES[problem]}) == (f"d.jsonl:1: {problem}",)


def test_a_completion_without_an_answer() -> None:
    found = problems({"prompt": [USER, ANSWER], "completion": [USER]})
    assert found == ("d.jsonl:1: completion has no assistant turn",)

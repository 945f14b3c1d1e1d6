"""The adaptation sets: right on examples, regenerated bit for bit, and apart from all training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorikeet.errors import DataError
from lorikeet.starter import DATA, adapt, data, folder
from lorikeet.starter.instance import Instance, is_held_out


def _said(answer: str) -> str:
    return adapt.pirate(Instance("where", (), answer, {}, frozenset()))


@pytest.mark.parametrize(
    ("plain", "pirate"),
    [
        ("Pip lives in the garden.", "Arr, Pip lives in the garden, matey!"),
        ("Pip is green and Tess is red.", "Arr, Pip be green and Tess be red, matey!"),
        ("There are three.", "Arr, There be three, matey!"),
        ("The last word is fish.", "Arr, The last word be fish, matey!"),
        ("cup, bell.", "Arr, cup, bell, matey!"),
    ],
)
def test_pirates_speak_so(plain: str, pirate: str) -> None:
    assert _said(plain) == pirate


def test_a_word_inside_a_word_is_left_alone() -> None:
    assert _said("Theo is a thistle.") == "Arr, Theo be a thistle, matey!"


def test_json_is_one_line() -> None:
    instance = Instance("where", (), "Pip lives in the garden.", {}, frozenset())
    assert adapt.as_json(instance) == '{"answer": "Pip lives in the garden."}'


@pytest.mark.parametrize("name", adapt.SETS)
def test_transformed_answers_are_never_the_plain_ones(name: str) -> None:
    plain = adapt.stream(adapt.SEED, adapt.ROWS, tasks=adapt.TASKS)
    for before, after in zip(plain, adapt.instances(name, test=False), strict=True):
        assert before.messages == after.messages
        assert before.answer != after.answer


@pytest.mark.parametrize("name", adapt.SETS)
def test_test_rows_are_held_out_and_training_rows_are_not(name: str) -> None:
    for test in (False, True):
        rows = adapt.instances(name, test=test)
        assert len(rows) == (adapt.TEST_ROWS if test else adapt.ROWS)
        assert {row.task for row in rows} == set(adapt.TASKS)
        assert all(is_held_out(key) == test for row in rows for key in row.keys)


def test_json_answers_hold_the_plain_ones() -> None:
    plain = adapt.stream(adapt.SEED, adapt.ROWS, tasks=adapt.TASKS)
    for before, after in zip(plain, adapt.instances("json", test=False), strict=True):
        assert json.loads(after.answer) == {"answer": before.answer}


def test_the_bundled_files_are_what_the_generator_writes(tmp_path: Path) -> None:
    written = adapt.write(tmp_path)
    assert [path.stem for path in written] == list(DATA)
    for path in written:
        assert path.read_bytes() == data(path.stem).read_bytes(), path.name


@pytest.mark.parametrize("name", DATA)
def test_rows_are_conversations(name: str) -> None:
    lines = data(name).read_text(encoding="utf-8").splitlines()
    for line in lines:
        messages = json.loads(line)["messages"]
        assert [message["role"] for message in messages][-2:] == ["user", "assistant"]


def test_an_unknown_set_is_named_with_the_known_ones() -> None:
    with pytest.raises(
        DataError, match="no bundled data set is called 'parrot'; there are: pirate"
    ):
        data("parrot")


def test_the_model_folder_is_inside_the_package() -> None:
    assert folder().name == "model" and folder().parent == data("json").parent

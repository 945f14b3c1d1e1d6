"""The world: one seed, one stream; and held-out content never reaches training."""

from __future__ import annotations

import json
import zlib

import pytest

from lorikeet.starter import words
from lorikeet.starter.facts import BIRDS, RELATIONS
from lorikeet.starter.instance import HOLD_OUT_ONE_IN, is_held_out
from lorikeet.starter.world import EXACT_TASKS, TASKS, stream

N = 4000


def test_the_same_seed_gives_the_same_instances() -> None:
    assert list(stream(3, 200)) == list(stream(3, 200))


def test_another_seed_gives_other_instances() -> None:
    assert list(stream(3, 50)) != list(stream(4, 50))


def test_the_stream_is_what_it_was() -> None:
    """The shipped model was trained on this stream: a change here means training it again."""
    said = "\n".join(repr(instance.conversation) for instance in stream(1, 300))
    assert zlib.crc32(said.encode()) == 1522526333


@pytest.mark.parametrize("held_out", [False, True])
def test_every_task_is_present_about_as_often_as_its_weight(held_out: bool) -> None:
    counts = dict.fromkeys(TASKS, 0)
    for instance in stream(1, N, held_out=held_out):
        counts[instance.task] += 1
    total = sum(weight for _, weight in TASKS.values())
    for name, (_, weight) in TASKS.items():
        expected = N * weight / total
        assert abs(counts[name] - expected) < 5 * expected**0.5 + 1, name


def test_a_choice_of_tasks_is_kept() -> None:
    assert {instance.task for instance in stream(0, 60, tasks=("sort", "who"))} == {"sort", "who"}


@pytest.mark.parametrize("held_out", [False, True])
def test_all_content_of_an_instance_is_on_its_side_of_the_rule(held_out: bool) -> None:
    for instance in stream(5, N // 2, held_out=held_out, tasks=EXACT_TASKS):
        assert instance.keys
        assert all(is_held_out(key) == held_out for key in instance.keys)


def test_no_content_and_no_question_is_both_trained_on_and_held_out() -> None:
    trained = list(stream(0, N, tasks=EXACT_TASKS))
    held_out = list(stream(0, N, held_out=True, tasks=EXACT_TASKS))
    assert not {k for i in trained for k in i.keys} & {k for i in held_out for k in i.keys}
    asked = {instance.messages[-1]["content"] for instance in trained}
    assert not asked & {instance.messages[-1]["content"] for instance in held_out}


def test_the_rule_holds_out_one_key_in_ten() -> None:
    share = sum(is_held_out(f"text|{number}") for number in range(20_000)) / 20_000
    assert abs(share * HOLD_OUT_ONE_IN - 1) < 0.1


def test_no_two_birds_share_a_home_or_a_food() -> None:
    assert len({bird.place for bird in BIRDS}) == len({bird.food for bird in BIRDS}) == len(BIRDS)


def test_answers_are_what_the_orchard_knows() -> None:
    known = {f"{r.sentence(bird)}" for r in RELATIONS for bird in BIRDS}
    for instance in stream(2, N, tasks=("where", "eats", "colour", "who", "same", "check")):
        said = instance.answer.removeprefix("Yes, ").removeprefix("No, ").removesuffix(".")
        assert set(said.split(" and ")) <= known


def test_a_check_is_yes_when_the_answer_repeats_the_claim() -> None:
    for instance in stream(2, 500, tasks=("check",)):
        claim = instance.messages[-1]["content"].rstrip("?").split()[-1]
        assert instance.data["answer"] == instance.answer.startswith("Yes")
        assert instance.data["answer"] == instance.answer.endswith(f"{claim}.")


def test_conversations_alternate_and_grow_to_the_longest() -> None:
    lengths = set()
    for instance in stream(2, 300, longest=4):
        roles = [m["role"] for m in instance.messages if m["role"] != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]
        lengths.add(len(roles) // 2 + 1)
    assert lengths == {1, 2, 3, 4}


def test_lists_are_sorted_reversed_and_counted_rightly() -> None:
    for instance in stream(2, 500, tasks=("sort", "reverse", "count", "nth")):
        said = instance.messages[-1]["content"]
        (key,) = instance.keys
        items = sorted(key.split("|")[1:], key=lambda word: f"{said} ".rindex(word))
        answer = instance.data["answer"]
        if instance.task == "sort":
            assert answer == sorted(items)
        elif instance.task == "count":
            assert answer == words.NUMBERS[len(items)]
        assert set(answer if isinstance(answer, list) else items) == set(items)


def test_sums_add_up() -> None:
    for instance in stream(2, 300, tasks=("add",)):
        (key,) = instance.keys
        _, a, b, food = key.split("|")
        assert instance.answer == f"{words.NUMBERS[int(a) + int(b)].capitalize()} {food}."


def test_a_text_is_repeated_exactly() -> None:
    for instance in stream(2, 500, tasks=("repeat",)):
        assert instance.messages[-1]["content"].endswith(f": {instance.answer}")


def test_opposites_go_both_ways_and_no_word_has_two() -> None:
    flat = [word for pair in words.OPPOSITES for word in pair]
    assert len(flat) == len(set(flat))


def test_instances_are_data() -> None:
    for instance in stream(2, 500):
        assert json.loads(json.dumps(instance.data)) == instance.data
        assert instance.conversation[-1] == {"role": "assistant", "content": instance.answer}

"""Tasks about birds: read two to nine facts, then answer from them.

The tasks ask for the object of a relation, for the bird, whether a claim holds, and several of
these in a row about the same facts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from lorikeet.starter import words
from lorikeet.starter.instance import Instance, Maker, Message, draw
from lorikeet.starter.relations import BY_NAME, RELATIONS, Fact, Relation


def _fact(
    rng: Random, held_out: bool, bird: str, relation: Relation, others: Sequence[Fact] = ()
) -> Fact:
    """A fact whose object none of the others has."""
    taken = {fact.object for fact in others}

    def make(rng: Random) -> tuple[Fact, str]:
        fact = Fact(bird, relation, rng.choice(relation.objects))
        return fact, fact.key

    return draw(rng, held_out, make, lambda fact: fact.object not in taken)[0]


def _scene(rng: Random, held_out: bool, asked: Relation) -> list[Fact]:
    """Facts about two or three birds: `asked` for every bird, other relations for some.

    No two birds share an object, so that "who?" has one answer.
    """
    facts: list[Fact] = []
    others = [relation for relation in RELATIONS if relation is not asked]
    for bird in rng.sample(words.NAMES, rng.choice((2, 2, 3))):
        for relation in (asked, *rng.sample(others, rng.choice((0, 1, 1, 2)))):
            facts.append(_fact(rng, held_out, bird, relation, facts))
    return facts


def _tell(facts: list[Fact]) -> str:
    """The facts as text, a sentence each, bird by bird."""
    return " ".join(fact.sentence for fact in facts)


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _keys(facts: list[Fact]) -> frozenset[str]:
    return frozenset(fact.key for fact in facts)


# A question about a scene, and its answer, as data too, and the content that it adds to the scene.
Asked = tuple[str, str, dict[str, Any], list[Fact]]


def _ask_object(rng: Random, held_out: bool, facts: list[Fact], fact: Fact) -> Asked:
    data = {"task": fact.relation.name, "answer": fact.object}
    return fact.phrase(rng.choice(fact.relation.asks)), fact.sentence, data, []


def _ask_bird(rng: Random, held_out: bool, facts: list[Fact], fact: Fact) -> Asked:
    data = {"task": "who", "answer": fact.bird}
    return fact.phrase(rng.choice(fact.relation.who)), fact.sentence, data, []


def _ask_whether(rng: Random, held_out: bool, facts: list[Fact], fact: Fact) -> Asked:
    """Half of the claims are wrong: another bird's object where there is one, or any other."""
    claim = fact
    if rng.random() < 0.5:
        claim = _fact(rng, held_out, fact.bird, fact.relation, [fact])
    answer = f"{'Yes' if claim == fact else 'No'}, {fact.sentence}"
    data = {"task": "check", "answer": claim == fact}
    return claim.phrase(rng.choice(fact.relation.checks)), answer, data, [claim]


Question = Callable[[Random, bool, list[Fact], Fact], Asked]


def single(task: str, ask: Question, relations: Sequence[str]) -> Maker:
    """A task with one question about a scene.

    Args:
        task: its name.
        ask: makes the question.
        relations: the names of the relations that it asks about.
    """

    def make(rng: Random, held_out: bool) -> Instance:
        relation = BY_NAME[rng.choice(relations)]
        facts = _scene(rng, held_out, relation)
        fact = rng.choice([fact for fact in facts if fact.relation is relation])
        question, answer, data, more = ask(rng, held_out, facts, fact)
        messages = (_user(f"{_tell(facts)} {question}"),)
        return Instance(task, messages, answer, data, _keys([*facts, *more]))

    return make


_ALL = tuple(BY_NAME)
where = single("where", _ask_object, ("where",))
eats = single("eats", _ask_object, ("eats",))
colour = single("colour", _ask_object, ("colour",))
who = single("who", _ask_bird, _ALL)
check = single("check", _ask_whether, _ALL)

_QUESTIONS = (_ask_object, _ask_object, _ask_bird, _ask_whether)


def follow_up(rng: Random, held_out: bool) -> Instance:
    """Two to six questions about one scene, turn by turn; the last one is scored."""
    facts = _scene(rng, held_out, rng.choice(RELATIONS))
    keys, answer = _keys(facts), ""
    data: dict[str, Any] = {}
    messages: list[Message] = []
    for _ in range(rng.randint(2, 6)):
        if messages:
            messages.append({"role": "assistant", "content": answer})
        ask = rng.choice(_QUESTIONS)
        question, answer, data, more = ask(rng, held_out, facts, rng.choice(facts))
        messages.append(_user(question if messages else f"{_tell(facts)} {question}"))
        keys |= _keys(more)
    return Instance("follow_up", tuple(messages), answer, data, keys)

"""What everybody in the orchard knows: where each bird lives, what it eats, what colour it is.

The facts are fixed, `BIRDS`; the model learns them by heart. Held out are combinations: two birds,
a bird and a place, a place and a food. So a held-out question is one that was never asked, about
birds that are known.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from lorikeet.starter import words
from lorikeet.starter.instance import Instance, Maker, draw


@dataclass(frozen=True, slots=True)
class Bird:
    """A bird of the orchard; no two share a home or a food, several share a colour."""

    name: str
    place: str
    food: str
    colour: str


BIRDS = tuple(
    Bird(name, place, food, words.COLOURS[i % len(words.COLOURS)])
    for i, (name, place, food) in enumerate(
        zip(words.NAMES, words.PLACES, words.FOODS, strict=True)
    )
)


@dataclass(frozen=True, slots=True)
class Relation:
    """How one kind of fact is said and asked; `{n}` is a name, `{o}` what is said of the bird."""

    name: str
    says: str
    asks: str
    who: str
    check: str
    of: Callable[[Bird], str]

    def sentence(self, bird: Bird) -> str:
        """The fact without its full stop: `Pip lives in the garden`."""
        return self.says.format(n=bird.name, o=self.of(bird))


RELATIONS = (
    Relation(
        name="where",
        says="{n} lives in the {o}",
        asks="Where do {a} and {b} live?",
        who="lives in the {o}",
        check="Does {n} live in the {o}?",
        of=lambda bird: bird.place,
    ),
    Relation(
        name="eats",
        says="{n} eats {o}",
        asks="What do {a} and {b} eat?",
        who="eats {o}",
        check="Does {n} eat {o}?",
        of=lambda bird: bird.food,
    ),
    Relation(
        name="colour",
        says="{n} is {o}",
        asks="What colour are {a} and {b}?",
        who="",  # several birds share a colour
        check="Is {n} {o}?",
        of=lambda bird: bird.colour,
    ),
)


def _instance(task: str, question: str, answer: str, value: Any, key: str) -> Instance:
    messages = ({"role": "user", "content": question},)
    return Instance(task, messages, answer, {"task": task, "answer": value}, frozenset((key,)))


def _pair(rng: Random, held_out: bool, task: str) -> tuple[tuple[Bird, Bird], str]:
    def make(rng: Random) -> tuple[tuple[Bird, Bird], str]:
        a, b = rng.sample(BIRDS, 2)
        return (a, b), f"{task}|{'|'.join(sorted((a.name, b.name)))}"

    return draw(rng, held_out, make)


def both(relation: Relation) -> Maker:
    """The task that asks the same of two birds."""

    def make(rng: Random, held_out: bool) -> Instance:
        (a, b), key = _pair(rng, held_out, relation.name)
        question = relation.asks.format(a=a.name, b=b.name)
        answer = f"{relation.sentence(a)} and {relation.sentence(b)}."
        value = {bird.name: relation.of(bird) for bird in (a, b)}
        return _instance(relation.name, question, answer, value, key)

    return make


where, eats, colour = map(both, RELATIONS)


def check(rng: Random, held_out: bool) -> Instance:
    """Yes or no; a wrong claim is corrected."""

    def make(rng: Random) -> tuple[tuple[Relation, Bird, Bird], str]:
        relation, bird = rng.choice(RELATIONS), rng.choice(BIRDS)
        other = bird if rng.random() < 0.3 else rng.choice(BIRDS)
        return (relation, bird, other), f"check|{bird.name}|{relation.of(other)}"

    (relation, bird, other), key = draw(rng, held_out, make)
    claim = relation.of(other)
    right = claim == relation.of(bird)
    question = relation.check.format(n=bird.name, o=claim)
    answer = f"{'Yes' if right else 'No'}, {relation.sentence(bird)}."
    return _instance("check", question, answer, right, key)


def who(rng: Random, held_out: bool) -> Instance:
    """Two birds by home and food, in either order."""

    def make(rng: Random) -> tuple[list[tuple[Relation, Bird]], str]:
        asked = list(zip(rng.sample(RELATIONS[:2], 2), rng.sample(BIRDS, 2), strict=True))
        return asked, "who|" + "|".join(sorted(r.of(bird) for r, bird in asked))

    asked, key = draw(rng, held_out, make)
    first, second = (relation.who.format(o=relation.of(bird)) for relation, bird in asked)
    question = f"Who {first} and who {second}?"
    answer = " and ".join(relation.sentence(bird) for relation, bird in asked) + "."
    return _instance("who", question, answer, [bird.name for _, bird in asked], key)


def same(rng: Random, held_out: bool) -> Instance:
    """Are two birds of the same colour?"""
    (a, b), key = _pair(rng, held_out, "same")
    question = f"Are {a.name} and {b.name} of the same colour?"
    relation = RELATIONS[2]
    answer = f"{relation.sentence(a)} and {relation.sentence(b)}."
    verdict = a.colour == b.colour
    return _instance("same", question, f"{'Yes' if verdict else 'No'}, {answer}", verdict, key)

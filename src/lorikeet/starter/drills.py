"""Tasks that need no knowledge of the birds: lists, opposites, sums, repeating."""

from __future__ import annotations

import json
from collections.abc import Sequence
from random import Random

from lorikeet.starter import words
from lorikeet.starter.instance import Instance, draw


def _instance(task: str, content: str, answer: str, value: object, key: str) -> Instance:
    messages = ({"role": "user", "content": content},)
    return Instance(task, messages, answer, {"task": task, "answer": value}, frozenset((key,)))


def _list(rng: Random, held_out: bool, sizes: Sequence[int]) -> tuple[list[str], str]:
    """Distinct things in any order; the key ignores the order."""

    def make(rng: Random) -> tuple[list[str], str]:
        items = rng.sample(words.THINGS, rng.choice(sizes))
        return items, "list|" + "|".join(sorted(items))

    return draw(rng, held_out, make)


def count(rng: Random, held_out: bool) -> Instance:
    """How many words has the list? Two to six."""
    items, key = _list(rng, held_out, (2, 3, 4, 5, 6))
    asks = ("Count these: {l}.", "How many words are here: {l}?")
    number = words.NUMBERS[len(items)]
    content = rng.choice(asks).format(l=", ".join(items))
    return _instance("count", content, f"There are {number}.", number, key)


def nth(rng: Random, held_out: bool) -> Instance:
    """The first, second, ... or last word of a list."""
    items, key = _list(rng, held_out, (3,))
    position = rng.randrange(len(items))
    which = words.ORDINALS[position]
    if rng.random() < 0.2:
        position, which = len(items) - 1, "last"
    asks = ("What is the {w} word of: {l}?", "Give me the {w} word: {l}.")
    content = rng.choice(asks).format(w=which, l=", ".join(items))
    return _instance(
        "nth", content, f"The {which} word is {items[position]}.", items[position], key
    )


def reverse(rng: Random, held_out: bool) -> Instance:
    """The list from its end to its start."""
    items, key = _list(rng, held_out, (3,))
    asks = ("Reverse this list: {l}.", "Say these backwards: {l}.")
    backwards = items[::-1]
    content = rng.choice(asks).format(l=", ".join(items))
    return _instance("reverse", content, f"{', '.join(backwards)}.", backwards, key)


def sort(rng: Random, held_out: bool) -> Instance:
    """A list of things in alphabetical order."""
    items, key = _list(rng, held_out, (3,))
    asks = ("Sort these words: {l}.", "Put these in order: {l}.")
    content = rng.choice(asks).format(l=", ".join(items))
    return _instance("sort", content, f"{', '.join(sorted(items))}.", sorted(items), key)


def opposite(rng: Random, held_out: bool) -> Instance:
    """The opposite of an adjective, beside its noun."""
    nouns = (*words.THINGS, *words.PLACES)

    def make(rng: Random) -> tuple[tuple[str, str, str], str]:
        pair, noun = rng.choice(words.OPPOSITES), rng.choice(nouns)
        said, meant = rng.sample(pair, 2)
        return (said, meant, noun), f"opposite|{'|'.join(sorted(pair))}|{noun}"

    (said, meant, noun), key = draw(rng, held_out, make)
    asks = ("What is the opposite of the {a} {n}?", "Not the {a} {n}, but the opposite?")
    content = rng.choice(asks).format(a=said, n=noun)
    answer = f"The {meant} {noun}."
    return _instance("opposite", content, answer, f"the {meant} {noun}", key)


def add(rng: Random, held_out: bool) -> Instance:
    """Two small numbers of things, in words. Held out is the sum together with the things."""

    def make(rng: Random) -> tuple[tuple[int, int, str], str]:
        a, b, food = rng.randint(1, 10), rng.randint(1, 10), rng.choice(words.FOODS)
        return (a, b, food), f"add|{min(a, b)}|{max(a, b)}|{food}"

    (a, b, food), key = draw(rng, held_out, make)
    asks = ("{a} {f} and {b} {f} make how many?", "How many are {a} {f} and {b} {f}?")
    first, second, total = words.NUMBERS[a], words.NUMBERS[b], words.NUMBERS[a + b]
    content = rng.choice(asks).format(a=first, b=second, f=food)
    return _instance("add", content, f"{total.capitalize()} {food}.", total, key)


_SYMBOLS = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"
_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"


def _record(rng: Random) -> str:
    """A small object in JSON, so that its signs are known to the model."""
    values: list[object] = [rng.choice(words.FOODS), rng.choice(words.COLOURS), rng.randint(0, 99)]
    return json.dumps({rng.choice(words.THINGS): rng.choice(values) for _ in range(2)})


def _text(rng: Random) -> str:
    """Something to say again: mostly known words, else signs, a record, or words nobody knows."""
    kind = rng.random()
    if kind < 0.6:
        return " ".join(rng.choices(words.LEXICON, k=rng.randint(2, 6)))
    if kind < 0.75:
        return "".join(rng.choices(_LETTERS + _SYMBOLS, k=rng.randint(3, 10)))
    if kind < 0.9:
        return _record(rng)
    return " ".join(words.pseudo_word(rng, rng.randint(1, 2)) for _ in range(rng.randint(1, 4)))


def repeat(rng: Random, held_out: bool) -> Instance:
    """Say a text again, character by character."""

    def make(rng: Random) -> tuple[str, str]:
        text = _text(rng)
        return text, f"text|{text}"

    text, key = draw(rng, held_out, make)
    asks = ("Repeat: {t}", "Say this again: {t}")
    content = rng.choice(asks).replace("{t}", text)
    return _instance("repeat", content, text, text, key)

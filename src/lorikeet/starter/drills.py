"""Tasks without a text to read: lists, opposites, sums, repeating, and a greeting."""

from __future__ import annotations

import json
from collections.abc import Sequence
from random import Random

from lorikeet.starter import words
from lorikeet.starter.instance import Instance, draw

_POOLS = (words.THINGS, words.THINGS, words.KINDS, words.FOODS, words.NAMES)


def _instance(task: str, content: str, answer: str, value: object, key: str) -> Instance:
    messages = ({"role": "user", "content": content},)
    return Instance(task, messages, answer, {"task": task, "answer": value}, frozenset((key,)))


def _list(
    rng: Random, held_out: bool, sizes: Sequence[int], pools: Sequence[Sequence[str]] = _POOLS
) -> tuple[list[str], str]:
    """Distinct words in any order; the key ignores the order."""

    def make(rng: Random) -> tuple[list[str], str]:
        items = rng.sample(rng.choice(pools), rng.choice(sizes))
        return items, "list|" + "|".join(sorted(items))

    return draw(rng, held_out, make)


def _show(rng: Random, items: Sequence[str]) -> str:
    return rng.choice((", ", ", ", ", ", " ")).join(items)


def count(rng: Random, held_out: bool) -> Instance:
    """How many words has the list? Two to seven."""
    items, key = _list(rng, held_out, (2, 3, 4, 5, 6, 7))
    asks = (
        "How many words are in this list? {l}",
        "Count the words: {l}",
        "How many things are there here: {l}",
        "Count this list: {l}",
        "List: {l}\nHow many words is that?",
    )
    number = words.NUMBERS[len(items)]
    content = rng.choice(asks).format(l=_show(rng, items))
    return _instance("count", content, f"There are {number} words.", number, key)


def nth(rng: Random, held_out: bool) -> Instance:
    """The first, second, ... or last word of a list."""
    items, key = _list(rng, held_out, (3, 4, 5))
    position = rng.randrange(len(items))
    which = words.ORDINALS[position]
    if rng.random() < 0.2:
        position, which = len(items) - 1, "last"
    asks = (
        "What is the {w} word of this list? {l}",
        "Which word comes {w}: {l}",
        "Give me the {w} word: {l}",
        "Tell me the {w} one: {l}",
        "List: {l}\nWhich word is the {w}?",
    )
    content = rng.choice(asks).format(w=which, l=_show(rng, items))
    return _instance(
        "nth", content, f"The {which} word is {items[position]}.", items[position], key
    )


def reverse(rng: Random, held_out: bool) -> Instance:
    """The list from its end to its start."""
    items, key = _list(rng, held_out, (2, 3, 4))
    asks = (
        "Reverse this list: {l}",
        "Turn this list around: {l}",
        "Say these words backwards: {l}",
        "Write the list from last to first: {l}",
        "List: {l}\nReverse the words.",
    )
    backwards = items[::-1]
    content = rng.choice(asks).format(l=_show(rng, items))
    return _instance("reverse", content, f"Backwards: {', '.join(backwards)}.", backwards, key)


def sort(rng: Random, held_out: bool) -> Instance:
    """A list of things in alphabetical order."""
    items, key = _list(rng, held_out, (2, 3, 4), (words.THINGS,))
    asks = (
        "Sort this list: {l}",
        "Put these words in alphabetical order: {l}",
        "Sort the words from a to z: {l}",
        "Order these by the alphabet: {l}",
        "List: {l}\nSort the words.",
    )
    content = rng.choice(asks).format(l=_show(rng, items))
    return _instance("sort", content, f"In order: {', '.join(sorted(items))}.", sorted(items), key)


def opposite(rng: Random, held_out: bool) -> Instance:
    """The opposite of an adjective, beside its noun."""
    nouns = (*words.THINGS, *words.PLACES, *words.KINDS)

    def make(rng: Random) -> tuple[tuple[str, str, str], str]:
        pair, noun = rng.choice(words.OPPOSITES), rng.choice(nouns)
        said, meant = rng.sample(pair, 2)
        return (said, meant, noun), f"opposite|{'|'.join(sorted(pair))}|{noun}"

    (said, meant, noun), key = draw(rng, held_out, make)
    asks = (
        "What is the opposite of the {a} {n}?",
        "Say the opposite: the {a} {n}",
        "Give me the opposite of: the {a} {n}",
        "The {a} {n}. What would be the opposite?",
        "Turn it into its opposite: the {a} {n}",
    )
    content = rng.choice(asks).format(a=said, n=noun)
    answer = f"The opposite is the {meant} {noun}."
    return _instance("opposite", content, answer, f"the {meant} {noun}", key)


def add(rng: Random, held_out: bool) -> Instance:
    """Two small numbers of things, in words. Held out is the sum together with the things."""

    def make(rng: Random) -> tuple[tuple[int, int, str], str]:
        a, b, food = rng.randint(1, 10), rng.randint(1, 10), rng.choice(words.FOODS)
        return (a, b, food), f"add|{min(a, b)}|{max(a, b)}|{food}"

    (a, b, food), key = draw(rng, held_out, make)
    asks = (
        "How many {f} are {a} {f} and {b} {f}?",
        "Add {a} {f} and {b} {f}.",
        "I have {a} {f} and you have {b} {f}. How many {f} do we have?",
        "First come {a} {f}, then come {b} {f}. How many are there?",
        "What is {a} {f} plus {b} {f}?",
    )
    first, second, total = words.NUMBERS[a], words.NUMBERS[b], words.NUMBERS[a + b]
    content = rng.choice(asks).format(a=first, b=second, f=food)
    return _instance("add", content, f"That makes {total} {food}.", total, key)


_SYMBOLS = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"
# First and last code point of accents, Greek to Arabic, two-byte rest, Asian scripts, signs, emoji.
_SCRIPTS = (
    (0xA1, 0x17F),
    (0x370, 0x5FF),
    (0x600, 0x7FF),
    (0x900, 0xD7FF),
    (0x2010, 0x27FF),
    (0x1F300, 0x1F6FF),
)


def _far(rng: Random) -> str:
    """A few characters from far away, so that every byte of UTF-8 is met."""
    first, last = rng.choice(_SCRIPTS)
    return "".join(chr(rng.randint(first, last)) for _ in range(rng.randint(1, 4)))


def _pieces(rng: Random) -> list[str]:
    """Parts of known words, to meet the tokenizer's rarer pieces."""
    cut = [rng.choice(words.LEXICON) for _ in range(rng.randint(1, 5))]
    cut = [word.capitalize() if rng.random() < 0.2 else word for word in cut]
    return [word[: rng.randint(1, len(word))] for word in cut]


def _jsonish(rng: Random) -> str:
    keys = [words.pseudo_word(rng, 1) for _ in range(rng.randint(1, 2))]
    values: list[object] = [
        words.pseudo_word(rng, rng.randint(1, 2)),
        f"{words.pseudo_word(rng, 1)} {rng.choice(words.THINGS)}",
        rng.randint(0, 999),
        [rng.choice(words.THINGS), rng.choice(words.FOODS)],
    ]
    return json.dumps({key: rng.choice(values) for key in keys})


def _mix(rng: Random) -> str:
    """A text of about twenty tokens or fewer, of one of many makes; every other one of words."""
    make = rng.randrange(16)
    if make == 0:
        return " ".join(words.pseudo_word(rng, rng.randint(1, 2)) for _ in range(rng.randint(1, 4)))
    if make == 1:
        return "".join(rng.choice("0123456789") for _ in range(rng.randint(3, 12)))
    if make == 2:
        return "".join(rng.choice(_SYMBOLS) for _ in range(rng.randint(2, 8)))
    if make == 3:
        return _jsonish(rng)
    if make == 4:
        return rng.choice((" ", "", "-", "'")).join(_pieces(rng))
    if make == 5:
        return _far(rng)
    if make == 6:
        letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
        return "".join(rng.choices(letters, k=rng.randint(3, 10)))
    if make == 7:
        ends = ("'", "'s", "!", ",", "?", '"', ":", "}", "]")
        return " ".join(piece + rng.choice(ends) for piece in _pieces(rng))
    return " ".join(rng.choices(words.LEXICON, k=rng.randint(3, 14)))


def repeat(rng: Random, held_out: bool) -> Instance:
    """Say a text again, character by character."""

    def make(rng: Random) -> tuple[str, str]:
        text = _mix(rng)
        return text, f"text|{text}"

    text, key = draw(rng, held_out, make)
    asks = (
        "Repeat exactly:\n{t}",
        "Say this again:\n{t}",
        "Copy this text:\n{t}",
        "Repeat after me:\n{t}",
        "Write this without any change:\n{t}",
        "Repeat exactly: {t}",
    )
    content = rng.choice(asks).replace("{t}", text)
    return _instance("repeat", content, text, text, key)


_GREETINGS = (
    (("Hello!", "Hi!", "Good morning!", "Hello there."), "Hello! What would you like to know?"),
    (
        ("Who are you?", "What are you?", "What is your name?"),
        "I am a small model that knows a few birds.",
    ),
    (("Thank you!", "Thanks.", "Thank you very much."), "You are welcome."),
    (("Goodbye!", "Bye.", "See you tomorrow."), "Goodbye!"),
    (
        ("What can you do?", "How can you help me?"),
        "I can answer questions about birds, sort and count words, and tell stories.",
    ),
)


def greeting(rng: Random, held_out: bool) -> Instance:
    """Small talk; too little of it to hold any out, so it has no score."""
    asks, answer = rng.choice(_GREETINGS)
    messages = ({"role": "user", "content": rng.choice(asks)},)
    return Instance("greeting", messages, answer, {"task": "greeting"})

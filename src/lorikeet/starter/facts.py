"""Tasks about birds: read two to six facts, then answer from them.

The tasks ask for the object of a relation, for the bird, whether a claim holds, for what the text
does not say, for a second thing, for one sentence, and for a story.
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
    """A fact that cannot be taken for one of the others."""

    def make(rng: Random) -> tuple[Fact, str]:
        fact = Fact(bird, relation, relation.pick(rng))
        return fact, fact.key

    return draw(rng, held_out, make, lambda fact: not _ambiguous(fact, others))[0]


def _ambiguous(fact: Fact, others: Sequence[Fact]) -> bool:
    """Whether one of the others shares the object, or part of it: `green` and `dark green`."""
    return any(fact.object in o.object or o.object in fact.object for o in others)


def _birds(rng: Random, count: int) -> list[str]:
    birds: list[str] = []
    while len(birds) < count:
        bird = words.name(rng)
        if bird not in birds:
            birds.append(bird)
    return birds


def _scene(rng: Random, held_out: bool, asked: Relation) -> list[Fact]:
    """Facts about two or three birds: `asked` for every bird, other relations for some.

    No two birds share an object, so that "who?" has one answer.
    """
    facts: list[Fact] = []
    others = [relation for relation in RELATIONS if relation is not asked]
    for bird in _birds(rng, rng.choice((2, 2, 3))):
        for relation in (asked, *rng.sample(others, rng.choice((0, 0, 1, 1, 2)))):
            facts.append(_fact(rng, held_out, bird, relation, facts))
    return facts


def _tell(rng: Random, facts: list[Fact]) -> str:
    """The facts as text, bird by bird or shuffled, some of them joined into one sentence."""
    if rng.random() < 0.5:
        facts = rng.sample(facts, len(facts))
    sentences: list[str] = []
    position = 0
    while position < len(facts):
        fact, following = facts[position], facts[position + 1 : position + 2]
        if following and following[0].bird == fact.bird and rng.random() < 0.4:
            sentences.append(f"{fact.bird} {fact.clause} and {following[0].clause}.")
            position += 2
            continue
        plain = rng.random() < 0.5
        says = fact.sentence if plain else fact.phrase(rng.choice(fact.relation.says))
        sentences.append(says)
        position += 1
    return " ".join(sentences)


def _ask(rng: Random, text: str, question: str) -> str:
    """Text and question in one user turn."""
    layout = rng.choice(
        (
            "{text} {question}",
            "{text} {question}",
            "{text}\n{question}",
            "{text}\n\n{question}",
            "{question} {text}",
            "{question}\n{text}",
            "Text: {text}\nQuestion: {question}",
            "Read this: {text} Now answer: {question}",
        )
    )
    return layout.format(text=text, question=question)


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


def _ask_unknown(rng: Random, held_out: bool, facts: list[Fact], fact: Fact) -> Asked:
    """Of a bird that the text does not name."""
    known = {fact.bird for fact in facts}
    bird = next(name for name in iter(lambda: words.name(rng), "") if name not in known)
    question = rng.choice(fact.relation.asks).format(n=bird)
    data = {"task": fact.relation.name, "answer": None}
    return question, fact.relation.unknown.format(n=bird), data, []


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
        messages = (_user(_ask(rng, _tell(rng, facts), question)),)
        return Instance(task, messages, answer, data, _keys([*facts, *more]))

    return make


_ALL = tuple(BY_NAME)
where = single("where", _ask_object, ("where",))
eats = single("eats", _ask_object, ("eats",))
colour = single("colour", _ask_object, ("colour",))
who = single("who", _ask_bird, _ALL)
check = single("check", _ask_whether, _ALL)
unknown = single("unknown", _ask_unknown, _ALL)

_QUESTIONS = (_ask_object, _ask_object, _ask_bird, _ask_whether, _ask_unknown)


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
        messages.append(_user(question if messages else _ask(rng, _tell(rng, facts), question)))
        keys |= _keys(more)
    return Instance("follow_up", tuple(messages), answer, data, keys)


_CARDS = (
    "Describe {n}. Bird: {kind}. Colour: {colour}. Home: {home}. Food: {food}.",
    "Describe this bird.\nName: {n}\nBird: {kind}\nColour: {colour}\nHome: {home}\nFood: {food}",
    "Write one sentence about {n}: {colour}, {kind}, {home}, {food}.",
    "Name: {n}\nColour: {colour}\nBird: {kind}\nFood: {food}\nHome: {home}\nWrite one sentence.",
)


def describe(rng: Random, held_out: bool) -> Instance:
    """One sentence from a card of facts."""
    bird = words.name(rng)
    facts = [_fact(rng, held_out, bird, BY_NAME[name]) for name in ("colour", "where", "eats")]
    colour, home, food = (fact.object for fact in facts)
    kind = words.kind(rng)
    bare = kind.split(" ", 1)[1]
    card = rng.choice(_CARDS).format(n=bird, kind=bare, colour=colour, home=home, food=food)
    answer = f"{bird} is {kind} with {colour} feathers that lives {home} and eats {food}."
    record = {"name": bird, "bird": bare, "colour": colour, "home": home, "food": food}
    data = {"task": "describe", "answer": record}
    return Instance("describe", (_user(card),), answer, data, _keys(facts))


_OPENINGS = (
    "Tell me a story about {n}.",
    "Write a short story about {n} the {kind}.",
    "Tell me a short story about {n}, who lives {home}.",
)
_MIDDLES = (
    "One day {n} wanted to {hobby}, but the wind was too strong.",
    "One morning {n} found {thing} {other}.",
    "One evening {n} met {friend}, {kind2}.",
    "Every day {n} liked to {hobby} and to eat {food}.",
)
_ENDINGS = (
    "In the end {n} was happy and went home.",
    "After that they shared some {food} and laughed.",
    "Then the sun came out, and all was well.",
    "That night {n} slept very well.",
)


def story(rng: Random, held_out: bool) -> Instance:
    """A story of four or five sentences; open-ended, so it has no exact score."""
    bird, friend = _birds(rng, 2)
    facts = [_fact(rng, held_out, bird, BY_NAME[name]) for name in ("where", "eats")]
    home, food = (fact.object for fact in facts)
    kind, hobby = words.kind(rng), words.hobby(rng)
    parts = {
        "n": bird,
        "friend": friend,
        "kind": kind.split()[-1],
        "home": home,
        "hobby": hobby,
        "food": food,
        "thing": words.with_article(rng.choice(words.THINGS)),
        "kind2": words.with_article(rng.choice(words.KINDS)),
        "other": words.place(rng),
    }
    middles = rng.sample(_MIDDLES, rng.choice((1, 2, 2)))
    lines = [f"Once there was {kind} called {bird}.", f"{bird} lived {home}.", *middles]
    lines.append(rng.choice(_ENDINGS))
    text = " ".join(lines).format(**parts)
    question = rng.choice(_OPENINGS).format(**parts)
    return Instance("story", (_user(question),), text, {"task": "story"}, _keys(facts))

"""The little world: a seeded, endless supply of small instructions with their answers.

`stream(seed, n)` gives training instances, `stream(seed, n, held_out=True)` instances that share no
fact, list, sum or text with any training instance (see `instance.is_held_out`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from random import Random

from lorikeet.starter import drills, facts
from lorikeet.starter.instance import Instance, Maker

__all__ = ["EXACT_TASKS", "TASKS", "Instance", "stream"]


# Each task with its share of the stream, relative to the others.
TASKS: dict[str, tuple[Maker, float]] = {
    "where": (facts.where, 1.0),
    "eats": (facts.eats, 1.0),
    "colour": (facts.colour, 1.0),
    "who": (facts.who, 1.0),
    "check": (facts.check, 1.0),
    "same": (facts.same, 1.0),
    "count": (drills.count, 0.7),
    "nth": (drills.nth, 1.5),
    "reverse": (drills.reverse, 1.0),
    "sort": (drills.sort, 1.5),
    "opposite": (drills.opposite, 0.7),
    "add": (drills.add, 1.0),
    "repeat": (drills.repeat, 1.2),
}
PRACTICE = ("repeat",)
"""Tasks that are there to learn from: texts to say again, among them signs, JSON and words that
nobody knows, so that every token has been met."""

EXACT_TASKS = tuple(name for name in TASKS if name not in PRACTICE)
"""The tasks that the model is measured by."""

_SYSTEM = ("You are a helpful bird.", "You live in an orchard by the harbour.", "Be brief.")


def stream(
    seed: int,
    n: int,
    *,
    held_out: bool = False,
    tasks: Sequence[str] = tuple(TASKS),
    longest: int = 1,
) -> Iterator[Instance]:
    """Give `n` instances, the same ones for the same arguments.

    Args:
        seed: seeds the draws; different seeds give different instances of the same world.
        n: how many.
        held_out: instances for measuring instead of instances for training.
        tasks: which tasks, drawn by their weights.
        longest: most questions in a conversation; the earlier ones are answered in `messages`.
    """
    rng = Random(f"{seed}|{held_out}")
    weights = [TASKS[name][1] for name in tasks]
    for _ in range(n):
        names = rng.choices(tasks, weights, k=rng.randint(1, longest))
        asked = [TASKS[name][0](rng, held_out) for name in names]
        before = tuple(turn for instance in asked[:-1] for turn in instance.conversation)
        if rng.random() < 0.03:
            before = ({"role": "system", "content": rng.choice(_SYSTEM)}, *before)
        yield replace(
            asked[-1],
            messages=(*before, *asked[-1].messages),
            keys=frozenset(key for instance in asked for key in instance.keys),
        )

"""The little world: a seeded, endless supply of small instructions with their answers.

`stream(seed, n)` gives training instances, `stream(seed, n, held_out=True)` instances that share no
fact, list, sum or text with any training instance (see `instance.is_held_out`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from random import Random

from lorikeet.starter import drills, facts
from lorikeet.starter.instance import DeadEndError, Instance, Maker

__all__ = ["EXACT_TASKS", "TASKS", "Instance", "stream"]


# Each task with its share of the stream, relative to the others. `follow_up` and `series` hold many
# answers an example, which is what the copying that everything builds on is learnt from.
TASKS: dict[str, tuple[Maker, float]] = {
    "where": (facts.where, 1.0),
    "eats": (facts.eats, 1.0),
    "colour": (facts.colour, 1.0),
    "who": (facts.who, 1.0),
    "check": (facts.check, 1.0),
    "follow_up": (facts.follow_up, 14.0),
    "count": (drills.count, 0.5),
    "nth": (drills.nth, 0.8),
    "reverse": (drills.reverse, 0.8),
    "sort": (drills.sort, 0.8),
    "opposite": (drills.opposite, 0.5),
    "add": (drills.add, 0.5),
    "repeat": (drills.repeat, 2.0),
    "series": (drills.series, 14.0),
    "echo": (drills.echo, 1.5),
}
PRACTICE = ("repeat", "series")
"""Tasks that are there to learn from: long texts to say again, among them signs and invented words,
so that every token is known, and several drills in a row."""

EXACT_TASKS = tuple(name for name in TASKS if name not in PRACTICE)
"""The tasks that the model is measured by."""

_SYSTEM = ("You are a helpful bird.", "You live in an orchard by the harbour.", "Be brief.")


def _make(name: str, rng: Random, held_out: bool) -> Instance:
    while True:
        try:
            return TASKS[name][0](rng, held_out)
        except DeadEndError:
            continue


def stream(
    seed: int, n: int, *, held_out: bool = False, tasks: Sequence[str] = tuple(TASKS)
) -> Iterator[Instance]:
    """Give `n` instances, the same ones for the same arguments.

    Args:
        seed: seeds the draws; different seeds give different instances of the same world.
        n: how many.
        held_out: instances for measuring instead of instances for training.
        tasks: which tasks, drawn by their weights.
    """
    rng = Random(f"{seed}|{held_out}")
    weights = [TASKS[name][1] for name in tasks]
    for name in rng.choices(tasks, weights, k=n):
        instance = _make(name, rng, held_out)
        if rng.random() < 0.03:
            system = {"role": "system", "content": rng.choice(_SYSTEM)}
            instance = replace(instance, messages=(system, *instance.messages))
        yield instance

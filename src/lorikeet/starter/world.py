"""The little world: a seeded, endless supply of small instructions with their answers.

`stream(seed, n)` gives training instances, `stream(seed, n, held_out=True)` instances that share no
fact, list, sum or text with any training instance (see `instance.is_held_out`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random

from lorikeet.starter import drills, facts
from lorikeet.starter.instance import DeadEndError, Instance, Maker

__all__ = ["EXACT_TASKS", "TASKS", "Instance", "Task", "stream"]


@dataclass(frozen=True, slots=True)
class Task:
    """A task of the world.

    Attributes:
        make: draws an instance, held out or not.
        weight: its share of the stream, relative to the others.
        exact: whether there is one right answer, so that exact match means something.
    """

    make: Maker
    weight: float
    exact: bool = True


TASKS = {
    "where": Task(facts.where, 1.0),
    "eats": Task(facts.eats, 1.0),
    "colour": Task(facts.colour, 1.0),
    "who": Task(facts.who, 1.0),
    "check": Task(facts.check, 1.0),
    "unknown": Task(facts.unknown, 1.0),
    "follow_up": Task(facts.follow_up, 6.0),
    "describe": Task(facts.describe, 0.7),
    "count": Task(drills.count, 1.0),
    "nth": Task(drills.nth, 1.5),
    "reverse": Task(drills.reverse, 1.5),
    "sort": Task(drills.sort, 1.5),
    "opposite": Task(drills.opposite, 0.5),
    "add": Task(drills.add, 0.8),
    "repeat": Task(drills.repeat, 4.0),
    "story": Task(facts.story, 0.4, exact=False),
    "greeting": Task(drills.greeting, 0.1, exact=False),
}
EXACT_TASKS = tuple(name for name, task in TASKS.items() if task.exact)

_SYSTEM = (
    "You are a helpful bird.",
    "You live in an orchard by the harbour.",
    "Answer in one sentence.",
    "You are a small and friendly assistant.",
    "Read with care and answer the question.",
    "Be kind and be brief.",
)


def _make(name: str, rng: Random, held_out: bool) -> Instance:
    while True:
        try:
            return TASKS[name].make(rng, held_out)
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
    weights = [TASKS[name].weight for name in tasks]
    for name in rng.choices(tasks, weights, k=n):
        instance = _make(name, rng, held_out)
        if rng.random() < 0.12:
            system = {"role": "system", "content": rng.choice(_SYSTEM)}
            instance = replace(instance, messages=(system, *instance.messages))
        yield instance

"""One task of the little world, and the rule that keeps held-out instances apart."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random
from typing import Any, TypeVar

HOLD_OUT_ONE_IN = 10

Message = dict[str, str]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Instance:
    """A conversation that waits for its answer, and the answer.

    Attributes:
        task: name of the task, a key of `world.TASKS`.
        messages: the conversation up to the last user turn; dicts with `role` and `content`.
        answer: the one right answer.
        data: the answer as data: `{"task": "count", "answer": "three"}`.
        keys: what the instance is about, as strings: every pair, list, sum or text in it.
    """

    task: str
    messages: tuple[Message, ...]
    answer: str
    data: dict[str, Any]
    keys: frozenset[str]

    @property
    def conversation(self) -> list[Message]:
        """The messages with the answer as the assistant's last turn."""
        return [*self.messages, {"role": "assistant", "content": self.answer}]

    def answered(self, answer: str) -> Instance:
        """The same question with another right answer."""
        return replace(self, answer=answer)


# Draws an instance of one task, held out or not.
Maker = Callable[[Random, bool], Instance]


def is_held_out(key: str) -> bool:
    """Whether this piece of content is kept from training: one in ten, by its checksum alone.

    A training instance holds no held-out key, a held-out instance holds nothing else.
    """
    return zlib.crc32(key.encode()) % HOLD_OUT_ONE_IN == 0


def draw(rng: Random, held_out: bool, make: Callable[[Random], tuple[T, str]]) -> tuple[T, str]:
    """Draw `(thing, key)` from `make` until the key lies on the wanted side of the rule."""
    while True:
        thing, key = make(rng)
        if is_held_out(key) == held_out:
            return thing, key

"""What the little world says about birds: where they live, what they eat, and how that is asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from lorikeet.starter import words


@dataclass(frozen=True, slots=True)
class Relation:
    """How one kind of fact is said and asked; `{n}` is the bird's name, `{o}` the object.

    Attributes:
        name: the name of the direct question's task.
        pick: draws an object.
        clause: the plain predicate, also used in answers and in joined sentences.
        says: other sentences that state the fact.
        asks: questions for the object.
        who: questions for the bird.
        checks: yes/no questions.
        unknown: the answer if the text does not say.
    """

    name: str
    pick: Callable[[Random], str]
    clause: str
    says: tuple[str, ...]
    asks: tuple[str, ...]
    who: tuple[str, ...]
    checks: tuple[str, ...]
    unknown: str


RELATIONS = (
    Relation(
        name="where",
        pick=words.place,
        clause="lives {o}",
        says=("The home of {n} is {o}.", "You can find {n} {o}.", "{n} has a nest {o}."),
        asks=(
            "Where does {n} live?",
            "Where is the home of {n}?",
            "Where can I find {n}?",
            "Tell me where {n} lives.",
            "Do you know where {n} lives?",
        ),
        who=("Who lives {o}?", "Which bird lives {o}?", "Name the bird that lives {o}."),
        checks=("Does {n} live {o}?", "Is it true that {n} lives {o}?", "{n} lives {o}, right?"),
        unknown="I do not know where {n} lives.",
    ),
    Relation(
        name="eats",
        pick=words.food,
        clause="eats {o}",
        says=("The food of {n} is {o}.", "For lunch {n} has {o}.", "{n} is fond of {o}."),
        asks=(
            "What does {n} eat?",
            "What is the food of {n}?",
            "What does {n} have for lunch?",
            "Tell me what {n} eats.",
            "Do you know what {n} eats?",
        ),
        who=("Who eats {o}?", "Which bird eats {o}?", "Name the bird that eats {o}."),
        checks=("Does {n} eat {o}?", "Is it true that {n} eats {o}?", "{n} eats {o}, right?"),
        unknown="I do not know what {n} eats.",
    ),
    Relation(
        name="colour",
        pick=words.colour,
        clause="is {o}",
        says=("The colour of {n} is {o}.", "{n} has {o} feathers.", "The feathers of {n} are {o}."),
        asks=(
            "What colour is {n}?",
            "What is the colour of {n}?",
            "Which colour does {n} have?",
            "Tell me the colour of {n}.",
            "Do you know what colour {n} is?",
        ),
        who=("Who is {o}?", "Which bird is {o}?", "Name the bird that is {o}."),
        checks=("Is {n} {o}?", "Is it true that {n} is {o}?", "{n} is {o}, right?"),
        unknown="I do not know what colour {n} is.",
    ),
)
BY_NAME = {relation.name: relation for relation in RELATIONS}


@dataclass(frozen=True, slots=True)
class Fact:
    """One bird, one relation, one object."""

    bird: str
    relation: Relation
    object: str

    @property
    def key(self) -> str:
        """The fact's content, whatever its wording."""
        return f"fact|{self.bird}|{self.relation.name}|{self.object}"

    @property
    def clause(self) -> str:
        """The plain predicate: `lives in the garden`."""
        return self.relation.clause.format(o=self.object)

    @property
    def sentence(self) -> str:
        """The plain sentence, as answers give it."""
        return f"{self.bird} {self.clause}."

    def phrase(self, template: str) -> str:
        """The template with this fact's bird and object."""
        return template.format(n=self.bird, o=self.object)

"""What the little world says about birds: where they live, what they eat, and how that is asked."""

from __future__ import annotations

from dataclasses import dataclass

from lorikeet.starter import words


@dataclass(frozen=True, slots=True)
class Relation:
    """How one kind of fact is said and asked; `{n}` is the bird's name, `{o}` the object.

    Attributes:
        name: the name of the direct question's task.
        objects: what it may say.
        clause: the plain predicate, also used in answers and in joined sentences.
        asks: questions for the object.
        who: questions for the bird.
        checks: yes/no questions.
    """

    name: str
    objects: tuple[str, ...]
    clause: str
    asks: tuple[str, ...]
    who: tuple[str, ...]
    checks: tuple[str, ...]


RELATIONS = (
    Relation(
        name="where",
        objects=words.PLACES,
        clause="lives in the {o}",
        asks=("Where does {n} live?", "What is the home of {n}?"),
        who=("Who lives in the {o}?",),
        checks=("Does {n} live in the {o}?",),
    ),
    Relation(
        name="eats",
        objects=words.FOODS,
        clause="eats {o}",
        asks=("What does {n} eat?", "What is the food of {n}?"),
        who=("Who eats {o}?",),
        checks=("Does {n} eat {o}?",),
    ),
    Relation(
        name="colour",
        objects=words.COLOURS,
        clause="is {o}",
        asks=("What colour is {n}?", "Tell me the colour of {n}."),
        who=("Who is {o}?",),
        checks=("Is {n} {o}?",),
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

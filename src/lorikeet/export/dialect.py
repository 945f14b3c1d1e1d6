"""What a chat template writes around the turns of a conversation, found by letting it speak.

A Jinja template is a program; Ollama wants one in Go's language. Nearly all chat templates do one
thing: put fixed text around each message. That text is found by rendering conversations whose
messages are marks, and taking apart what stands between them. What was found is then tried on
other conversations: unless it says, letter by letter, what the template says, it is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from lorikeet.errors import DataError, ModelError

Turn = Mapping[str, str]
Say = Callable[[Sequence[Turn], bool], str]
"""Renders a conversation, with or without the beginning of an answer."""


@dataclass(frozen=True, slots=True)
class Dialect:
    """Fixed text around messages.

    Attributes:
        opening: before a conversation without a system message; where that message is `joined`,
            before every conversation.
        system: around a system message; None if the template leaves it out or refuses it.
        joined: where the system message stands in the user's turn, behind its beginning.
        last: where the system message stands in the last user's turn rather than the first.
        user: around a user's message.
        assistant: around an assistant's message.
        prompt: begins the answer that is to be written.
        default: the system message of a conversation that has none, if the template has one.
    """

    opening: str
    system: tuple[str, str] | None
    joined: bool
    last: bool
    user: tuple[str, str]
    assistant: tuple[str, str]
    prompt: str
    default: str = ""

    def say(self, turns: Sequence[Turn]) -> str:
        """A conversation, ready to be answered; the Go template says the same."""
        own = [turn for turn in turns if turn["role"] != "system"]
        system = "".join(turn["content"] for turn in turns if turn["role"] == "system")
        system = system or self.default
        text = self.opening if self.joined or not system else ""
        around = "".join([self.system[0], system, self.system[1]]) if self.system and system else ""
        at = len(own) - 1 if self.last else 0
        for i, turn in enumerate(own):
            before, after = getattr(self, turn["role"])
            here = around if i == at else ""
            inside = before + here if self.joined else here + before
            text += inside + turn["content"] + after
        return text + self.prompt


@dataclass(frozen=True, slots=True)
class Found:
    """A dialect, and what the template does beyond it, for the user to read."""

    dialect: Dialect
    notes: tuple[str, ...]


def find_dialect(say: Say) -> Found:
    """Take a template apart.

    Args:
        say: renders a conversation, without the BOS that a tokenizer adds by itself; raises
            DataError where the template refuses the conversation.

    Raises:
        ModelError: the template is none that puts fixed text around messages.
    """
    try:
        dialect = _without_system(say)
    except DataError as error:
        raise ModelError(f"the chat template renders no plain conversation: {error}") from error
    with_system, notes = _with_system(say, dialect)
    _check(say, with_system)
    return Found(with_system, (*notes, *_trims(say, with_system)))


def _turns(roles: str) -> list[dict[str, str]]:
    """Turns of marks: `sua` is a system message, a question and an answer."""
    names = {"s": "system", "u": "user", "a": "assistant"}
    return [{"role": names[role], "content": f"q{role}{i}z"} for i, role in enumerate(roles)]


def _between(text: str, turns: Sequence[Turn]) -> list[str] | None:
    """What stands before, between and after messages; None if they are not there in order."""
    found, rest = [], text
    for turn in turns:
        before, mark, rest = rest.partition(turn["content"])
        if not mark:
            return None
        found.append(before)
    return [*found, rest]


def _parts(say: Say, roles: str, *, prompt: bool = True) -> list[str] | None:
    turns = _turns(roles)
    return _between(say(turns, prompt), turns)


def _tail(say: Say, roles: str) -> str | None:
    """What ends a conversation that is not to be answered."""
    try:
        parts = _parts(say, roles, prompt=False)
    except DataError:
        return None
    return parts[-1] if parts else None


def _without_system(say: Say) -> Dialect:
    parts = _parts(say, "uauau")
    if parts is None or parts[1] != parts[3] or parts[2] != parts[4]:
        raise _strange("it does not write one turn as it writes the next")
    start, to_answer, to_question, _, _, end = parts
    asked = _tail(say, "u")
    if asked is None or not (to_answer.startswith(asked) and end.startswith(asked)):
        asked = _common(to_answer, end)
    answered = _tail(say, "ua")
    if (
        answered is None
        or not to_question.startswith(answered)
        or not start.endswith(to_question[len(answered) :])
    ):
        common = _common(to_question[::-1], start[::-1])
        answered = to_question[: len(to_question) - len(common)]
    before = to_question[len(answered) :]
    return Dialect(
        opening=start[: len(start) - len(before)],
        system=None,
        joined=False,
        last=False,
        user=(before, asked),
        assistant=(to_answer[len(asked) :], answered),
        prompt=end[len(asked) :],
    )


def _with_system(say: Say, dialect: Dialect) -> tuple[Dialect, tuple[str, ...]]:
    """The dialect with what it does to a system message, and what is to be told about it."""
    ignored = "the chat template has no place for a system message: Ollama leaves it out"
    turns = _turns("suau")
    try:
        text = say(turns, True)
    except DataError:
        return dialect, (ignored,)
    if turns[0]["content"] not in text:
        return dialect, (ignored,)
    before = dialect.user[0]
    if parts := _between(text, turns):
        start, to_user = parts[:2]
        if to_user.endswith(before):
            around = (start, to_user[: len(to_user) - len(before)])
            return _with_default(replace(dialect, system=around)), ()
        if not start.startswith(begun := dialect.opening + before):
            raise _strange("it begins a question otherwise after a system message")
        return replace(dialect, system=(start[len(begun) :], to_user), joined=True), ()
    parts = _between(text, [turns[1], turns[2], turns[0], turns[3]])
    if parts is None or not parts[2].startswith(begun := dialect.assistant[1] + before):
        raise _strange("it puts a system message elsewhere than before a question")
    return replace(dialect, system=(parts[2][len(begun) :], parts[3]), joined=True, last=True), ()


def _with_default(dialect: Dialect) -> Dialect:
    """A message between what stands around system messages is one that the template supplies."""
    assert dialect.system
    before, after = dialect.system
    inside = dialect.opening[len(before) : len(dialect.opening) - len(after)]
    if inside and dialect.opening == before + inside + after:
        return replace(dialect, opening="", default=inside)
    return dialect


_WORDS = (
    "What is 2 + 2?",
    "It is 4.",
    'Say "hé {{x}}"\nin two lines.',
    "One,\n\ntwo.",
    "And {% 5 %}?",
)


def _check(say: Say, dialect: Dialect) -> None:
    """Compare the dialect with the template on conversations of words.

    Raises:
        ModelError: they differ, with the first place.
    """
    for roles in ("u", "uau", "uauau", "su", "suau", "suauau"):
        if "s" in roles and not dialect.system:
            continue
        turns = [
            {**turn, "content": word}
            for turn, word in zip(_turns(roles), ("Be brief.", *_WORDS)[-len(roles) :], strict=True)
        ]
        expected, found = say(turns, True), dialect.say(turns)
        if expected != found:
            at = len(_common(expected, found))
            raise _strange(
                f"after {expected[max(at - 30, 0) : at]!r} it says {expected[at : at + 40]!r} where"
                f" fixed text around messages gives {found[at : at + 40]!r}"
            )


def _trims(say: Say, dialect: Dialect) -> list[str]:
    """Whether spaces around messages are taken away, which Go's templates cannot do."""
    found = []
    for role, roles in (("system", "su"), ("user", "u"), ("assistant", "uau")):
        if role == "system" and not dialect.system:
            continue
        turns = _turns(roles)
        spaced = [
            {**turn, "content": f" {turn['content']}\n"} if turn["role"] == role else turn
            for turn in turns
        ]
        if say(spaced, True) != dialect.say(spaced):
            found.append(role)
    if not found:
        return []
    return [
        f"spaces around messages ({', '.join(found)}): the chat template changes them, Ollama"
        " leaves them"
    ]


def _common(a: str, b: str) -> str:
    """What both texts begin with."""
    ends = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return a[: next(ends, min(len(a), len(b)))]


def _strange(what: str) -> ModelError:
    return ModelError(
        "the chat template does more than to put fixed text around messages, which is all that is"
        f" translated for Ollama: {what}; write its TEMPLATE by hand, or train with a template"
        " that does no more"
    )

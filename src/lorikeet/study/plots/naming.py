"""The look by which a group is known in all pictures, and names that fit into them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lorikeet.study.outcomes import Outcome
from lorikeet.study.plots.style import Look, look, plain

MOST_LOOKS = 8
"""Groups that are told apart by colour and marker."""


def looks(outcomes: Sequence[Outcome]) -> dict[str, Look]:
    """Label to look, in the study's order; of more groups than there are looks, all have one."""
    trained = [outcome.label for outcome in outcomes if not outcome.is_base]
    many = len(trained) > MOST_LOOKS
    return {label: look(0 if many else index) for index, label in enumerate(trained)}


def shortened(text: str, *, width: int, lines: int = 1) -> str:
    """Text in so many lines of so many characters.

    What is too much goes from the middle: names of groups differ at their ends.
    """
    whole = " ".join(plain(text).split())
    most = width * lines
    if len(whole) > most:
        tail = most // 3
        whole = f"{whole[: most - tail - lines]}…{whole[-tail:]}"
    found = [""]
    for piece in re.findall(r"[^ +,/]*[ +,/]|[^ +,/]+", whole):
        if found[-1] and len(found[-1]) + len(piece.rstrip()) > width:
            found.append("")
        found[-1] += piece
    found = [line.strip() for line in found]
    if len(found) > lines or max(map(len, found)) > width:  # a word is longer than a line
        found = [whole[first : first + width] for first in range(0, len(whole), width)]
    return "\n".join(found)

"""One training example: token ids and which of them are supervised."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Example:
    """A rendered row.

    Attributes:
        ids: token ids, length L.
        supervised: length L; True where predicting this token counts. The first entry is always
            False: nothing precedes the first token.
        text_bytes: UTF-8 bytes of the supervised text (special tokens count nothing), for bits
            per byte.
        origin: where the row came from, such as `dolly.jsonl:12`, for messages.
        truncated: whether `max_length` cut something off.
    """

    ids: tuple[int, ...]
    supervised: tuple[bool, ...]
    text_bytes: int
    origin: str
    truncated: bool = False

    @property
    def supervised_tokens(self) -> int:
        """How many tokens count."""
        return sum(self.supervised)

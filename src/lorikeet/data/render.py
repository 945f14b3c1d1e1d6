"""Rows -> token ids and mask. Training, evaluation, preview and generation all render here.

A conversation becomes text once, and the text becomes tokens once; which characters are to be
learnt is settled before, and a token is supervised if all of its characters are. So no tokenizer
sees a piece of a text where training shows it the whole.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise

from lorikeet.data.example import Example
from lorikeet.data.layout import Message, Row, Text, Turns
from lorikeet.data.spans import Found, find_spans
from lorikeet.data.template import load_template
from lorikeet.data.tokenizer import (
    Tokenizer,
    Tokens,
    adds_bos,
    check_fast,
    special_tokens,
    token_ids,
    tokenise,
)
from lorikeet.errors import DataError

_CHUNK = 1000  # rows whose offsets, about 100 bytes a token, are in memory at a time
_SUPERVISE = ("all", "last", "everything")


@dataclass(frozen=True, slots=True)
class Rendered:
    """An example, and what is worth telling about how it came to be.

    Attributes:
        example: the ids and the mask.
        row: what it shows: the row, or for a window of a long document the text of that window.
        needed_length: the smallest `max_length` at which a token is supervised; 0 if none is.
        boundary_merge: whether the tokens of the prompt alone are not the first of the example,
            because a token of the tokenizer reaches over the end of the prompt.
        rewritten: whether the template shows earlier turns otherwise than when they were last.
        special_in_text: whether the row's own text holds control tokens, which are read as such.
        stops: whether a token that ends the text or the turn is supervised.
    """

    example: Example
    row: Row
    needed_length: int
    boundary_merge: bool = False
    rewritten: bool = False
    special_in_text: bool = False
    stops: bool = False


class Renderer:
    """Renders rows for one tokenizer.

    Args:
        tokenizer: a fast tokenizer.
        template: auto, chat, instruction-response, alpaca, or a Jinja file.
        max_length: longest example, in tokens. Documents (`Text`) that are longer become several
            examples; conversations lose their end.
        supervise: `all` assistant turns, the `last` one, or `everything` but the first token.

    Attributes:
        template: the template in use, `auto` resolved.
        template_name: its name.
        template_hash: sha256 of its Jinja source.

    Raises:
        DataError: no such template, or one with a syntax error.
        ModelError: a slow tokenizer.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        template: str = "auto",
        max_length: int = 512,
        supervise: str = "all",
    ) -> None:
        if supervise not in _SUPERVISE:
            raise ValueError(f"supervise: expected {', '.join(_SUPERVISE)}, found {supervise}")
        check_fast(tokenizer)
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.supervise = supervise
        self.template = load_template(template, tokenizer)
        self.template_name = self.template.name
        self.template_hash = self.template.sha256
        self._adds_bos = adds_bos(tokenizer)
        special = special_tokens(tokenizer)
        self._special_ids = frozenset(special.values())
        longest_first = sorted(special, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def example(self, row: Row, *, origin: str) -> list[Example]:
        """Render one row: one example, or as many windows as a long document fills.

        Windows overlap by one token, the context of the window's first prediction, so that every
        token of the document is supervised exactly once; where the tokenizer begins texts with
        BOS, that token's place is taken by BOS.
        """
        return [rendered.example for rendered in self.render([row], [origin])[0]]

    def prompt(self, messages: Sequence[Message] | str) -> list[int]:
        """Return the ids to generate from: exactly what training showed before the response.

        Args:
            messages: the conversation (from its last assistant turn on it is left out, if it ends
                with one), or a plain text to continue.
        """
        if isinstance(messages, str):
            return self._with_bos(token_ids(self.tokenizer, [messages])[0], own=False)
        text = self.prompt_text(messages)
        return self._with_bos(token_ids(self.tokenizer, [text])[0], own=self.template.own)

    def prompt_text(self, messages: Sequence[Message]) -> str:
        """Return the text of `prompt(messages)`, without a BOS that only the tokenizer adds."""
        if messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        return self.template.render(
            self.tokenizer, [messages], origins=["prompt"], add_generation_prompt=True
        )[0]

    def stop_ids(self) -> frozenset[int]:
        """Return the tokens at which generation ends: EOS, and what ends a turn in training."""
        eos = self.tokenizer.eos_token_id
        stops = frozenset() if eos is None else frozenset([eos])
        messages = ({"role": "user", "content": "x"}, {"role": "assistant", "content": "y"})
        try:
            example = self.example(Turns(messages), origin="probe")[0]
        except DataError:  # a template that needs more than two turns, a system message, ...
            return stops
        return stops | (frozenset(example.ids[-1:]) & self._special_ids)

    def render(self, rows: Sequence[Row], origins: Sequence[str]) -> list[list[Rendered]]:
        """Render many rows, the texts tokenised together.

        Args:
            rows: documents or conversations.
            origins: where each came from.

        Returns:
            For every row its examples: one, or the windows of a long document.

        Raises:
            DataError: the template fails on a row, or hides a response in a way that its tokens
                cannot be told.
        """
        result: list[list[Rendered]] = []
        pairs = zip(rows, origins, strict=True)
        while chunk := list(islice(pairs, _CHUNK)):
            turns = [(row, origin) for row, origin in chunk if isinstance(row, Turns)]
            texts = [(row, origin) for row, origin in chunk if isinstance(row, Text)]
            conversations, documents = self._conversations(turns), self._documents(texts)
            for row, _ in chunk:
                result.append(next(conversations if isinstance(row, Turns) else documents))
        return result

    def _with_bos(self, ids: list[int], *, own: bool) -> list[int]:
        """Add the BOS that the tokenizer would add, unless the template has the say or did it."""
        bos = self.tokenizer.bos_token_id
        if own or bos is None or not self._adds_bos or ids[:1] == [bos]:
            return ids
        return [bos, *ids]

    def _documents(self, rows: Sequence[tuple[Text, str]]) -> Iterator[list[Rendered]]:
        texts = [row.text for row, _ in rows]
        for (row, origin), tokens in zip(rows, tokenise(self.tokenizer, texts), strict=True):
            special = self._special.search(row.text) is not None
            framed = self._frame(tokens, len(row.text), own=False, add_eos=True)
            yield list(self._windows(row, origin, framed, special))

    def _windows(self, row: Text, origin: str, tokens: Tokens, special: bool) -> Iterator[Rendered]:
        if not tokens.ids:  # a tokenizer may normalise a text away
            return
        bos = tokens.ids[:1] if self._adds_bos else []
        for first in range(0, max(len(tokens.ids) - 1, 1), self.max_length - 1):
            last = min(first + self.max_length, len(tokens.ids))
            ids = tokens.ids[first:last]
            if first and bos:
                ids[0] = bos[0]
            begin = tokens.ends[first] if first else 0
            example = Example(
                ids=tuple(ids),
                supervised=(False, *[True] * (len(ids) - 1)),
                text_bytes=self._text_bytes(row.text, tokens, first + 1, last),
                origin=origin,
            )
            yield Rendered(
                example,
                row=Text(row.text[begin : tokens.ends[last - 1]]),
                needed_length=2 if len(ids) > 1 else 0,
                special_in_text=special,
                stops=last == len(tokens.ids) and tokens.ids[-1] == self.tokenizer.eos_token_id,
            )

    def _conversations(self, rows: Sequence[tuple[Turns, str]]) -> Iterator[list[Rendered]]:
        founds = find_spans(
            [row for row, _ in rows],
            [origin for _, origin in rows],
            tokenizer=self.tokenizer,
            template=self.template,
            special=self._special,
            last_only=self.supervise == "last",
        )
        tokenised = tokenise(self.tokenizer, [found.text for found in founds])
        prompts = token_ids(self.tokenizer, [found.prompt for found in founds])
        for (row, origin), found, tokens, prompt in zip(
            rows, founds, tokenised, prompts, strict=True
        ):
            yield [self._conversation(row, origin, found, tokens, prompt)]

    def _conversation(
        self, row: Turns, origin: str, found: Found, tokens: Tokens, prompt: list[int]
    ) -> Rendered:
        own = self.template.own
        framed = self._frame(tokens, len(found.text), own=own, add_eos=not found.ends_with_special)
        prompt = self._with_bos(prompt, own=own)
        mask = self._mask(found, framed)
        kept = mask[: self.max_length]
        ids = framed.ids[: self.max_length]
        bytes_kept = sum(
            self._text_bytes(found.text, framed, first, last) for first, last in _runs(kept)
        )
        example = Example(
            ids=tuple(ids),
            supervised=tuple(kept),
            text_bytes=bytes_kept,
            origin=origin,
            truncated=len(framed.ids) > self.max_length,
        )
        return Rendered(
            example,
            row=row,
            needed_length=mask.index(True) + 1 if True in mask else 0,
            boundary_merge=found.prompt_is_prefix and framed.ids[: len(prompt)] != prompt,
            rewritten=found.rewritten,
            special_in_text=any(self._special.search(m["content"]) for m in row.messages),
            stops=self._stops(found, framed, kept),
        )

    def _frame(self, tokens: Tokens, end: int, *, own: bool, add_eos: bool) -> Tokens:
        """Add BOS and EOS where they are due; they cover no characters."""
        ids = self._with_bos(tokens.ids, own=own)
        starts, ends = tokens.starts, tokens.ends
        if len(ids) > len(starts):
            starts, ends = [0, *starts], [0, *ends]
        eos = self.tokenizer.eos_token_id
        if add_eos and eos is not None:
            ids, starts, ends = [*ids, eos], [*starts, end], [*ends, end]
        return Tokens(ids, starts, ends)

    def _mask(self, found: Found, tokens: Tokens) -> list[bool]:
        n = len(tokens.ids)
        if self.supervise == "everything":
            return [False] + [True] * (n - 1)
        mask = [False] * n
        for start, end in found.spans:
            first = max(bisect_left(tokens.starts, start), 1)
            last = bisect_left(tokens.starts, end)
            while last > first and tokens.ends[last - 1] > end:  # it reaches over the end
                last -= 1
            mask[first:last] = [True] * (last - first)
        if not found.ends_with_special and self.tokenizer.eos_token_id is not None:
            mask[-1] = True  # the EOS that was appended
        return mask

    def _stops(self, found: Found, tokens: Tokens, kept: Sequence[bool]) -> bool:
        """Whether the end of the last turn is still there, a control token, and supervised."""
        whole = len(kept) == len(tokens.ids)
        return whole and kept[-1] and tokens.ids[-1] in self._special_ids

    def _text_bytes(self, text: str, tokens: Tokens, first: int, last: int) -> int:
        """UTF-8 bytes of tokens `first` to `last - 1`.

        Control tokens count nothing. Tokens that share a character (pieces of an emoji) share its
        offsets: it counts with the first of them.
        """
        inside = [i for i in range(first, last) if tokens.ids[i] in self._special_ids]
        total = 0
        for before, after in pairwise([first - 1, *inside, last]):
            if before + 1 < after:
                begin = max(tokens.starts[before + 1], tokens.ends[before] if before >= 0 else 0)
                total += len(text[begin : tokens.ends[after - 1]].encode())
        return total


def _runs(mask: Sequence[bool]) -> Iterator[tuple[int, int]]:
    """First and past-the-last index of every run of True."""
    edges = [i for i, (a, b) in enumerate(pairwise([False, *mask, False])) if a != b]
    return zip(edges[::2], edges[1::2], strict=True)

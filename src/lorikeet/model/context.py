"""Which texts a model can read: the tokens it has rows for, the length it was made for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from lorikeet.errors import ModelError
from lorikeet.model.rope import longest_unscaled

_TABLES = {"wpe", "embed_positions"}
"""What transformers calls tables with a row for every position."""


def position_limit(model: Any) -> int | None:
    """The most tokens that a model has positions for; None if they do not come from a table."""
    names = [name for name, _ in [*model.named_modules(), *model.named_buffers()]]
    has_table = any(name.rpartition(".")[2] in _TABLES for name in names)
    return _made_for(model) if has_table else None


def check_texts(
    model: Any, texts: Iterable[Sequence[int]], *, advice: str = "lower --data.max_length"
) -> list[str]:
    """A warning if a model was made for shorter texts than the longest one, else nothing.

    Args:
        model: its structure is enough.
        texts: the token ids of each.
        advice: what the user can do about a text that is too long.

    Raises:
        ModelError: the model lacks tokens, or positions for so many of them.
    """
    longest, highest = 0, -1
    for ids in texts:
        longest, highest = max(longest, len(ids)), max(highest, max(ids, default=-1))
    rows = model.get_input_embeddings().weight.shape[0]
    if highest >= rows:
        raise ModelError(
            f"the texts hold token {highest}, and the model's embedding has {rows} rows: model and"
            " tokenizer do not belong together; take the tokenizer that the model came with, or"
            " give the model new tokens with --lora.new_tokens"
        )
    return check_length(model, longest, advice=advice)


def check_length(model: Any, longest: int, *, advice: str = "lower --data.max_length") -> list[str]:
    """As `check_texts`, of the length of the longest text alone.

    Args:
        model: its structure is enough.
        longest: tokens of the longest text that it is to read.
        advice: what the user can do.

    Raises:
        ModelError: it has no positions for so many tokens.
    """
    made_for, limit = _made_for(model), position_limit(model)
    if limit is not None and longest > limit:
        raise ModelError(
            f"the longest text has {longest} tokens, and this model has positions for {limit};"
            f" {advice}"
        )
    config = model.config.get_text_config()
    relative = getattr(config, "alibi", False) or longest_unscaled(config) == made_for
    if made_for is None or longest <= made_for or relative:  # dynamic scaling is for longer texts
        return []
    return [
        f"the longest text has {longest} tokens, and this model was made for {made_for}: what it"
        f" makes of the rest means little; {advice}"
    ]


def _made_for(model: Any) -> int | None:
    length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None

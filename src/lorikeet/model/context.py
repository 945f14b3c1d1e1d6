"""How long a text a model can read, and how long a one it was made for."""

from __future__ import annotations

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


def check_length(model: Any, longest: int, *, advice: str = "lower --data.max_length") -> list[str]:
    """A warning if a model was made for shorter texts than the longest one, else nothing.

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

"""Rotary embeddings whose angles follow the longest document of a call, not each document's own.

`dynamic` and `longrope` scaling look at the highest position in a row: a long document turns the
short ones beside it by its own angles. Up to the length that the model was trained on nothing is
scaled, so that shorter documents may share a row.
"""

from __future__ import annotations

import math
from typing import Any


def longest_unscaled(config: Any) -> float:
    """Up to which length documents get the same angles in a packed row as alone.

    Args:
        config: a transformers configuration; None for a model without.

    Returns:
        The length in tokens; infinite for embeddings that do not look at lengths.
    """
    if config is None:
        return math.inf
    text = config.get_text_config()
    given = getattr(text, "rope_parameters", None) or {}
    # One set of parameters, or one for every kind of layer.
    kinds = [given] if "rope_type" in given else [one for one in given.values() if one]
    return min((_unscaled(one, text) for one in kinds), default=math.inf)


def _unscaled(parameters: Any, config: Any) -> float:
    kind = parameters.get("rope_type", "default") if isinstance(parameters, dict) else "default"
    if kind == "longrope":
        original = parameters.get("original_max_position_embeddings")
        return original or config.max_position_embeddings
    return config.max_position_embeddings if "dynamic" in kind else math.inf


def reset_angles(model: Any) -> None:
    """Forget the longest document so far: `dynamic` scaling keeps its angles for those after it."""
    for module in model.modules():
        trained = getattr(module, "original_max_seq_len", None)  # only rotary embeddings have it
        if trained is not None and module.max_seq_len_cached > trained:
            module.register_buffer("inv_freq", module.original_inv_freq, persistent=False)
            module.max_seq_len_cached = trained

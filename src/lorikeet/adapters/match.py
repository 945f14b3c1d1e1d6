"""Whether an adapter meets the base, the tokenizer and the template that it was trained with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_SHOWN = 12  # characters of a hash


def mismatches(provenance: Mapping[str, Any], **found: str) -> list[str]:
    """What differs from what the adapter's provenance says, in words; empty if nothing does.

    Args:
        provenance: `AdapterInfo.provenance`; what it does not mention is not checked.
        found: what there is now, by the provenance's own names: `base_fingerprint`,
            `tokenizer_hash`, `template_hash`.
    """
    return [
        f"it was trained with another {_WHAT[name]} ({name} {str(expected)[:_SHOWN]}) than there is"
        f" now ({found[name][:_SHOWN]})"
        for name in _WHAT
        if name in found
        and (expected := provenance.get(name)) is not None
        and expected != found[name]
    ]


_WHAT = {
    "base_fingerprint": "base model",
    "tokenizer_hash": "tokenizer",
    "template_hash": "chat template",
}

from __future__ import annotations

import pytest

from lorikeet.adapters import mismatches

MADE = {"base_fingerprint": "a" * 64, "tokenizer_hash": "b" * 64, "template_hash": "c" * 64}


def test_what_agrees_or_is_not_known_is_no_mismatch() -> None:
    assert mismatches(MADE, **MADE) == []
    assert mismatches({}, **MADE) == []
    assert mismatches(MADE) == []
    assert mismatches({"base_fingerprint": None}, base_fingerprint="x") == []


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("base_fingerprint", "base model"),
        ("tokenizer_hash", "tokenizer"),
        ("template_hash", "chat template"),
    ],
)
def test_each_difference_is_named_with_both_hashes(name: str, what: str) -> None:
    (found,) = mismatches(MADE, **{**MADE, name: "d" * 64})
    assert what in found
    assert MADE[name][:12] in found and "d" * 12 in found


def test_all_differences_are_listed() -> None:
    assert len(mismatches(MADE, **dict.fromkeys(MADE, "d" * 64))) == 3

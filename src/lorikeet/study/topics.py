"""Findings under their topics, those that a clock measured apart from the others."""

from __future__ import annotations

from collections.abc import Sequence

from lorikeet.study.findings import Finding


def by_topic(found: Sequence[Finding], *, measured: bool) -> dict[str, list[str]]:
    """Topic to the texts under it, in their order.

    Args:
        found: from `findings(study)`.
        measured: whether a clock or the peak of memory has a say in them.
    """
    topics: dict[str, list[str]] = {}
    for finding in found:
        if finding.measured == measured:
            topics.setdefault(finding.topic, []).append(finding.text)
    return topics

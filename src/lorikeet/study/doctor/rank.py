"""Symptoms in the ranks: more than the task uses, or fewer than it would."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

from lorikeet.adapters.anatomy import LOW_RANK, ModuleAnatomy
from lorikeet.study.doctor.facts import RunFacts
from lorikeet.study.doctor.finding import Finding, percent

WORTH = 8
"""The smallest rank of which a part left unused is worth a word."""

FULL = 0.9
"""An effective rank of this share of r is a flat spectrum: the weakest direction is about as strong
as the strongest, so the next one would probably be too. On rows of Dolly the share was 0.96, 0.94,
0.89, 0.83 and 0.70 at ranks 2, 4, 8, 16 and 32, and twice the rank gained 0.08, 0.08, 0.07, 0.05
and 0.01 nats per token; on Shakespeare it was 0.98, 0.94 and 0.85 at ranks 2, 4 and 16, which
gained 1.98, 2.12 and 2.39. The starter's sets, to which rank 2 is enough, give 0.84 there. That
the loss still falls is no further condition: a rank that is too small lets it settle, only
higher."""


def rank_symptoms(facts: RunFacts) -> Iterator[Finding]:
    """Both; nothing of an adapter that learnt nothing, whose spectrum is that of noise."""
    if facts.anatomy is None or facts.config.lora.init == "pissa":
        return  # PiSSA's update is a difference of two products, of twice the rank
    if facts.validation and facts.validation.difference.nll > -LEARNT:
        return
    modules = [m for m in facts.anatomy.modules if m.norm]
    yield from unused(modules)
    yield from exhausted(modules)


LEARNT = 0.1
"""Nats per token below which nothing is said of the rank: an update that hardly does anything has
the flat spectrum of noise."""


def unused(modules: list[ModuleAnatomy]) -> Iterator[Finding]:
    """Effective ranks far below r in half of the modules."""
    large = [m for m in modules if m.r >= WORTH]
    if not large or _share(large) >= LOW_RANK:
        return
    effective, r = median(m.effective_rank for m in large), median(m.r for m in large)
    yield Finding(
        "rank-unused",
        "hint",
        f"the updates use {effective:.1f} of rank {r:g} (median of {len(large)} modules)",
        _evidence(large),
        f"a rank of {max(2, round(effective)):g} to {max(2, round(2 * effective)):g} would do as"
        " well, with fewer parameters",
    )


def exhausted(modules: list[ModuleAnatomy]) -> Iterator[Finding]:
    """Flat spectra at full rank in half of the modules."""
    several = [m for m in modules if m.r > 1]  # of rank 1 the share is always 1
    if not several or _share(several) < FULL:
        return
    r = median(m.r for m in several)
    yield Finding(
        "rank-exhausted",
        "hint",
        f"the updates use {percent(_share(several))} of rank {r:g}, all directions alike (median of"
        f" {len(several)} modules)",
        _evidence(several),
        f"try --lora.r {2 * r:g}: where no direction is weaker than the others, more of them help",
    )


def _share(modules: list[ModuleAnatomy]) -> float:
    return median(m.effective_rank / m.r for m in modules)


def _evidence(modules: list[ModuleAnatomy]) -> dict[str, float]:
    return {
        "modules": len(modules),
        "r": median(m.r for m in modules),
        "effective_rank": median(m.effective_rank for m in modules),
        "share": _share(modules),
        "share_smallest": min(m.effective_rank / m.r for m in modules),
        "share_largest": max(m.effective_rank / m.r for m in modules),
    }

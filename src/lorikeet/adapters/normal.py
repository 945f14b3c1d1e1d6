"""The plain form of an adapter: one rank, scale 1, no patterns, no magnitudes.

Every runtime scales it alike. Of some the scale is one alpha over each module's rank (llama.cpp),
others know neither patterns nor rank-stabilised scaling nor DoRA.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from torch import Tensor
from torch.nn.functional import pad

from lorikeet.adapters.adapter import Adapter, Update
from lorikeet.adapters.algebra import Combined, Limit, dense_spectrum, nearest
from lorikeet.adapters.fit import listing
from lorikeet.errors import AdapterError

Weights = Callable[[str], Tensor]
"""The base's weight of a module, as it is stored, by the module's name."""


def normalize(
    adapter: Adapter,
    weights: Weights | None = None,
    *,
    rank: int | None = None,
    error: float | None = None,
) -> Combined:
    """The same adapter as plain LoRA of one rank for all modules, with scale 1 (alpha = r).

    B takes up the scale; smaller ranks are filled with zeros. That changes no update by more than
    float32 rounding. What DoRA does to a weight W, applied(W) - W, has no low rank: of those
    modules the nearest update is taken, by default of twice the adapter's largest rank.

    Args:
        adapter: any.
        weights: the base's weights, which DoRA needs.
        rank: the largest rank of any module.
        error: instead of a rank, the largest relative error of a module (Frobenius norm).

    Raises:
        AdapterError: impossible limits, or weights that are missing or do not fit; lists every
            finding.
    """
    limit = Limit(rank, error)
    problems = [*limit.problems(), *_unmade(adapter, weights)]
    if problems:
        raise AdapterError("the adapter cannot be made plain LoRA:", problems)
    most = max(update.r for update in adapter.updates.values())
    if limit == Limit():
        limit = Limit(2 * most)  # which cuts nothing of plain LoRA
    updates: dict[str, Update] = {}
    errors: dict[str, float] = {}
    for module, update in adapter.updates.items():
        if update.magnitude is None or weights is None:
            updates[module], errors[module] = nearest(_unscaled(update), limit)
            continue
        try:
            change = _change(update, weights(module))
        except AdapterError as wrong:
            problems.append(f"{module}: {wrong}")
            continue
        updates[module], errors[module] = limit.cut(dense_spectrum(change), update.kind)
    if problems:
        raise AdapterError("the base's weights do not fit the adapter:", problems)
    r = max(update.r for update in updates.values())
    plain = {module: _padded(update, r) for module, update in updates.items()}
    return Combined(replace(adapter, updates=plain, provenance=_provenance(adapter, r)), errors)


def _unmade(adapter: Adapter, weights: Weights | None) -> Iterator[str]:
    """Why there is no plain form."""
    if not adapter.updates:
        yield "it updates no module"
    dora = [module for module, update in adapter.updates.items() if update.magnitude is not None]
    if dora and weights is None:
        yield (
            f"it is a DoRA ({len(dora)} modules have magnitudes), whose update depends on the"
            " base's weights; give them too: the folder of the model that it was trained on"
            " (--model)"
        )
    bad = [
        module
        for module, update in adapter.updates.items()
        if not all(bool(t.isfinite().all()) for t in _tensors(update))
    ]
    if bad:
        yield listing("not finite", bad)


def _tensors(update: Update) -> list[Tensor]:
    return [t for t in (update.A, update.B, update.magnitude) if t is not None]


def _unscaled(update: Update) -> Update:
    """The same update of scale 1, with a float64 B."""
    return replace(update, B=update.B.double() * update.scale, scale=1.0)


def _change(update: Update, weight: Tensor) -> Tensor:
    """What the update does to a weight, float64 [out, in].

    Raises:
        AdapterError: the weight does not fit, or a row of the sum is zero and has no direction.
    """
    assert update.magnitude is not None
    precise = replace(
        update,
        A=update.A.double(),
        B=update.B.double(),
        magnitude=update.magnitude.double(),
    )
    change = precise.applied(weight) - weight.double()
    if not change.isfinite().all():
        raise AdapterError("the adapted weight is not finite: a row of it is zero, or was damaged")
    return change if update.kind == "linear" else change.t()


def _padded(update: Update, r: int) -> Update:
    """The same update with factors of rank r, filled with zeros."""
    more = r - update.r
    return replace(update, A=pad(update.A, (0, 0, 0, more)), B=pad(update.B, (0, more)))


def _provenance(adapter: Adapter, r: int) -> Mapping[str, object]:
    dora = any(update.magnitude is not None for update in adapter.updates.values())
    ranks = sorted({update.r for update in adapter.updates.values()})
    return {**adapter.provenance, "normalized": {"rank": r, "ranks_before": ranks, "dora": dora}}

"""Sums, differences and multiples of adapters, as updates of weights.

What is added is scale · B A, never A and B by themselves, whose sums mean nothing. Products are
formed in float64 and rounded to float32 once, at the end.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lorikeet.adapters.adapter import Adapter, Kind, Update
from lorikeet.adapters.fit import listing
from lorikeet.adapters.sparse import dropped, ties
from lorikeet.adapters.spectrum import Spectrum, spectrum
from lorikeet.errors import AdapterError

Method = Literal["exact", "ties", "dare"]

DENSITIES: Mapping[str, float] = {"ties": 0.2, "dare": 0.5}
"""What stays if nothing is said: of TIES the paper's 20 %, of DARE half."""

_ROUNDING = 1e-12  # where rank-one terms cancel, float64 leaves less than this part of them
_CANCELLED = 1e-6  # the same of factors that were rounded to float32
_COMMON = ("tokenizer_hash", "template", "template_hash", "max_length")


class Combined(NamedTuple):
    """An adapter that was computed from others.

    Attributes:
        adapter: the result; its factors are float32 and contiguous.
        errors: ‖found - wanted‖ / ‖wanted‖ by module, in the Frobenius norm and before rounding to
            float32; 0.0 where nothing was cut off.
        warning: what was allowed but is probably wrong; empty if nothing is.
    """

    adapter: Adapter
    errors: dict[str, float]
    warning: str = ""


class Limit(NamedTuple):
    """How much of an update stays: a rank, or what an error asks for; neither keeps all."""

    rank: int | None = None
    error: float | None = None

    def problems(self) -> Iterator[str]:
        """Why no update can be cut like this."""
        if self.rank is not None and self.error is not None:
            yield "rank and error are both given; one follows from the other, so give one"
        if self.rank is not None and self.rank < 1:
            yield f"rank is {self.rank}; it must be at least 1"
        if self.error is not None and not 0 <= self.error < 1:
            yield f"error is {self.error}; it must be at least 0 and below 1"

    def cut(self, found: Spectrum, kind: Kind) -> tuple[Update, float]:
        """The nearest update of the rank that is allowed, and its relative error.

        No matrix of that rank is nearer (Eckart and Young 1936). Of an error the smallest rank is
        taken that holds it. The root of the singular values goes to either factor.
        """
        U, S, V = found
        # left[k] is the norm of what is lost when k directions stay
        left = torch.cat([S.square().flip(0).cumsum(0).flip(0).sqrt(), S.new_zeros(1)])
        if self.error is not None:
            k = max(1, int((left > self.error * left[0]).sum()))
        else:
            k = len(S) if self.rank is None else min(self.rank, len(S))
        lost = float(left[k] / left[0]) if left[0] > 0 else 0.0
        root = S[:k].sqrt()
        return Update(_rounded(root[:, None] * V[:k]), _rounded(U[:, :k] * root), 1.0, kind), lost


def combine(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    *,
    method: Method = "exact",
    rank: int | None = None,
    error: float | None = None,
    density: float | None = None,
    seed: int = 0,
    allow_mismatch: bool = False,
) -> Combined:
    """The weighted sum of adapters' updates; a module that an adapter lacks counts as zero there.

    `exact` stacks the factors: ranks add up, every scale is 1. One adapter of weight 1 comes back
    as it is, and one of weight 0 takes no part. `ties` and `dare` (see `sparse.py`) change single
    numbers, which no low rank holds exactly: their result is the nearest one of the sum of the
    ranks, if neither `rank` nor `error` says otherwise.

    One of the adapters may bring new tokens; their rows are kept as they are, whatever its weight,
    for there is nothing to add them to.

    Args:
        adapters: plain ones, for the same base.
        weights: one for each adapter; any sign.
        method: how updates are merged.
        rank: the largest rank of a module.
        error: instead of a rank, the largest relative error of a module (Frobenius norm).
        density: the part of each update that TIES or DARE keeps, above 0 and at most 1; by
            default that of `DENSITIES`.
        seed: of what DARE drops.
        allow_mismatch: return a warning rather than raise if the adapters' bases differ.

    Raises:
        AdapterError: the adapters, the weights or the limits do not go together; lists every
            finding.
    """
    limit = Limit(rank, error)
    problems = [*_misgiven(adapters, weights), *limit.problems(), *_misused(method, density)]
    problems += [*_misfits(adapters), *_with_new_tokens(adapters, weights)]
    warnings = list(_mismatches(adapters))
    if not allow_mismatch:
        advice = " (--allow-mismatch makes this a warning)"
        problems += [mismatch + advice for mismatch in warnings]
    if problems:
        raise AdapterError("the adapters cannot be combined:", problems)
    kept = [(i, w, a) for i, (w, a) in enumerate(zip(weights, adapters, strict=True)) if w != 0]
    updates: dict[str, Update] = {}
    errors: dict[str, float] = {}
    for module in dict.fromkeys(name for _, _, adapter in kept for name in adapter.updates):
        terms = [(i, w, a.updates[module]) for i, w, a in kept if module in a.updates]
        if method == "exact":
            alone = len(kept) == 1 and kept[0][1] == 1
            total = terms[0][2] if alone else _stacked([(w, update) for _, w, update in terms])
            updates[module], errors[module] = nearest(total, limit)
        else:
            share = DENSITIES[method] if density is None else density
            dense = _sparse(terms, method, share, f"{seed}:{module}")
            own = Limit(sum(update.r for _, _, update in terms)) if limit == Limit() else limit
            updates[module], errors[module] = own.cut(dense_spectrum(dense), terms[0][2].kind)
    made: dict[str, Any] = {"method": method, "rank": rank, "error": error}
    if method != "exact":
        made["density"] = DENSITIES[method] if density is None else density
    if method == "dare":
        made["seed"] = seed
    adapter = Adapter(
        updates,
        base_model=adapters[0].base_model,
        provenance=_provenance(adapters, weights, made),
        dropout=adapters[0].dropout if len({a.dropout for a in adapters}) == 1 else 0.0,
        copies={name: t for a in reversed(adapters) for name, t in a.copies.items()},
        tokens=next((a.tokens for _, _, a in kept if a.vocabulary), ()),
        vocabulary=next((a.vocabulary for _, _, a in kept if a.vocabulary), None),
    )
    if not adapter.tokens and all(map(_vanishes, updates.values())):
        warnings.append("nothing is left of the updates: the sum is zero in every module")
    return Combined(adapter, errors, "; ".join(warnings))


def scale(adapter: Adapter, factor: float) -> Adapter:
    """The adapter whose updates are `factor` times as large; 0 is an error, as in `combine`."""
    return combine([adapter], [factor]).adapter


def subtract(adapter: Adapter, other: Adapter) -> Adapter:
    """The adapter whose updates are those of the first without those of the other."""
    return combine([adapter, other], [1.0, -1.0]).adapter


def nearest(update: Update, limit: Limit) -> tuple[Update, float]:
    """The update, cut where the limit asks for it, in float32, and its relative error.

    Directions in which its terms cancel but for rounding count as zero.

    Args:
        update: without a magnitude; its factors may be float64.
        limit: what stays of it.
    """
    if limit.error is None and (limit.rank is None or update.r <= limit.rank):
        A, B = _rounded(update.A), _rounded(update.B)
        return Update(A, B, update.scale, update.kind), 0.0
    U, S, V = spectrum(update)
    terms = (update.A.double().norm(dim=1) * update.B.double().norm(dim=0)).sum()
    floor = _ROUNDING * abs(update.scale) * terms
    return limit.cut(Spectrum(U, S.where(floor < S, 0.0), V), update.kind)


def dense_spectrum(matrix: Tensor) -> Spectrum:
    """The singular value decomposition of any matrix [out, in], by way of its smaller Gram matrix.

    For wide matrices U's columns are orthonormal whatever rounding did, and the rows of S V are
    the matrix in these coordinates: what is cut off is exactly the rest. For tall ones the same
    holds of the other side. Only where S is below 1e-8 of the largest do the vectors lose the
    order of their importance, and V's rows their right angles.
    """
    if matrix.shape[0] > matrix.shape[1]:
        U, S, V = dense_spectrum(matrix.t())
        return Spectrum(V.t(), S, U.t())
    X = matrix.double()
    U = torch.linalg.eigh(X @ X.t()).eigenvectors
    rows = U.t() @ X
    S, order = rows.norm(dim=1).sort(descending=True)
    V = rows[order] / S.clamp(min=torch.finfo(S.dtype).tiny)[:, None]
    return Spectrum(U[:, order], S, V)


def _vanishes(update: Update) -> bool:
    """Whether an update is zero but for float32's rounding; ‖B A‖² is a sum over r x r numbers."""
    A, B = update.A.double(), update.B.double()
    square = ((A @ A.t()) * (B.t() @ B)).sum().clamp_min(0)
    terms = (A.norm(dim=1) * B.norm(dim=0)).sum()
    return bool(square.sqrt() <= _CANCELLED * terms)


def _rounded(tensor: Tensor) -> Tensor:
    return tensor.float().contiguous()


def _stacked(terms: Sequence[tuple[float, Update]]) -> Update:
    """The weighted sum as one update of float64 factors: A's below, B's beside one another."""
    A = torch.cat([update.A.double() for _, update in terms])
    B = torch.cat([update.B.double() * (weight * update.scale) for weight, update in terms], dim=1)
    return Update(A, B, 1.0, terms[0][1].kind)


def _sparse(
    terms: Sequence[tuple[int, float, Update]], method: Method, density: float, name: str
) -> Tensor:
    """The merged update of a module, float32 [out, in]."""
    deltas = ((index, weight * update.delta()) for index, weight, update in terms)
    if method == "ties":
        return ties((delta for _, delta in deltas), density)
    return reduce(
        torch.add, (dropped(delta, density, name=f"{name}:{index}") for index, delta in deltas)
    )


def _misgiven(adapters: Sequence[Adapter], weights: Sequence[float]) -> Iterator[str]:
    """What is wrong with the number of adapters or with the weights."""
    if not adapters:
        yield "there is no adapter"
    if len(weights) != len(adapters):
        yield f"there are {len(weights)} weights for {len(adapters)} adapters; give each its own"
    bad = [str(weight) for weight in weights if not math.isfinite(weight)]
    if bad:
        yield f"weights must be finite numbers, found {', '.join(bad)}"
    if weights and not any(weights):
        yield "every weight is 0, which leaves nothing"


def _misused(method: str, density: float | None) -> Iterator[str]:
    if method != "exact" and method not in DENSITIES:
        yield f"there is no method {method!r}; choose exact, ties or dare"
    elif method == "exact" and density is not None:
        yield "density is for TIES and DARE; an exact sum keeps everything"
    elif density is not None and not 0 < density <= 1:
        yield f"density is {density}; it must be above 0 and at most 1"


def _misfits(adapters: Sequence[Adapter]) -> Iterator[str]:
    """Updates that cannot be added."""
    seen: dict[str, str] = {}
    for number, adapter in enumerate(adapters, start=1):
        dora = [m for m, update in adapter.updates.items() if update.magnitude is not None]
        if dora:
            yield (
                f"adapter {number} is a DoRA ({len(dora)} modules have magnitudes): an update that"
                " depends on the base's weights is no sum; make it a plain one first with"
                " `lorikeet adapter normalize --model ...`"
            )
        if adapter.whole:
            yield listing(
                f"adapter {number} holds parameters trained whole, which are no updates to add",
                list(adapter.whole),
            )
        new = adapter.vocabulary.new_rows if adapter.vocabulary else []
        old = dict.fromkeys(n for own in adapter.tokens for n in own.ids if n not in new)
        if old:
            yield listing(
                f"adapter {number} holds rows of trained tokens, which are no updates to add",
                [str(token) for token in old],
            )
        bad = [m for m, update in adapter.updates.items() if not _finite(update)]
        if bad:
            yield listing(f"not finite in adapter {number}", bad)
        differ = []
        for module, update in adapter.updates.items():
            own = f"{update.kind} {list(update.shape)}"
            first = seen.setdefault(module, own)
            if own != first:
                differ.append(f"{module} is {own}, before it was {first}")
        if differ:
            yield listing(f"modules of adapter {number} that do not fit", differ)


def _with_new_tokens(adapters: Sequence[Adapter], weights: Sequence[float]) -> Iterator[str]:
    """New tokens of which there would be none or too many rows."""
    bringing = [
        f"{adapter.vocabulary} (adapter {number}, weight {weight:g})"
        for number, (adapter, weight) in enumerate(zip(adapters, weights, strict=False), start=1)
        if adapter.vocabulary and weight
    ]
    if len(bringing) > 1:
        yield f"rows of new tokens cannot be added, and several bring some: {'; '.join(bringing)}"
    elif any(a.vocabulary and w < 0 for a, w in zip(adapters, weights, strict=False)):
        yield f"rows of new tokens cannot be taken away: {bringing[0]}"


def _finite(update: Update) -> bool:
    return math.isfinite(update.scale) and all(
        bool(t.isfinite().all()) for t in (update.A, update.B)
    )


def _mismatches(adapters: Sequence[Adapter]) -> Iterator[str]:
    """Signs that the adapters are for different bases."""
    prints = {n: a.provenance.get("base_fingerprint") for n, a in enumerate(adapters, start=1)}
    said = {number: str(found) for number, found in prints.items() if found}
    if len(set(said.values())) > 1:
        shown = ", ".join(f"{found[:12]} (adapter {number})" for number, found in said.items())
        yield f"the adapters were trained on other weights: base fingerprints {shown}"
    copies: dict[str, Tensor] = {}
    differ: dict[str, None] = {}
    for adapter in adapters:
        for name, tensor in adapter.copies.items():
            if not _same(copies.setdefault(name, tensor), tensor):
                differ[name] = None
    if differ:
        yield listing("base weights saved beside the adapters that differ", list(differ))


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two copies of a base weight agree, in the coarser of their dtypes."""
    if one.shape != other.shape:
        return False
    return torch.equal(one.to(other.dtype), other) or torch.equal(other.to(one.dtype), one)


def _provenance(
    adapters: Sequence[Adapter], weights: Sequence[float], made: dict[str, Any]
) -> dict[str, Any]:
    """How the sum was made, and what its parts agree on."""
    found: dict[str, Any] = {}
    said = {str(a.provenance["base_fingerprint"]) for a in adapters if _fingerprinted(a)}
    if len(said) == 1:
        found["base_fingerprint"] = said.pop()
    for key in _COMMON:
        values = [adapter.provenance.get(key) for adapter in adapters]
        if values[0] is not None and all(value == values[0] for value in values):
            found[key] = values[0]
    sources = []
    for weight, adapter in zip(weights, adapters, strict=True):
        source: dict[str, Any] = {"weight": float(weight), "base_model": adapter.base_model}
        if "data_sha256" in adapter.provenance:
            source["data_sha256"] = adapter.provenance["data_sha256"]
        if "combined" in adapter.provenance:
            source["combined"] = adapter.provenance["combined"]
        sources.append(source)
    how = {key: value for key, value in made.items() if value is not None}
    found["combined"] = {**how, "sources": sources}
    return found


def _fingerprinted(adapter: Adapter) -> bool:
    return bool(adapter.provenance.get("base_fingerprint"))

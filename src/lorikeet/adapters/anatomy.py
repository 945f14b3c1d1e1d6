"""What an adapter does to every module: how far it moves the weight, in how many directions."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from torch import Tensor
from torch.linalg import vector_norm

from lorikeet.adapters.adapter import Adapter, Kind, Update
from lorikeet.adapters.fit import listing
from lorikeet.adapters.spectrum import spectrum
from lorikeet.errors import AdapterError
from lorikeet.lora.targets import block_number, leaf_name

LOW_RANK = 0.25
"""An effective rank below this share of r is a finding."""

_SHOWN = 8  # base weights that do not fit; the rest is counted


@dataclass(frozen=True, slots=True)
class ModuleAnatomy:
    """The update of one module, scale · B A; under DoRA that of the direction.

    Attributes:
        name: the module's full name.
        kind: what is adapted.
        r: rank of the factors.
        scale: what B A is multiplied by.
        shape: of the weight as it is stored.
        parameters: numbers in A, B and the magnitude.
        norm: Frobenius norm of the update.
        spectral_norm: its largest singular value.
        effective_rank: exp of the entropy of the singular values' shares of their sum (Roy and
            Vetterli 2007, "The effective rank", definition 1), from 1 to r; 0 for no update.
        first_half: share of the squared norm in the larger half of the singular values, the
            middle one included; None for no update.
        a_norm: Frobenius norm of A.
        b_norm: Frobenius norm of B.
        weight_norm: Frobenius norm of the base weight, if it was given.
        magnitude: smallest and largest of DoRA's magnitudes, if there are any.
    """

    name: str
    kind: Kind
    r: int
    scale: float
    shape: tuple[int, int]
    parameters: int
    norm: float
    spectral_norm: float
    effective_rank: float
    first_half: float | None
    a_norm: float
    b_norm: float
    weight_norm: float | None = None
    magnitude: tuple[float, float] | None = None

    @property
    def layer(self) -> int | None:
        """The number of its block; None outside of the blocks."""
        return block_number(self.name)

    def summary(self) -> dict[str, Any]:
        """The figures as a JSON-ready dict."""
        of_one = combine([self])
        return {**asdict(self), "relative": of_one.relative, "rms": of_one.rms}


@dataclass(frozen=True, slots=True)
class Group:
    """Several modules taken together, as if their updates were one.

    Attributes:
        modules: how many.
        parameters: numbers in their factors and magnitudes.
        entries: numbers in the weights that they adapt.
        norm: Frobenius norm of all updates.
        weight_norm: Frobenius norm of all base weights; None if one is not known.
        effective_rank: mean over the modules.
    """

    modules: int
    parameters: int
    entries: int
    norm: float
    weight_norm: float | None
    effective_rank: float

    @property
    def relative(self) -> float | None:
        """Norm of the updates over that of the weights; None if that is unknown or zero."""
        return self.norm / self.weight_norm if self.weight_norm else None

    @property
    def rms(self) -> float:
        """Root mean square of the updates' entries: norm / sqrt(out · in)."""
        return self.norm / math.sqrt(self.entries)

    def summary(self) -> dict[str, Any]:
        """The figures as a JSON-ready dict."""
        return {**asdict(self), "relative": self.relative, "rms": self.rms}


def combine(modules: Iterable[ModuleAnatomy]) -> Group:
    """Take one module or more together."""
    parts = list(modules)
    weights = [m.weight_norm for m in parts if m.weight_norm is not None]
    return Group(
        modules=len(parts),
        parameters=sum(m.parameters for m in parts),
        entries=sum(m.shape[0] * m.shape[1] for m in parts),
        norm=math.hypot(*(m.norm for m in parts)),
        weight_norm=math.hypot(*weights) if len(weights) == len(parts) else None,
        effective_rank=sum(m.effective_rank for m in parts) / len(parts),
    )


@dataclass(frozen=True)
class Anatomy:
    """All modules of an adapter.

    Attributes:
        modules: in the order of blocks, those outside of them last.
        copies: base weights that the file repeats beside adapted embeddings.
        whole: parameters of the base that were trained whole, by name.
        tokens: single tokens whose rows were trained, new ones among them.
        new_tokens: what the vocabulary has gained, in words; empty if nothing.
    """

    modules: tuple[ModuleAnatomy, ...]
    copies: int = 0
    whole: tuple[str, ...] = ()
    tokens: int = 0
    new_tokens: str = ""

    @property
    def total(self) -> Group:
        """Everything together."""
        return combine(self.modules)

    @property
    def bytes(self) -> int:
        """Size of the factors and magnitudes as float32."""
        return 4 * self.total.parameters

    @property
    def ranks(self) -> dict[int, int]:
        """How many modules have each rank, smallest rank first."""
        return dict(sorted(Counter(m.r for m in self.modules).items()))

    @property
    def scales(self) -> dict[float, int]:
        """How many modules have each scale, smallest scale first."""
        return dict(sorted(Counter(m.scale for m in self.modules).items()))

    @property
    def weighed(self) -> bool:
        """Whether every base weight is known and not zero, so that norms can be relative."""
        return all(m.weight_norm for m in self.modules)

    def moved(self, part: Group | ModuleAnatomy) -> float:
        """How far weights were moved: relative to their norm if all are known, else the rms."""
        group = combine([part]) if isinstance(part, ModuleAnatomy) else part
        return group.relative or 0.0 if self.weighed else group.rms

    def most_moved(self) -> list[ModuleAnatomy]:
        """All modules, the one that moved furthest first."""
        return sorted(self.modules, key=self.moved, reverse=True)

    @cached_property
    def kinds(self) -> dict[str, str]:
        """The kind of every module by its name: `q_proj`, or `mlp.c_proj` where two would meet."""
        inner = {m.name: _inside_block(m.name) for m in self.modules}
        paths: dict[str, set[str]] = {}
        for path in inner.values():
            paths.setdefault(leaf_name(path), set()).add(path)
        short = {leaf for leaf, found in paths.items() if len(found) == 1 and leaf != "*"}
        return {n: leaf_name(p) if leaf_name(p) in short else p for n, p in inner.items()}

    @property
    def layers(self) -> list[int | None]:
        """The numbers of the adapted blocks, then None if modules lie outside of them."""
        return list(dict.fromkeys(m.layer for m in self.modules))

    def by_layer(self) -> dict[int | None, Group]:
        """The modules of each block together."""
        return {n: combine(m for m in self.modules if m.layer == n) for n in self.layers}

    def by_kind(self) -> dict[str, Group]:
        """The modules of each kind together, over all blocks."""
        return {
            kind: combine(m for m in self.modules if self.kinds[m.name] == kind)
            for kind in dict.fromkeys(self.kinds[m.name] for m in self.modules)
        }

    def cells(self) -> dict[tuple[int | None, str], Group]:
        """The modules of each kind in each block, which are several in a mixture of experts."""
        found: dict[tuple[int | None, str], list[ModuleAnatomy]] = {}
        for module in self.modules:
            found.setdefault((module.layer, self.kinds[module.name]), []).append(module)
        return {place: combine(modules) for place, modules in found.items()}

    @property
    def findings(self) -> list[str]:
        """What a user of the adapter should know, each from a figure; empty if there is nothing."""
        return list(_findings(self))

    def summary(self) -> dict[str, Any]:
        """The figures as a JSON-ready dict; the modules that moved most come first."""
        return {
            "parameters": self.total.parameters,
            "bytes": self.bytes,
            "modules": [module.summary() for module in self.most_moved()],
            "ranks": {str(r): count for r, count in self.ranks.items()},
            "scales": {f"{scale:g}": count for scale, count in self.scales.items()},
            "moved_by": "relative" if self.weighed else "rms",
            "total": self.total.summary(),
            "by_kind": {kind: group.summary() for kind, group in self.by_kind().items()},
            "by_layer": {
                "other" if layer is None else str(layer): group.summary()
                for layer, group in self.by_layer().items()
            },
            "findings": self.findings,
        }


def examine(adapter: Adapter, weights: Callable[[str], Tensor] | None = None) -> Anatomy:
    """Measure every update of an adapter; no update is formed.

    Args:
        adapter: from `read_adapter`.
        weights: gives the base weight of a module, as it is stored, by the module's full name.

    Raises:
        AdapterError: the adapter updates nothing, or base weights are missing or of other shapes.
    """
    if not adapter.updates:
        raise AdapterError("the adapter updates no module; there is nothing to examine")
    modules: list[ModuleAnatomy] = []
    misfits: list[str] = []
    for name, update in adapter.updates.items():
        try:
            weight = _fitting(weights(name), name, update) if weights else None
        except AdapterError as error:
            misfits.append(str(error))
        else:
            modules.append(_examined(name, update, weight))
    if misfits:
        more = [f"and {len(misfits) - _SHOWN} more"] if len(misfits) > _SHOWN else []
        heading = "the adapter does not fit these base weights:"
        raise AdapterError(heading, misfits[:_SHOWN] + more)
    modules.sort(key=lambda m: (m.layer is None, m.layer or 0, m.name))
    return Anatomy(
        tuple(modules),
        copies=len(adapter.copies),
        whole=tuple(adapter.whole),
        tokens=len({token for own in adapter.tokens for token in own.ids}),
        new_tokens=str(adapter.vocabulary or ""),
    )


def _fitting(weight: Tensor, name: str, update: Update) -> Tensor:
    if tuple(weight.shape) != update.shape:
        found = f"the weight is {list(weight.shape)}"
        raise AdapterError(f"{name}: {found}, but the adapter fits {list(update.shape)}")
    return weight


def _examined(name: str, update: Update, weight: Tensor | None) -> ModuleAnatomy:
    values = spectrum(update).S.tolist()
    energy = sum(value**2 for value in values)
    larger = sum(value**2 for value in values[: (len(values) + 1) // 2])
    m = update.magnitude
    parts = [update.A, update.B, *([] if m is None else [m])]
    return ModuleAnatomy(
        name=name,
        kind=update.kind,
        r=update.r,
        scale=update.scale,
        shape=update.shape,
        parameters=sum(part.numel() for part in parts),
        norm=math.sqrt(energy),
        spectral_norm=values[0],
        effective_rank=effective_rank(values),
        first_half=larger / energy if energy else None,
        a_norm=_norm(update.A),
        b_norm=_norm(update.B),
        weight_norm=None if weight is None else _norm(weight),
        magnitude=None if m is None else (m.min().item(), m.max().item()),
    )


def effective_rank(values: Sequence[float]) -> float:
    """exp of the entropy of singular values' shares of their sum; 0 if all are zero."""
    total = sum(values)
    shares = [value / total for value in values if value > 0] if total else []
    return math.exp(-sum(p * math.log(p) for p in shares)) if shares else 0.0


def _norm(tensor: Tensor) -> float:
    """Frobenius norm, summed in float32 or better; the tensor is not copied to a wider type."""
    return vector_norm(tensor.detach().float()).item()


def _inside_block(name: str) -> str:
    """The module's path below the number of its block, further numbers as `*`; else its leaf."""
    number = block_number(name)
    if number is None:
        parts = name.split(".")
        return ".".join(parts[-2:] if parts[-1].isdigit() else parts[-1:])
    _, _, inner = name.partition(f".{number}.")
    return ".".join("*" if part.isdigit() else part for part in inner.split("."))


def _findings(anatomy: Anatomy) -> Iterator[str]:
    idle = {m.name: m for m in anatomy.modules if m.norm == 0}
    untrained = [name for name, m in idle.items() if m.b_norm == 0]
    if untrained:
        yield listing("B is all zero, so the adapter does nothing there: untrained", untrained)
    empty = [name for name in idle if name not in untrained]
    if empty:
        yield listing("B A is zero, so the adapter does nothing there", empty)
    low = [m for m in anatomy.modules if m.norm and m.effective_rank < LOW_RANK * m.r]
    if low:
        low.sort(key=lambda m: m.effective_rank / m.r)
        shown = [f"{m.name} ({m.effective_rank:.1f} of {m.r})" for m in low]
        share = f"effective rank below {LOW_RANK:.0%} of r, so a smaller r may do as well"
        yield listing(share, shown)
    for what, counts in (("ranks", anatomy.ranks), ("scales", anatomy.scales)):
        if len(counts) > 1:
            yield f"{what} differ ({_counted(counts)}): {_PATTERNS}"
    dora = [m.name for m in anatomy.modules if m.magnitude]
    if dora:
        yield (
            f"DoRA in {len(dora)} modules: norms are those of the direction's update scale · B A,"
            " before every row is brought to the length of its magnitude"
        )
    if anatomy.whole:
        yield listing("trained whole, in no figure above", list(anatomy.whole))
    if anatomy.tokens:
        yield f"the rows of {anatomy.tokens} tokens were trained, which are in no figure above"
    if anatomy.new_tokens:
        yield f"new tokens, which the base learns when the adapter is loaded: {anatomy.new_tokens}"
    if anatomy.copies:
        yield f"the file repeats {anatomy.copies} weights of the base, as PEFT does of embeddings"


_PATTERNS = (
    "some runtimes ignore rank_pattern and alpha_pattern; `lorikeet adapter normalize` writes an"
    " adapter that all of them scale alike"
)


def _counted(counts: Mapping[Any, int]) -> str:
    return ", ".join(f"{value:g} in {count} modules" for value, count in counts.items())

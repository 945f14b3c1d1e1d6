"""An adapter by itself as GGUF, for llama.cpp's `--lora`.

For a weight `blk.0.attn_q.weight` such a file holds `blk.0.attn_q.weight.lora_a` [r, in] and
`.lora_b` [out, r]. llama.cpp adds alpha / r · B A, with one alpha for the whole file and the rank r
of each pair; an alpha of 0 counts as no scale at all. So one alpha is chosen that suits most
modules, and B takes up what is left of the others' scales. Of the embedding A lies transposed,
[rows, r] (llama.cpp, llama-adapter.cpp and llama-graph.cpp, "build_inp_embd").
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from gguf import GGUFType, Keys
from torch import Tensor

from lorikeet.adapters import Adapter, Update
from lorikeet.adapters.fit import listing
from lorikeet.adapters.fold import Fold
from lorikeet.errors import AdapterError, ModelError
from lorikeet.export.layout import Layout, Placed, lay_out
from lorikeet.gguf.blocks import encode
from lorikeet.gguf.metadata import Field
from lorikeet.gguf.mixture import file_type
from lorikeet.gguf.write import Stored, write_gguf

Kind = Literal["f32", "f16"]

_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"
_ROUNDING = 1e-6  # scales that differ by less are the same: they went through float32


@dataclass(frozen=True, slots=True)
class ExportedAdapter:
    """What an export has written.

    Attributes:
        out: the file.
        kind: the type of its factors.
        architecture: llama.cpp's name of the base's.
        alpha: the file's.
        modules: how many weights it adapts.
        ranks: how many of them have each rank.
        rescaled: how many have a scale of their own in B.
        size: bytes of the file.
        seconds: how long it took.
    """

    out: Path
    kind: Kind
    architecture: str
    alpha: float
    modules: int
    ranks: Mapping[int, int]
    rescaled: int
    size: int
    seconds: float

    def summary(self) -> dict[str, Any]:
        """The figures as a JSON-ready dict."""
        return {
            "out": str(self.out),
            "type": self.kind,
            "architecture": self.architecture,
            "alpha": self.alpha,
            "modules": self.modules,
            "ranks": {str(r): count for r, count in self.ranks.items()},
            "rescaled": self.rescaled,
            "bytes": self.size,
            "seconds": self.seconds,
        }


@torch.no_grad()
def export_adapter(
    model: Path, adapter: Adapter, out: Path, *, kind: Kind = "f32"
) -> ExportedAdapter:
    """Write an adapter as a GGUF LoRA.

    Args:
        model: the folder of its base; only the headers of the weights are read.
        adapter: the adapter.
        out: the file; one that is there is replaced when the new one is complete.
        kind: the type of the factors.

    Raises:
        AdapterError: the adapter does not fit the base, or the format cannot carry it, with every
            finding and the way out.
        ModelError: llama.cpp has no place for the base.
        StorageError: the disk refused a write.
    """
    started = time.monotonic()
    if problems := list(_beyond_the_format(adapter)):
        raise _refusal(problems)
    base = Fold.of(model)
    layout = lay_out(base.config, base.shapes)
    placed = _place(Fold.of(model, adapter), layout)
    alpha = _common_alpha([update for _, update in placed])
    left = [_left(update, alpha) for _, update in placed]
    tensors: dict[str, Stored] = {}
    for (place, update), scale in zip(placed, left, strict=True):
        A, B = _factors(place, update, scale)
        tensors[f"{place.name}.lora_a"] = _stored(A, place.source, kind)
        tensors[f"{place.name}.lora_b"] = _stored(B, place.source, kind)
    write_gguf(out, _metadata(layout.architecture, alpha, kind), tensors)
    return ExportedAdapter(
        out=out,
        kind=kind,
        architecture=layout.architecture,
        alpha=alpha,
        modules=len(placed),
        ranks=dict(sorted(Counter(update.r for _, update in placed).items())),
        rescaled=sum(scale != 1 for scale in left),
        size=out.stat().st_size,
        seconds=time.monotonic() - started,
    )


def _refusal(problems: list[str]) -> AdapterError:
    return AdapterError(
        "llama.cpp's adapter format cannot carry this adapter; export the merged model instead (the"
        " same command without --adapter-only):",
        problems,
    )


def _beyond_the_format(adapter: Adapter) -> Iterator[str]:
    """What the format has no place for, whatever the base."""
    dora = [module for module, update in adapter.updates.items() if update.magnitude is not None]
    if dora:
        yield (
            f"DoRA: {len(dora)} modules have magnitudes; the nearest plain LoRA, by singular"
            " values, can be exported: lorikeet adapter normalize DIR --model BASE --out OTHER"
        )
    biases = [name for name in adapter.whole if name.endswith(".bias")]
    if biases:
        yield listing("trained biases", biases)
    others = [name for name in adapter.whole if not name.endswith(".bias")]
    if others:
        yield listing("parameters that were trained whole", others)
    if adapter.vocabulary:
        yield f"new tokens: {adapter.vocabulary}"
    elif adapter.tokens:
        rows = [f"{tokens.module} ({len(tokens.ids)})" for tokens in adapter.tokens]
        yield listing("rows of single tokens", rows)
    bad = [
        module
        for module, update in adapter.updates.items()
        if not (update.A.isfinite().all() and update.B.isfinite().all())
    ]
    if bad:
        yield listing("factors that are not finite", bad)
    if not adapter.updates:
        yield "no updates at all"


def _place(fold: Fold, layout: Layout) -> list[tuple[Placed, Update]]:
    """Every update with the weight that it adapts, in the order of the file of the base.

    Raises:
        AdapterError: an update of a weight that embedding and head share: llama.cpp applies the
            pair of the embedding to the head too, where it does not fit, and aborts.
    """
    updates = {
        source: change
        for source, change in fold.plan.tensors.values()
        if isinstance(change, Update)
    }
    tied = all(placed.name != _HEAD for placed in layout.placed)
    found = [(place, updates[place.source]) for place in layout.placed if place.source in updates]
    if tied and any(place.name == _EMBEDDING for place, _ in found):
        raise _refusal(["embedding and head share one weight, of which only one is adapted"])
    return found


def _common_alpha(updates: list[Update]) -> float:
    """The alpha that gives most modules their scale, as float32 holds it; never 0."""
    alphas = Counter(
        float(torch.tensor(update.scale * update.r)) for update in updates if update.scale
    )
    return alphas.most_common(1)[0][0] if alphas else 1.0


def _left(update: Update, alpha: float) -> float:
    """What is left of an update's scale beside alpha / r; 1 but for rounding is 1."""
    scale = update.scale * update.r / alpha
    return 1.0 if abs(scale - 1) < _ROUNDING else scale


def _factors(place: Placed, update: Update, scale: float) -> tuple[Tensor, Tensor]:
    """A and B as the file holds them, B times `scale`."""
    B = update.B if scale == 1 else (update.B.double() * scale).float()
    if place.name == _EMBEDDING:
        return update.A.t(), B
    return update.A, B if place.order is None else B[place.order]


def _stored(tensor: Tensor, source: str, kind: Kind) -> Stored:
    try:
        stored = encode(kind.upper(), tensor)
    except ModelError as error:
        raise AdapterError(f"the update of {source} cannot be stored as {kind}: {error}") from None
    return Stored(kind.upper(), tuple(tensor.shape), partial(list, [stored]))


def _metadata(architecture: str, alpha: float, kind: Kind) -> dict[str, Field]:
    return {
        Keys.General.ARCHITECTURE: Field("str", architecture),
        Keys.General.TYPE: Field("str", GGUFType.ADAPTER),
        Keys.Adapter.TYPE: Field("str", "lora"),
        Keys.Adapter.LORA_ALPHA: Field("f32", alpha),
        Keys.General.FILE_TYPE: Field("u32", file_type(kind)),
    }

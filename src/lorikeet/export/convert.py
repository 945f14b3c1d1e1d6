"""A model folder, perhaps with an adapter folded in, as one GGUF file.

Tensor by tensor and block by block: read, sum in float32, encode, write. What is held is a few
blocks, or one tensor where llama.cpp wants its rows in another order.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFType, Keys
from torch import Tensor

from lorikeet.adapters import Adapter
from lorikeet.adapters.checkpoint import blocks_of
from lorikeet.adapters.fold import Fold
from lorikeet.adapters.plan_rows import FLOATING
from lorikeet.errors import AdapterError, ModelError
from lorikeet.export.chat import Chat, configured_ends, ending
from lorikeet.export.importance import Importance
from lorikeet.export.layout import Layout, Placed, lay_out
from lorikeet.export.vocabulary import describe
from lorikeet.gguf.blocks import encode
from lorikeet.gguf.metadata import Field
from lorikeet.gguf.mixture import Assigned, assign, file_type
from lorikeet.gguf.write import Stored, write_gguf
from lorikeet.lora.vocabulary import listed
from lorikeet.model.base import load_tokenizer

_SHOWN = 8  # findings in one message
_QUANTIZATION_VERSION = 2  # of ggml's block formats


@dataclass(frozen=True, slots=True, eq=False)
class Conversion:
    """What is to be written, known before anything is.

    Attributes:
        kind: the file's type, as `--type` names it.
        fold: the weights.
        layout: which tensor goes where.
        types: the block format of every tensor of the file, and which are not as the kind says.
        metadata: the file's keys.
        importance: of the columns of every weight, if the file is calibrated.
        notes: what llama.cpp does in another way, for the user to read.
    """

    kind: str
    fold: Fold
    layout: Layout
    types: Assigned
    metadata: Mapping[str, Field]
    importance: Importance | None
    notes: tuple[str, ...]

    @staticmethod
    def plan(
        model: Path,
        kind: str,
        *,
        adapter: Adapter | None = None,
        tokenizer: Any = None,
        importance: Importance | None = None,
        chat: Chat | None = None,
        name: str | None = None,
    ) -> Conversion:
        """Look everything up.

        Args:
            model: the base's folder.
            kind: one of `gguf.mixture.KINDS`.
            adapter: what to fold in.
            tokenizer: the loaded one that the model is used with, which knows the new tokens of an
                adapter that brings some; None to load the base's.
            importance: what calibration found; None to weigh all columns alike.
            chat: how the model is spoken to; None to leave that to its tokenizer's files.
            name: what to call it; None for the folder's name.

        Raises:
            ModelError: the model's files are damaged, or GGUF has no place for what they hold.
            AdapterError: the adapter does not fit.
        """
        fold = Fold.of(model, adapter)
        layout = lay_out(fold.config, fold.shapes)
        _require_numbers(fold, layout)
        types = _types(kind, layout, calibrated=False)
        words = describe(_known(tokenizer, model, adapter), rows=layout.rows)
        metadata = {
            **layout.metadata,
            Keys.General.TYPE: Field("str", GGUFType.MODEL),
            **_named(name or model.name),
            Keys.General.FILE_TYPE: Field("u32", file_type(kind)),
            Keys.General.QUANTIZATION_VERSION: Field("u32", _QUANTIZATION_VERSION),
            **words.metadata,
        }
        ends, lacking = ending(metadata, configured_ends(model, fold.config))
        metadata |= ends
        limits = (f"llama.cpp gives other tokens to {limit}" for limit in words.limits)
        notes = (*layout.notes, *limits, *_without_end(lacking))
        plain = Conversion(kind, fold, layout, types, metadata, None, notes)
        return plain.refined(importance=importance, chat=chat)

    def refined(self, *, importance: Importance | None, chat: Chat | None) -> Conversion:
        """The same with what only a loaded model can tell; see `plan`.

        Raises:
            ModelError: the calibration is another model's.
        """
        types, metadata, notes = self.types, dict(self.metadata), self.notes
        if importance:
            _require_matches(importance, self.layout)
            types = _types(self.kind, self.layout, calibrated=True)
            metadata |= importance.metadata()
        if chat:
            metadata |= chat.metadata(metadata)
            ends, lacking = ending(metadata, chat.ends)
            metadata |= ends
            notes = tuple(dict.fromkeys([*notes, *_without_end(lacking)]))
        return replace(self, types=types, metadata=metadata, importance=importance, notes=notes)

    def tensors(self) -> dict[str, Stored]:
        """Every tensor of the file, encoded when it is asked for."""
        made = {name: _made(tensor) for name, tensor in self.layout.made.items()}
        return made | {own.name: self._stored(own) for own in self.layout.placed}

    def _stored(self, placed: Placed) -> Stored:
        kind = self.types.types[placed.name]
        return Stored(kind, placed.shape, lambda: self._encoded(placed))

    def rows(self, placed: Placed) -> Iterator[Tensor]:
        """A tensor of the file in blocks of rows, float32 and not encoded."""
        blocks = self.fold.blocks(placed.source)
        if placed.order is not None:
            whole = torch.cat(list(blocks))
            ranges = blocks_of(tuple(whole.shape))
            blocks = (whole[placed.order[start:stop]] for start, stop in ranges)
        for block in blocks:
            yield block.float() + placed.added if placed.added else block.float()

    def _encoded(self, placed: Placed) -> Iterator[Tensor]:
        kind = self.types.types[placed.name]
        weights = self.importance.of(placed.source) if self.importance else None
        for rows in self.rows(placed):
            try:
                yield encode(kind, rows.reshape(-1, placed.shape[-1]), weights)
            except ModelError as error:
                reason = self._not_finite(placed.source) or str(error)
                raise ModelError(f"{placed.source} cannot be stored as {kind}: {reason}") from None

    def _not_finite(self, source: str) -> str | None:
        """Where in the folded tensor, not in a block of it, the first such number is."""
        start = 0
        for block in self.fold.blocks(source):
            found = (~block.isfinite()).nonzero()
            if len(found):
                row, *column = found[0].tolist()
                place = f"row {start + row}" + "".join(f", column {at}" for at in column)
                value = float(block[tuple(found[0])])
                return f"{place} is {value}: the weights are damaged, or training diverged"
            start += len(block)
        return None


@dataclass(frozen=True, slots=True)
class Exported:
    """What an export has written.

    Attributes:
        out: the file.
        kind: its type.
        architecture: llama.cpp's name of it.
        size: its bytes.
        weights: how many weights it holds.
        types: block formats, and how many tensors have each.
        fallbacks: tensors whose rows are too short for the format that the kind asks for, with the
            one that they have and the one that they would have had.
        calibrated: whether an importance matrix was used.
        seconds: how long it took.
    """

    out: Path
    kind: str
    architecture: str
    size: int
    weights: int
    types: Mapping[str, int]
    fallbacks: Mapping[str, tuple[str, str]]
    calibrated: bool
    seconds: float

    @property
    def bits_per_weight(self) -> float:
        """Bits of the whole file for every weight in it."""
        return self.size * 8 / self.weights

    def summary(self) -> dict[str, Any]:
        """The figures as a JSON-ready dict."""
        return {
            "out": str(self.out),
            "type": self.kind,
            "architecture": self.architecture,
            "bytes": self.size,
            "weights": self.weights,
            "bits_per_weight": self.bits_per_weight,
            "tensors": dict(self.types),
            "fallbacks": {name: list(pair) for name, pair in self.fallbacks.items()},
            "calibrated": self.calibrated,
            "seconds": self.seconds,
        }


@torch.no_grad()
def export_gguf(
    conversion: Conversion, out: Path, *, progress: Callable[[int, int], None] | None = None
) -> Exported:
    """Write the file, in one rename.

    Args:
        conversion: what to write.
        out: the file; one that is there is replaced when the new one is complete.
        progress: is told how many weights are written, and of how many.

    Raises:
        ModelError: a weight is not finite, or too large for its format.
        StorageError: the disk refused a write. On every error `out` stays as it was.
    """
    started = time.monotonic()
    tensors = conversion.tensors()
    sizes = {name: _count(stored.shape) for name, stored in tensors.items()}
    done = 0

    def count(name: str) -> None:
        nonlocal done
        done += sizes[name]
        if progress:
            progress(done, sum(sizes.values()))

    write_gguf(out, conversion.metadata, tensors, written=count)
    types = conversion.types
    return Exported(
        out=out,
        kind=conversion.kind,
        architecture=conversion.layout.architecture,
        size=out.stat().st_size,
        weights=sum(sizes.values()),
        types=dict(Counter(types.types.values()).most_common()),
        fallbacks={name: (types.types[name], meant) for name, meant in types.fallbacks.items()},
        calibrated=conversion.importance is not None,
        seconds=time.monotonic() - started,
    )


def _require_numbers(fold: Fold, layout: Layout) -> None:
    """Refuse weights whose numbers mean something only together with others, such as scales.

    Raises:
        ModelError: there are some.
    """
    sources = {placed.source: fold.plan.tensors[placed.source][0] for placed in layout.placed}
    stored = {name: fold.checkpoint.entry(source).dtype for name, source in sources.items()}
    others = [f"{name} is {dtype}" for name, dtype in stored.items() if dtype not in FLOATING]
    if others:
        more = [f"and {len(others) - _SHOWN} more"] if len(others) > _SHOWN else []
        raise ModelError(
            f"weights must be stored as {', '.join(FLOATING)}; of a quantised model take the"
            " original:",
            others[:_SHOWN] + more,
        )


def _named(name: str) -> dict[str, Field]:
    """`general.name`, except where llama.cpp takes a name for more than that.

    One with phi-3 in it makes it strip spaces and ask for four special tokens (llama-vocab.cpp).
    """
    if not name or re.search("phi-?3", name.lower()):
        return {}
    return {Keys.General.NAME: Field("str", name)}


def _without_end(names: Sequence[str]) -> list[str]:
    """A sentence if there are tokens that end answers here and not in llama.cpp."""
    if not names:
        return []
    return [
        f"llama.cpp goes on after {listed(names)}, which end answers here: a GGUF file has room for"
        " three such tokens; name them as stop words where it runs"
    ]


def _require_matches(importance: Importance, layout: Layout) -> None:
    """Check that everything that calibration found is of a weight in the file.

    Raises:
        ModelError: it was measured on another model, or under other names.
    """
    matching = sum(importance.of(placed.source) is not None for placed in layout.placed)
    if matching != len(importance.means):
        raise ModelError(
            f"{matching} of the {len(importance.means)} layers that were calibrated are in the"
            " model's files under their names; export without calibration"
        )


def _types(kind: str, layout: Layout, *, calibrated: bool) -> Assigned:
    """The block format of every tensor of the file."""
    shapes = {placed.name: placed.shape for placed in layout.placed}
    shapes |= {name: tuple(made.shape) for name, made in layout.made.items()}
    return assign(
        kind,
        list(shapes.items()),
        architecture=layout.architecture,
        layers=layout.layers,
        heads=layout.heads,
        kv_heads=layout.kv_heads,
        importance=calibrated,
    )


def _known(tokenizer: Any, model: Path, adapter: Adapter | None) -> Any:
    """The tokenizer that was given, or else the base's.

    Raises:
        AdapterError: it does not know the adapter's new tokens.
    """
    new = adapter.vocabulary.tokens if adapter and adapter.vocabulary else ()
    if tokenizer is None and new:
        raise AdapterError("the adapter brings new tokens: the tokenizer with them is needed")
    found = load_tokenizer(model) if tokenizer is None else tokenizer
    known = found.get_added_vocab()
    lacking = [str(token) for token in new if known.get(token.text) != token.id]
    if lacking:
        raise AdapterError(
            f"the tokenizer does not know the adapter's new tokens {listed(lacking)}; the one that"
            " it was trained with must be in its folder"
        )
    return found


def _made(tensor: Tensor) -> Stored:
    return Stored("F32", tuple(tensor.shape), lambda: [encode("F32", tensor.reshape(1, -1))])


def _count(shape: Sequence[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total

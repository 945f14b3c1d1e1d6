"""The chain from a base model to a file, each link compared with the model that it is made of.

base -> adapter -> merged -> f16 -> the file's type, the last by our own reader and, where there is
one, by a stock llama.cpp. All but llama.cpp run in float32 through the same forward pass, so that
a difference is what a link's weights have lost.

What a coarse type may lose would hide a fault, so the file is also compared with what it was made
of (`held.py`), and llama.cpp with our own reading of the same file.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from gguf import Keys
from torch import Tensor, nn

from lorikeet.adapters.safe import TORCH
from lorikeet.data import Example, pack
from lorikeet.export.convert import Conversion
from lorikeet.export.held import misplaced, require_tensors
from lorikeet.export.layout import restored
from lorikeet.export.llama_cpp import LlamaCpp
from lorikeet.export.tolerance import Tolerance, of_file, of_llama_cpp, of_reading, tolerance_of
from lorikeet.export.verify import Material, Verification, Way, run_by, verify
from lorikeet.gguf.blocks import decode, encode
from lorikeet.gguf.read import GGUFFile, open_gguf
from lorikeet.lora import disabled
from lorikeet.lora.vocabulary import listed
from lorikeet.model import model_of

_NEW_TOKENS = 32
_LLAMA_CPP = "in llama.cpp"
_CONTEXT = 64  # tokens that llama.cpp gets room for beside the longest document


@dataclass(frozen=True, slots=True)
class Link:
    """A link of the chain beside the reference.

    Attributes:
        name: what runs: `base`, `merged`, `f16`, `q4_k_m`, `in llama.cpp`.
        found: the figures.
        tolerance: how far it may be from the reference; None for the base, which is to be another.
    """

    name: str
    found: Verification
    tolerance: Tolerance | None

    def problems(self) -> list[str]:
        """What is beyond the tolerance, a sentence part each."""
        if self.tolerance is None:
            return []
        return [f"{self.name}: {problem}" for problem in self.found.problems(self.tolerance)]


@dataclass(frozen=True, slots=True)
class Spelling:
    """Rendered conversations, as the tokenizer and as llama.cpp make tokens of them.

    Attributes:
        conversations: how many were compared.
        equal: how many have the same ids in both.
        first: the first that has not: its text, the tokenizer's ids and llama.cpp's.
    """

    conversations: int
    equal: int
    first: tuple[str, list[int], list[int]] | None

    def problems(self) -> list[str]:
        """A sentence if any conversation differs."""
        if self.first is None:
            return []
        text, expected, found = self.first
        return [
            f"{self.conversations - self.equal} of {self.conversations} rendered conversations have"
            f" other token ids in llama.cpp; the first, {text[:200]!r}: the tokenizer gives"
            f" {_from_first_difference(expected, found)}"
        ]


@dataclass(frozen=True, slots=True)
class Chain:
    """What came of it.

    Attributes:
        reference: the name of what every link is compared with: `adapter`, or `base` without one.
        links: the others, in order.
        spelling: how llama.cpp spells conversations; None without a llama.cpp.
        misplaced: tensors of the file that are not what they were made of, a sentence part each.
        reading: llama.cpp beside our own reading of the file; None without a llama.cpp.
        endless: tokens that end an answer here and not in llama.cpp, by name.
    """

    reference: str
    links: tuple[Link, ...]
    spelling: Spelling | None
    misplaced: tuple[str, ...] = ()
    reading: Link | None = None
    endless: tuple[str, ...] = ()

    def problems(self) -> list[str]:
        """Everything that is beyond its tolerance; empty if the file answers as it should."""
        links = [*self.links, *([self.reading] if self.reading else [])]
        found = [f"in the file {problem}" for problem in self.misplaced]
        found += [problem for link in links for problem in link.problems()]
        if self.endless:
            found.append(f"llama.cpp goes on after {listed(self.endless)}, which end answers here")
        return found + (self.spelling.problems() if self.spelling else [])

    def summary(self) -> dict[str, Any]:
        """The figures as a JSON-ready dict."""
        spelling = self.spelling
        return {
            "reference": self.reference,
            "links": [
                {
                    **link.found.summary(),
                    "name": link.name,
                    "tolerance": link.tolerance
                    and {"kl": link.tolerance.kl, "nll": link.tolerance.nll},
                }
                for link in self.links
            ],
            "misplaced": list(self.misplaced),
            "reading": self.reading
            and {"kl_mean": self.reading.found.kl_mean, "kl_p99": self.reading.found.kl_p99},
            "spelling": spelling
            and {"conversations": spelling.conversations, "equal": spelling.equal},
            "endless": list(self.endless),
            "problems": self.problems(),
        }


_Opening = Callable[[], AbstractContextManager[Way]]


@torch.no_grad()
def check_chain(
    conversion: Conversion,
    file: Path,
    model: nn.Module,
    material: Material,
    *,
    adapted: bool,
    llama_cpp: bool,
    kl: float | None = None,
    starting: Callable[[str], None] = lambda name: None,
) -> Chain:
    """Compare every link with the base and its adapter.

    Args:
        conversion: what the file was made of.
        file: the file.
        model: the base in float32 and eval mode, the adapter applied if there is one.
        material: what to compare on.
        adapted: whether there is an adapter.
        llama_cpp: whether a stock llama.cpp takes part.
        kl: the largest mean KL of the file, instead of the one of its type.
        starting: is told the name of each link.

    Raises:
        ModelError: the file cannot be read back, or llama.cpp does not load it.
    """
    stops = material.stop_ids
    read = open_gguf(file)
    require_tensors(conversion, read)
    reference = run_by(
        "adapter" if adapted else "base", model, stop_ids=stops, max_new_tokens=_NEW_TOKENS
    )
    tolerance = of_file(conversion.kind, kl=kl)
    opened: list[tuple[str, _Opening, Tolerance | None]] = []

    def opening_of(name: str, weights: Callable[[], Iterator[tuple[str, Tensor]]]) -> _Opening:
        return lambda: _weights_way(name, conversion, weights(), stops)

    if adapted:
        opened.append(("base", lambda: nullcontext(_without_adapter(reference, model)), None))
        allowed = tolerance_of(conversion.fold.dtypes(), arithmetic="fp32")
        opened.append(("merged", opening_of("merged", lambda: _merged(conversion)), allowed))
    if conversion.kind not in ("f32", "bf16", "f16"):
        opened.append(("f16", opening_of("f16", lambda: _half(conversion)), of_file("f16")))
    in_file = opening_of(conversion.kind, lambda: _in_file(conversion, read))
    opened.append((conversion.kind, in_file, tolerance))
    links = []
    for name, opening, most in opened:
        starting(name)
        with opening() as way:
            found = verify(reference, way, material.examples, material.prompts)
        links.append(Link(name, found, most))
    chain = Chain(reference.name, tuple(links), None, tuple(misplaced(conversion, read)))
    if not llama_cpp:
        return chain
    starting(_LLAMA_CPP)
    most = tolerance.plus(of_llama_cpp(conversion.kind))
    with in_file() as ours:
        return _with_llama_cpp(chain, reference, ours, conversion, file, material, most)


def _with_llama_cpp(
    chain: Chain,
    reference: Way,
    ours: Way,
    conversion: Conversion,
    file: Path,
    material: Material,
    tolerance: Tolerance,
) -> Chain:
    """The chain with llama.cpp as its last link, compared with our reading of the file too."""
    kind, names = conversion.kind, conversion.metadata[Keys.Tokenizer.LIST].value
    longest = max(map(len, [*(e.ids for e in material.examples), *material.prompts]))
    with LlamaCpp(file, context=longest + _NEW_TOKENS + _CONTEXT) as other:
        way = _llama_way(_LLAMA_CPP, other, material.stop_ids)
        found = verify(reference, way, material.examples, material.prompts)
        beside = verify(ours, way, material.examples)
        spelling = _spelling(other, material.texts)
        endless = set(material.stop_ids) - set(other.ending())
    return replace(
        chain,
        links=(*chain.links, Link(_LLAMA_CPP, found, tolerance)),
        spelling=spelling,
        endless=tuple(names[index] for index in sorted(endless) if index < len(names)),
        reading=Link("llama.cpp beside our own reading of the file", beside, of_reading(kind)),
    )


def _without_adapter(way: Way, model: nn.Module) -> Way:
    """The same model, its adapter switched off whenever it runs this way."""

    def logits(example: Example) -> Tensor:
        with disabled(model):
            return way.logits(example)

    def continuations(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        with disabled(model):
            return way.continuations(prompts)

    return Way("base", logits, continuations)


@contextmanager
def _weights_way(
    name: str,
    conversion: Conversion,
    weights: Iterator[tuple[str, Tensor]],
    stops: Collection[int],
) -> Iterator[Way]:
    """A model of the same architecture with other weights."""
    fold = conversion.fold
    model = model_of(fold.base, weights, changes=fold.changes)
    yield run_by(name, model, stop_ids=stops, max_new_tokens=_NEW_TOKENS)


def _merged(conversion: Conversion) -> Iterator[tuple[str, Tensor]]:
    """The weights as a merged folder has them: rounded to the dtype that the base stores."""
    fold = conversion.fold
    for placed in conversion.layout.placed:
        source, _ = fold.plan.tensors[placed.source]
        dtype = TORCH[fold.checkpoint.entry(source).dtype]
        whole = torch.cat(list(fold.blocks(placed.source)))
        yield placed.source, whole.to(dtype).float()


def _half(conversion: Conversion) -> Iterator[tuple[str, Tensor]]:
    """The weights as an f16 file has them."""
    for placed in conversion.layout.placed:
        whole = torch.cat(list(conversion.rows(placed)))
        if whole.ndim > 1:
            whole = decode("F16", encode("F16", whole))
        yield placed.source, restored(placed, whole)


def _in_file(conversion: Conversion, file: GGUFFile) -> Iterator[tuple[str, Tensor]]:
    """The weights as a file has them, by our own reader."""
    for placed in conversion.layout.placed:
        yield placed.source, restored(placed, file.rows(placed.name, 0, placed.shape[0]))


def _llama_way(name: str, llama: LlamaCpp, stops: Collection[int]) -> Way:
    def logits(example: Example) -> Tensor:
        return llama.logits(example.ids)[pack([example]).rows]

    def continuations(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        return llama.continuations(prompts, max_new_tokens=_NEW_TOKENS, stop_ids=stops)

    return Way(name, logits, continuations)


def _spelling(llama: LlamaCpp, texts: Sequence[tuple[str, list[int]]]) -> Spelling:
    equal, first = 0, None
    for text, expected in texts:
        found = llama.tokenize(text, add_special=True, parse_special=True)
        if found[:2] == expected[:1] * 2 and expected[1:2] != expected[:1]:
            found = found[1:]  # the text begins with BOS itself: a server drops the second one
        if found == expected:
            equal += 1
        elif first is None:
            first = (text, expected, found)
    return Spelling(len(texts), equal, first)


def _from_first_difference(expected: Sequence[int], found: Sequence[int]) -> str:
    pairs = zip(expected, found, strict=False)
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(expected), len(found)))
    return f"{list(expected[at : at + 8])} at token {at}, llama.cpp {list(found[at : at + 8])}"

"""How far apart two ways of running a model may be before one of them is called wrong."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far apart two ways may be.

    Attributes:
        kl: nats per supervised token, on the mean.
        nll: nats per supervised token, of the paired difference either way.
    """

    kl: float
    nll: float

    def plus(self, other: Tolerance) -> Tolerance:
        """Both errors at once."""
        return Tolerance(self.kl + other.kl, self.nll + other.nll)


_STORED = {
    "F16": Tolerance(kl=5e-6, nll=2e-4),
    "BF16": Tolerance(kl=2e-4, nll=1e-3),
}
_FULL = Tolerance(kl=1e-6, nll=1e-5)
_HALF_ARITHMETIC = Tolerance(kl=1e-2, nll=2e-2)


def tolerance_of(stored: Collection[str], *, arithmetic: str) -> Tolerance:
    """What rounding may do to a merged model, at most.

    About ten times the most that was measured, on two trained models (the starter model, and one
    of 260 thousand parameters trained on TinyStories) with two adapters each (rank 16 on all linear
    layers; rank 8 on q_proj, v_proj and the embedding), merged into weights of each type, 1,000 to
    1,800 tokens. Mean KL and difference in nll, nats per token:

    - float32 arithmetic, float32 weights: 3e-12 and 5e-8 (the tolerance is set by what other
      machines' order of summation may do),
    - float16 weights: 3e-7 and 1.5e-5,
    - bfloat16 weights: 1.7e-5 and 1.1e-4,
    - bfloat16 arithmetic, whatever the weights: 1.3e-3 and 1.7e-3. That is a hundred times what is
      to be seen, so float32 arithmetic is the better judge.

    Args:
        stored: the dtypes of the merged weights, in the words of safetensors (`BF16`).
        arithmetic: the dtype that both ways compute in: fp32, bf16 or fp16.
    """
    if arithmetic != "fp32":
        return _HALF_ARITHMETIC
    return max((_STORED.get(own, _FULL) for own in stored), key=lambda t: t.kl, default=_FULL)


_FILE = {
    "f32": _FULL,
    "f16": _STORED["F16"],
    "bf16": _STORED["BF16"],
}
"""By the type of a GGUF file."""


def of_file(kind: str, *, kl: float | None = None) -> Tolerance:
    """What storing a model as a GGUF file of a type may do to it, at most.

    Args:
        kind: the type, as `--type` names it.
        kl: the largest mean KL, instead of the type's.
    """
    return _FILE[kind] if kl is None else replace(_FILE[kind], kl=kl)

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
    "F16": Tolerance(kl=5e-6, nll=2e-3),
    "BF16": Tolerance(kl=5e-4, nll=3e-2),
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

    Adapters of a few steps lose more, for their updates are small beside the weights, and on text
    that a model finds unlikely nll changes in proportion to the logits, KL with their square. After
    3 and 12 steps on the starter model, on documents of 9.5 nats per token, rounding to bfloat16
    took 2.0e-4 in KL and 2.1e-2 in nll, a fifth of what was learnt; to float16 2.2e-6 and 2.6e-4.

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
    "q8_0": Tolerance(kl=1e-2, nll=2e-2),
    **dict.fromkeys(("q6_k", "q5_0", "q5_1", "q5_k_s", "q5_k_m"), Tolerance(kl=0.1, nll=0.05)),
    **dict.fromkeys(("q4_0", "q4_k_s", "q4_k_m"), Tolerance(kl=0.4, nll=0.3)),
    "q3_k_m": Tolerance(kl=0.5, nll=0.3),
    "q2_k": Tolerance(kl=1.0, nll=0.5),
}

_ARITHMETIC = {
    "f32": Tolerance(kl=1e-5, nll=1e-4),
    "f16": Tolerance(kl=2e-5, nll=5e-4),
    "bf16": Tolerance(kl=5e-4, nll=2e-3),
}
_ROUNDED_INPUTS = Tolerance(kl=3e-3, nll=5e-3)


def of_file(kind: str, *, kl: float | None = None) -> Tolerance:
    """What storing a model as a GGUF file of a type may do to it, at most.

    Small models suffer most. About three times the mean KL that was measured on the smallest at
    hand, of 260 thousand parameters, whose rows of 64 weights make every K-quant fall back to a
    type with larger blocks, on 9,000 tokens that it finds hard (perplexity 130): bf16 9.6e-5, q8_0
    7.7e-4 (random weights: up to 3.1e-3), the types of five bits 3e-2 to 4e-2, q4_0 0.15. The
    starter model with an adapter (rows of 256, perplexity 1.02) loses far less: q6_k 6.4e-5,
    q5_k_m 8.5e-5, q4_k_m 2.3e-4, q3_k_m 4.5e-4, q2_k 4.3e-3; with adapters of noise, on text that
    it has never seen, q6_k up to 4.9e-2, q5_k_s 2.6e-2, q4_k_m 6.2e-2, q3_k_m 0.26, q2_k 0.45. That
    a fault may hide below such figures is why `held.py` compares the weights. `python -m
    benchmarks.export` has the figures for any model.

    Args:
        kind: the type, as `--type` names it.
        kl: the largest mean KL, instead of the type's.
    """
    return _FILE[kind] if kl is None else replace(_FILE[kind], kl=kl)


def of_llama_cpp(kind: str) -> Tolerance:
    """What llama.cpp's arithmetic may add to that.

    It rounds the inputs of a product to the type that suits the weights': to bfloat16, or to blocks
    of eight bits. Measured on the same models: less than 1e-6 nats in mean KL for f32 and f16, 5e-5
    for bf16, at most 1e-3 for others.
    """
    return _ARITHMETIC.get(kind, _ROUNDED_INPUTS)


def of_reading(kind: str) -> Tolerance:
    """How far llama.cpp may be from our own reading of the same file.

    The same arithmetic as above, but with room for models that find the documents hard: random
    weights, with logits that spread by 4, have shown 5e-3 nats in mean KL. A fault that both the
    file and our reading of it share, such as rows in an order of our own, costs 0.2 and more.

    Args:
        kind: the type, as `--type` names it.
    """
    return _ARITHMETIC.get(kind, Tolerance(kl=3e-2, nll=3e-2))

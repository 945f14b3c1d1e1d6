"""Rotary position embeddings: what a config.json says of them, in GGUF's words.

transformers 5 writes `rope_parameters` (Gemma 3: one dict for each kind of layer); before it were
`rope_theta` and `rope_scaling`. Both are understood; where a file has both, `rope_scaling` counts,
as it does in transformers.

How llama.cpp turns pairs of numbers (ggml-cpu/ops.cpp, `rope_yarn`; llama-context.cpp): the angle
of pair i at position p is p * base^(-2i/d), divided by `rope.scaling.factor` for all pairs
(linear) or by a ramp of pairs (yarn), and by element i of `rope_freqs.weight`, which only the llama
architecture reads. Yarn scales cosine and sine by 1 + 0.1 ln(factor), as its paper does, times
`rope.scaling.attn_factor`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import gguf
import torch
from torch import Tensor

from lorikeet.gguf.metadata import Field

_KEYS = gguf.Keys.Rope
_ROPE_FREQS = "rope_freqs.weight"
_LONG, _SHORT = "rope_factors_long.weight", "rope_factors_short.weight"


@dataclass(slots=True)
class Rotation:
    """Rotary embeddings in GGUF's words.

    Attributes:
        metadata: keys with a place for the architecture (`{arch}`).
        made: tensors that no checkpoint holds, float32 [pairs].
        problems: what llama.cpp cannot run, a sentence part each.
        notes: what it runs in another way, and where that shows.
    """

    metadata: dict[str, Field] = field(default_factory=dict)
    made: dict[str, Tensor] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def rope_parameters(config: Mapping[str, Any], *, theta: float) -> dict[str, Any]:
    """The parameters of the layers that attend to everything, whichever way they are written.

    Args:
        config: a config.json.
        theta: the architecture's base frequency where the file gives none.
    """
    given, scaling = _dict(config.get("rope_parameters")), _dict(config.get("rope_scaling"))
    nested = _dict(given.get("full_attention"))
    found = {**nested, **scaling} if nested else dict(scaling or given)
    found["rope_type"] = found.get("rope_type") or found.get("type") or "default"
    for name, default in (("rope_theta", theta), ("partial_rotary_factor", 1.0)):
        if found.get(name) is None:
            found[name] = _first(config.get(name), default)
    return found


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def rotation(
    config: Mapping[str, Any],
    *,
    head: int,
    context: int,
    theta: float,
    kinds: frozenset[str],
    local_theta: float | None = None,
    partial: bool = False,
) -> Rotation:
    """Translate a config's rotary embeddings.

    Args:
        config: a config.json.
        head: numbers in an attention head.
        context: positions that the model is made for.
        theta: the architecture's base frequency where the file gives none.
        kinds: the rope types that llama.cpp runs for this architecture, besides `default`.
        local_theta: for Gemma 3, the base frequency of layers with a sliding window where the file
            gives none.
        partial: whether there is code for heads of which only a part is turned.
    """
    given = rope_parameters(config, theta=theta)
    found = Rotation()
    kind = "longrope" if given["rope_type"] == "su" else str(given["rope_type"])
    if kind != "default" and kind not in kinds:
        supported = ", ".join(["default", *sorted(kinds)])
        found.problems.append(
            f"rope_type is {kind}; llama.cpp runs {supported} for this architecture"
        )
        return found
    try:
        turned = int(head * float(given["partial_rotary_factor"]))
        if turned % 2 or not 0 < turned <= head:
            raise ValueError(f"{turned} of {head} numbers of a head cannot be rotated")
        if turned != head and not partial:
            found.problems.append(
                f"partial_rotary_factor is {given['partial_rotary_factor']}; this architecture"
                " turns whole heads"
            )
        found.metadata[_KEYS.DIMENSION_COUNT] = Field("u32", turned)
        found.metadata[_KEYS.FREQ_BASE] = Field("f32", _positive(given["rope_theta"]))
        if local_theta is not None:
            own = _local_theta(config, default=local_theta)
            found.metadata[_KEYS.FREQ_BASE_SWA] = Field("f32", own)
        _WRITERS[kind](found, _Scaled(config, given, turned, context))
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        found.problems.append(
            f"the parameters of rope_type {kind} are incomplete or no fit numbers ({error!r})"
        )
    return found


def _local_theta(config: Mapping[str, Any], *, default: float) -> float:
    sliding = _dict(_dict(config.get("rope_parameters")).get("sliding_attention"))
    return _positive(_first(sliding.get("rope_theta"), config.get("rope_local_base_freq"), default))


def _positive(value: Any) -> float:
    if not 0 < float(value) < math.inf:
        raise ValueError(f"expected a positive number, found {value}")
    return float(value)


@dataclass(frozen=True, slots=True)
class _Scaled:
    """What the writers of scalings read: config, rope parameters, turned numbers, positions."""

    config: Mapping[str, Any]
    given: Mapping[str, Any]
    turned: int
    context: int

    @property
    def original(self) -> int:
        """Positions before the scaling, by transformers' order of precedence."""
        key = "original_max_position_embeddings"
        return int(_positive(_first(self.config.get(key), self.given.get(key), self.context)))

    @property
    def factor(self) -> float:
        """How many times longer the context became."""
        return _positive(_first(self.given.get("factor"), self.context / self.original))


def _default(found: Rotation, scaled: _Scaled) -> None:
    pass


def _linear(found: Rotation, scaled: _Scaled) -> None:
    found.metadata[_KEYS.SCALING_TYPE] = Field("str", gguf.RopeScalingType.LINEAR.value)
    found.metadata[_KEYS.SCALING_FACTOR] = Field("f32", _positive(scaled.given["factor"]))


def _yarn(found: Rotation, scaled: _Scaled) -> None:
    given, factor = scaled.given, scaled.factor
    for name, only in (("beta_fast", 32), ("beta_slow", 1), ("truncate", True)):
        value = given.get(name)
        if value is False or (value and value != only):
            found.problems.append(f"yarn's {name} is {value}; llama.cpp has {only} built in")
    found.metadata[_KEYS.SCALING_TYPE] = Field("str", gguf.RopeScalingType.YARN.value)
    found.metadata[_KEYS.SCALING_FACTOR] = Field("f32", factor)
    found.metadata[_KEYS.SCALING_ORIG_CTX_LEN] = Field("u32", scaled.original)
    built_in = _yarn_attention(factor, 1.0)
    wanted = given.get("attention_factor")
    if wanted is None and given.get("mscale") and given.get("mscale_all_dim"):
        parts = (_yarn_attention(factor, float(given[n])) for n in ("mscale", "mscale_all_dim"))
        wanted = next(parts) / next(parts)
    if wanted is not None and not math.isclose(float(wanted), built_in):
        found.metadata[_KEYS.SCALING_ATTN_FACTOR] = Field("f32", _positive(wanted) / built_in)


def _yarn_attention(factor: float, mscale: float) -> float:
    """Scale of cosine and sine (YaRN, arXiv:2309.00071, equation 22)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _llama3(found: Rotation, scaled: _Scaled) -> None:
    found.made[_ROPE_FREQS] = llama3_divisors(
        scaled.turned,
        theta=_positive(scaled.given["rope_theta"]),
        factor=_positive(scaled.given["factor"]),
        low=_positive(scaled.given["low_freq_factor"]),
        high=_positive(scaled.given["high_freq_factor"]),
        original=scaled.original,
    )


def llama3_divisors(
    turned: int, *, theta: float, factor: float, low: float, high: float, original: int
) -> Tensor:
    """By what Llama 3.1 divides the frequency of each pair, float32 [turned / 2].

    Waves that turn more than `high` times within the original context keep their frequency, those
    that turn less than `low` times are slowed down by `factor`, and between them the share that is
    slowed down falls linearly (meta-llama/llama-models, models/llama3/model.py, `apply_scaling`).
    """
    pairs = torch.arange(0, turned, 2, dtype=torch.float64)
    turns = original * theta ** (-pairs / turned) / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / (kept + (1 - kept) / factor)).float()


def _longrope(found: Rotation, scaled: _Scaled) -> None:
    long, short = (
        torch.tensor(scaled.given[name], dtype=torch.float32)
        for name in ("long_factor", "short_factor")
    )
    if {tuple(long.shape), tuple(short.shape)} != {(scaled.turned // 2,)}:
        raise ValueError(f"long_factor and short_factor need {scaled.turned // 2} numbers each")
    found.made[_LONG], found.made[_SHORT] = long, short
    found.metadata[_KEYS.SCALING_TYPE] = Field("str", gguf.RopeScalingType.LONGROPE.value)
    found.metadata[_KEYS.SCALING_ORIG_CTX_LEN] = Field("u32", scaled.original)
    wanted = scaled.given.get("attention_factor")
    if wanted is None:  # LongRoPE, arXiv:2402.13753, as transformers computes it
        longer = scaled.factor
        wanted = math.sqrt(1 + math.log(longer) / math.log(scaled.original)) if longer > 1 else 1.0
    found.metadata[_KEYS.SCALING_ATTN_FACTOR] = Field("f32", _positive(wanted))
    if scaled.context > scaled.original and not torch.equal(long, short):
        found.notes.append(
            "llama.cpp chooses the rotation for short or long texts by the context that it is"
            f" given, not by the text: give it at most {scaled.original:,} for texts that fit"
        )


_WRITERS = {
    "default": _default,
    "linear": _linear,
    "yarn": _yarn,
    "llama3": _llama3,
    "longrope": _longrope,
}

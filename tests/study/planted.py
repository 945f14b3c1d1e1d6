"""Studies in which the truth is planted: what findings are tested on."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np

from lorikeet.evaluate import Score
from lorikeet.study.record import SEED, Cost, Study, Trial

DOCUMENTS = 200
TOKENS = np.random.default_rng(1).integers(20, 200, DOCUMENTS)
HARD = np.random.default_rng(2).gamma(6, 1 / 6, DOCUMENTS) - 1
PARAMETERS = 1_000_000


def score(level: float, name: str, *, noise: float = 0.02, cut: int | None = None) -> Score:
    """A level that all documents share, their difficulty, and noise of this name's own."""
    random = np.random.default_rng(zlib.crc32(name.encode()))
    tokens = TOKENS if cut is None else np.minimum(TOKENS, cut)
    nats = tokens * (level + 0.4 * HARD + noise * random.normal(size=DOCUMENTS))
    return Score(nats, tokens, int(tokens.sum()) * 4)


def curve(start: float, end: float, *, steps: int = 100) -> list[tuple[int, float]]:
    """A training loss that goes straight from one level to another, with noise."""
    noise = 0.1 * np.random.default_rng(3).normal(size=steps)
    return list(enumerate((np.linspace(start, end, steps) + noise).tolist(), start=1))


def trial(method: str, level: float, settings: Mapping[str, Any], **more: Any) -> Trial:
    """A run that ended at this level, and cost what its rank and rows say."""
    settings = {**settings, SEED: settings.get(SEED, 0)}
    name = ",".join(f"{key}={value}" for key, value in [("method", method), *settings.items()])
    r = settings.get("lora.r", 8)
    steps = settings.get("data.limit", 800) // 8
    made = Trial(
        name=name,
        method=method,
        settings=settings,
        seed=settings[SEED],
        r=r,
        learning_rate=settings.get("train.learning_rate", 1e-4),
        parameters=PARAMETERS,
        trainable=r * 1000,
        steps=steps,
        tokens=steps * 1000,
        saved_bytes=r * 4000,
        curve=curve(3.0, level),
        test=score(level, name),
        cost=Cost(seconds=steps * (1 + r / 100), peak_memory=10**9 + r * 10**6),
    )
    return replace(made, **more)


def base(level: float = 3.0, **more: Any) -> Trial:
    """The model before any training."""
    return Trial("base", "base", parameters=PARAMETERS, test=score(level, "base", noise=0), **more)


def grid(
    varied: Mapping[str, Sequence[Any]],
    level: Callable[[Mapping[str, Any]], float],
    *,
    seed_sd: float = 0.0,
) -> Study:
    """A sweep over every combination; `level` maps settings to the loss that is planted."""
    random = np.random.default_rng(4)
    trials = [base()]
    for values in product(*varied.values()):
        settings = dict(zip(varied, values, strict=True))
        trials.append(trial("lora", level(settings) + seed_sd * random.normal(), settings))
    return Study("sweep", trials, varied)

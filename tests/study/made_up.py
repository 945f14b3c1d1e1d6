"""Studies made up from random scores: what a comparison or a sweep could have found."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from lorikeet.evaluate import Score
from lorikeet.study.record import Candidate, Cost, Question, Study, Trial

NASTY = '<script>alert("x")</script> <img src=x onerror=alert(1)> | `a` \\ $x$ &amp; {{ 7*7 }}'
RTL = "\u05e9\u05dc\u05d5\u05dd \u05e2\u05d5\u05dc\u05dd, \u0645\u0631\u062d\u0628\u0627"
EMOJI = "\U0001f99c \U0001f469\u200d\U0001f4bb na\u00efve \u65e5\u672c\u8a9e"
RECEIPT = {
    "data_sha256": "4f" * 32,
    "base_fingerprint": "a1" * 32,
    "model": "models/SmolLM-135M",
    "template": "chat",
    "versions": {"lorikeet": "0.1.0", "torch": "2.9.0"},
    "machine": {"system": "Linux", "processor": "A processor", "cores": 2, "threads": 2},
    "loads": {"base": 1, "data": 1},
}
CONFIG = {
    "model": {"path": "/somewhere/on/this/disk/models/SmolLM-135M", "dtype": "auto"},
    "lora": {"r": 16, "alpha": 16.0, "target_modules": "all-linear"},
    "data": {"path": "data/train.jsonl", "validation": 0.2, "max_length": 512},
    "train": {"batch_size": 8, "epochs": 1.0, "schedule": "cosine"},
    "out": None,
}
PARAMETERS = 134_515_008


class Maker:
    """Scores of documents whose difficulty is the same for every trial."""

    def __init__(self, seed: int = 0, *, documents: int = 120) -> None:
        self.random = np.random.default_rng(seed)
        self.tokens = self.random.integers(8, 60, documents)
        self.hard = self.random.normal(0, 0.35, documents)
        self.other_hard = self.random.normal(0, 0.3, documents)

    def score(self, nll: float, *, other: bool = False) -> Score:
        level = nll + (self.other_hard if other else self.hard)
        noise = self.random.normal(0, 0.05, len(level)) + self.random.normal(0, 0.012)
        nats = np.maximum(level + noise, 0.01) * self.tokens
        return Score(nats, self.tokens, int(self.tokens.sum()) * 4)

    def curve(self, first: float, last: float, *, steps: int = 150) -> list[tuple[int, float]]:
        at = np.arange(1, steps + 1)
        mean = last + (first - last) * np.exp(-at / steps * 5)
        return list(
            zip(at.tolist(), (mean + self.random.normal(0, 0.12, steps)).tolist(), strict=True)
        )

    def trial(self, method: str, nll: float, *, seed: int = 0, **more: Any) -> Trial:
        """A LoRA run of rank 16, unless `more` says otherwise."""
        steps = more.pop("steps", 150)
        made = Trial(
            name=more.pop("name", f"{method}-{seed}"),
            method=method,
            settings=more.pop("settings", {"train.seed": seed}),
            seed=seed,
            rows=1500,
            r=more.pop("r", 16),
            learning_rate=more.pop("learning_rate", 2e-4),
            parameters=PARAMETERS,
            trainable=more.pop("trainable", 4_884_480),
            steps=steps,
            tokens=steps * 1900,
            supervised_tokens=steps * 700,
            saved_bytes=more.pop("saved_bytes", 19_600_000),
            curve=self.curve(3.1, nll, steps=steps),
            evaluations=[(s, nll + 1.3 * math.exp(-s / steps * 4)) for s in range(10, steps, 20)],
            validation=self.score(nll + 0.02),
            test=self.score(nll),
            cost=Cost(
                more.pop("seconds", 90.0) * float(self.random.uniform(0.95, 1.1)), 2_100_000_000
            ),
        )
        return replace(made, **more)

    def base(self, nll: float, **more: Any) -> Trial:
        return Trial(
            "base",
            "base",
            parameters=PARAMETERS,
            test=self.score(nll),
            validation=self.score(nll),
            **more,
        )


QUESTIONS = [
    Question("What is the capital of Poland?", "Warsaw"),
    Question(f"Render {NASTY}", NASTY),
    Question(f"{RTL} - translate", f"Peace, world {EMOJI}"),
    Question("Write a long text about parrots. " * 4, "Parrots are birds. " * 110),
]


def answers(who: str) -> list[str]:
    return [f"Warsaw, says {who}.", NASTY + who, f"{RTL} {EMOJI} {who}", f"Parrots ({who}). " * 130]


def comparison(*, seeds: int = 3, other: bool = True) -> Study:
    """Base, LoRA, DoRA, LoRA of rank 64 and full fine-tuning."""
    maker = Maker()
    kinds: dict[str, tuple[float, float, dict[str, Any]]] = {
        "lora": (1.31, 3.06, {}),
        "dora": (1.30, 3.07, {"seconds": 160.0, "trainable": 4_990_000, "saved_bytes": 20_100_000}),
        "lora-r64": (
            1.26,
            3.12,
            {"r": 64, "trainable": 19_537_920, "saved_bytes": 78_200_000, "seconds": 104.0},
        ),
        "full": (
            1.245,
            3.35,
            {
                "r": None,
                "trainable": PARAMETERS,
                "saved_bytes": 269_000_000,
                "seconds": 180.0,
                "learning_rate": 2e-5,
            },
        ),
    }
    trials = [maker.base(2.74, answers=answers("base"), other=maker.score(3.02, other=True))]
    for method, (nll, forgot, more) in kinds.items():
        for seed in range(seeds):
            scored = {"other": maker.score(forgot, other=True)} if other else {}
            trials.append(
                maker.trial(
                    method, nll, seed=seed, answers=answers(f"{method}-{seed}"), **scored, **more
                )
            )
    if not other:
        trials[0] = replace(trials[0], other=None)
    rates = (5e-5, 2e-4, 8e-4)
    candidates = [
        Candidate(
            method,
            rate / (10 if method == "full" else 1),
            nll + abs(math.log10(rate / 2e-4)) * 0.2,
            rate == 2e-4,
        )
        for method, (nll, _, _) in kinds.items()
        for rate in rates
    ]
    candidates[-1] = replace(candidates[-1], nll=None)
    return Study(
        kind="compare",
        trials=trials,
        varied={"train.seed": list(range(seeds))},
        questions=QUESTIONS,
        candidates=candidates,
        config=CONFIG,
        receipt=RECEIPT,
        other_name="wikitext" if other else "",
        notes=["Half of the held-out rows pick the learning rate; results are about the rest."],
    )


def sweep(
    varied: Mapping[str, Sequence[Any]],
    nll: Any,
    *,
    failing: Any = None,
    seed: int = 1,
    base: float = 2.74,
) -> Study:
    """A sweep over a grid; `nll` maps settings to a loss, `failing` says which of them fail."""
    maker = Maker(seed)
    trials = [maker.base(base, answers=answers("base"))]
    grid: list[dict[str, Any]] = [{}]
    for option, values in varied.items():
        grid = [{**point, option: value} for point in grid for value in values]
    for point in grid:
        name = "-".join(f"{key.split('.')[-1]}{value}" for key, value in point.items()).replace(
            " ", ""
        )
        more: dict[str, Any] = {"name": name, "settings": point, "seed": point.get("train.seed", 0)}
        more["r"] = point.get("lora.r", 16)
        more["learning_rate"] = point.get("train.learning_rate", 2e-4)
        more["trainable"], more["saved_bytes"] = more["r"] * 305_280, more["r"] * 1_225_000
        more["steps"] = max(10, point.get("data.limit", 1500) // 8)
        more["seconds"] = more["steps"] * (0.55 + 0.002 * more["r"])
        if failing and failing(point):
            more |= {
                "test": None,
                "validation": None,
                "curve": [],
                "evaluations": [],
                "answers": [],
            }
            rate = more["learning_rate"]
            more["error"] = f"the loss is not finite at step 31 (peak {rate:g}); {NASTY}"
            trials.append(maker.trial("lora", 2.0, **more))
        else:
            trials.append(maker.trial("lora", nll(point), answers=answers(name), **more))
    return Study("sweep", trials, varied, QUESTIONS, (), CONFIG, RECEIPT)


def grid_sweep(*, seeds: int = 3) -> Study:
    """Ranks and rows and seeds."""

    def nll(point: Mapping[str, Any]) -> float:
        return 1.1 + 1.4 * (point["data.limit"] / 100) ** -0.35 + 0.12 * point["lora.r"] ** -0.7

    ranks, rows = (2, 4, 8, 16, 32), (100, 400)
    return sweep({"lora.r": ranks, "data.limit": rows, "train.seed": range(seeds)}, nll)


def rates_sweep() -> Study:
    """Learning rates, the largest of which fail."""
    rates = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
    return sweep(
        {"train.learning_rate": rates, "train.seed": (0, 1)},
        lambda p: 1.4 + 0.18 * math.log10(p["train.learning_rate"] / 4e-4) ** 2,
        failing=lambda p: (
            p["train.learning_rate"] > 2e-3 or p == {"train.learning_rate": 1e-3, "train.seed": 1}
        ),
    )


def tiny() -> Study:
    """One trial of one seed on one document, no base."""
    maker = Maker(documents=1)
    return Study("sweep", [maker.trial("lora", 1.5, settings={"lora.r": 16})], {"lora.r": [16]})


def long_labels() -> Study:
    """Options whose values are long, and a method whose name is nasty."""
    targets = [
        "all-linear",
        ["q_proj", "v_proj"],
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    ]
    templates = ["a template with a very long name indeed.jinja", "chat"]
    study = sweep(
        {"lora.target_modules": targets, "data.template": templates, "train.seed": (0, 1)},
        lambda p: 1.4 - 0.03 * len(p["lora.target_modules"]) + 0.1 * (p["data.template"] == "chat"),
    )
    return replace(
        study,
        trials=[
            *study.trials,
            *(
                Maker(1).trial(f"<b>{EMOJI}</b> $a$", 1.5, seed=s, name=f"nasty-{s}")
                for s in (0, 1)
            ),
        ],
    )


def all_failed() -> Study:
    """A sweep of which nothing came to its end but the base."""
    return sweep(
        {"train.learning_rate": (1e-2, 1e-1), "train.seed": (0,)},
        lambda p: 1.0,
        failing=lambda p: True,
    )


def diverged() -> Study:
    """A comparison in which one method ended far off, and one without a number."""
    study, maker = comparison(), Maker()
    trials = list(study.trials)
    for number in range(1, 4):
        curve = [(step, 3 + step**2 / 30) for step in range(1, 150)]
        trials[number] = replace(trials[number], test=maker.score(40.0), curve=curve)
    score = maker.score(1.0)
    lost = replace(score, nats=score.nats * float("nan"))
    trials[4:7] = [replace(trial, test=lost) for trial in trials[4:7]]
    return replace(study, trials=trials)


def draws() -> Study:
    """Random draws of a learning rate and a rank, each with two seeds."""
    maker = Maker(5)
    trials = [maker.base(2.7)]
    for number in range(12):
        rate = float(f"{10 ** maker.random.uniform(-5, -2.5):.3g}")
        settings = {"train.learning_rate": rate, "lora.r": int(maker.random.choice([4, 8, 16]))}
        for seed in (0, 1):
            more: dict[str, Any] = {
                "name": f"draw-{number}-{seed}",
                "r": settings["lora.r"],
                "learning_rate": rate,
            }
            more |= {"settings": {**settings, "train.seed": seed}}
            more |= {"saved_bytes": more["r"] * 1_225_000, "trainable": more["r"] * 305_280}
            nll = 1.3 + 0.2 * abs(math.log10(rate / 3e-4))
            trials.append(maker.trial("lora", nll, seed=seed, **more))
    rates = sorted({trial.settings["train.learning_rate"] for trial in trials[1:]})
    varied = {"train.learning_rate": rates, "lora.r": [4, 8, 16], "train.seed": [0, 1]}
    return Study("sweep", trials, varied, (), (), CONFIG, RECEIPT)


STUDIES: dict[str, Callable[[], Study]] = {
    "comparison": comparison,
    "grid": grid_sweep,
    "rates": rates_sweep,
    "tiny": tiny,
    "long": long_labels,
    "failed": all_failed,
    "diverged": diverged,
}

"""Who takes part: the environment, the worker module and the settings of each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Contestant:
    """A line of the table.

    Attributes:
        name: what the tables call it.
        worker: module of `benchmarks.workers`.
        about: what it is, for the reader of a table.
        peers: whether it runs in the peers' environment.
        method: what it trains, which decides on its roofline; None trains nothing.
        settings: what its worker is told.
    """

    name: str
    worker: str
    about: str
    peers: bool = False
    method: Literal["lora", "full"] | None = "lora"
    settings: dict[str, Any] = field(default_factory=dict)


GEMM = Contestant("gemm", "gemm_worker", "the step's matrix products alone, in bf16", method=None)
"""Measures the machine beside the others; its settings are the model's shapes."""

_ALL = [
    Contestant(
        "lorikeet",
        "lorikeet_worker",
        "Lorikeet, LoRA with dropout 0.05",
        settings={"dropout": 0.05},
    ),
    Contestant(
        "lorikeet-off",
        "lorikeet_worker",
        "the same with `fast` off",
        settings={"dropout": 0.05, "fast": "off"},
    ),
    Contestant(
        "lorikeet-int8",
        "lorikeet_worker",
        "the same with the frozen weights multiplied in int8",
        settings={"dropout": 0.05, "int8": True},
    ),
    Contestant(
        "lorikeet-full",
        "lorikeet_worker",
        "Lorikeet, full fine-tuning on float32 masters",
        method="full",
        settings={"method": "full"},
    ),
    Contestant(
        "trl-default",
        "trl_worker",
        "TRL's SFTTrainer at its defaults: float32 weights under bf16 autocast, gradient"
        " checkpointing; LoRA with dropout 0.05",
        peers=True,
        settings={"tuned": False, "dropout": 0.05},
    ),
    Contestant(
        "trl-tuned",
        "trl_worker",
        "the same with bf16 weights, without gradient checkpointing and dropout",
        peers=True,
        settings={"tuned": True, "dropout": 0.0},
    ),
    Contestant(
        "peft-tuned",
        "peft_worker",
        "a bare PEFT loop: bf16 weights and adapters, no dropout",
        peers=True,
        settings={"method": "lora"},
    ),
    Contestant(
        "peft-full",
        "peft_worker",
        "the same bare loop, full fine-tuning of bf16 weights",
        peers=True,
        method="full",
        settings={"method": "full"},
    ),
]

CONTESTANTS = {contestant.name: contestant for contestant in _ALL}

DEFAULT = ["lorikeet", "trl-default", "trl-tuned", "peft-tuned", "peft-full"]
"""Who takes part when nobody is named; the first is what the others are compared with."""

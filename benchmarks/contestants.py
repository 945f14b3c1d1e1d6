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
        environment: whose interpreter runs it.
        method: what it trains, which decides on its roofline; None trains nothing.
        devices: where it can take part.
        settings: what its worker is told.
    """

    name: str
    worker: str
    about: str
    environment: Literal["lorikeet", "peers", "unsloth"] = "lorikeet"
    method: Literal["lora", "full"] | None = "lora"
    devices: tuple[str, ...] = ("cpu", "cuda")
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
        "lorikeet-dora",
        "lorikeet_worker",
        "Lorikeet, DoRA without dropout",
        settings={"dropout": 0.0, "dora": True},
    ),
    Contestant(
        "lorikeet-dora-off",
        "lorikeet_worker",
        "the same with `fast` off",
        settings={"dropout": 0.0, "dora": True, "fast": "off"},
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
        environment="peers",
        settings={"tuned": False, "dropout": 0.05},
    ),
    Contestant(
        "trl-tuned",
        "trl_worker",
        "the same with bf16 weights, without gradient checkpointing and dropout",
        environment="peers",
        settings={"tuned": True, "dropout": 0.0},
    ),
    Contestant(
        "peft-tuned",
        "peft_worker",
        "a bare PEFT loop: bf16 weights and adapters, no dropout",
        environment="peers",
        settings={"method": "lora", "autocast_adapter_dtype": False},
    ),
    Contestant(
        "peft-dora",
        "peft_worker",
        "the same bare loop with DoRA",
        environment="peers",
        settings={"method": "lora", "autocast_adapter_dtype": False, "use_dora": True},
    ),
    Contestant(
        "peft-default",
        "peft_worker",
        "the same bare loop with PEFT's own choice of adapters in float32",
        environment="peers",
        settings={"method": "lora", "autocast_adapter_dtype": True},
    ),
    Contestant(
        "peft-full",
        "peft_worker",
        "the same bare loop, full fine-tuning of bf16 weights",
        environment="peers",
        method="full",
        settings={"method": "full"},
    ),
    Contestant(
        "unsloth-default",
        "unsloth_worker",
        "Unsloth's model in the same bare loop, 16 bit, with its own gradient checkpointing",
        environment="unsloth",
        devices=("cuda",),
        settings={"use_gradient_checkpointing": "unsloth"},
    ),
    Contestant(
        "unsloth-tuned",
        "unsloth_worker",
        "the same without gradient checkpointing",
        environment="unsloth",
        devices=("cuda",),
        settings={"use_gradient_checkpointing": False},
    ),
]

CONTESTANTS = {contestant.name: contestant for contestant in _ALL}

DEFAULT = {
    "cpu": ["lorikeet", "trl-default", "trl-tuned", "peft-tuned", "peft-full"],
    "cuda": [
        "lorikeet",
        "lorikeet-full",
        "peft-default",
        "peft-tuned",
        "unsloth-default",
        "unsloth-tuned",
        "trl-default",
        "trl-tuned",
    ],
}
"""Who takes part on a device when nobody is named; the others are compared with the first."""

"""Every option of Lorikeet, declared once: type, default, bounds and help.

A declaration here is at the same time the key of `run.yaml`, the flag (`--lora.r 8`) and the help
text. `load_config` merges a file and flags, and reports every problem at once.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from lorikeet.errors import ConfigError


def _split_commas(value: object) -> object:
    """A flag gives `a,b`; a YAML file gives a list."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return value


def _parse_mapping(value: object) -> object:
    """A flag gives `{q_proj: 8}` or `q_proj=8,k_proj=4`; a YAML file gives a mapping."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("{"):
        return yaml.safe_load(value)
    return dict(part.split("=", 1) for part in value.split(",") if "=" in part)


def _parse_layers(value: object) -> object:
    """`2-5` means layers 2, 3, 4 and 5; `0,3` and lists of integers are taken as they are."""
    if isinstance(value, int):
        return [value]
    if not isinstance(value, str):
        return value
    layers: list[int] = []
    for part in value.split(","):
        first, _, last = part.partition("-")
        if not (first.strip().isdigit() and (not last or last.strip().isdigit())):
            raise ValueError(f"expected layers such as '0,3' or '2-5', found {value!r}")
        layers.extend(range(int(first), int(last or first) + 1))
    return layers


def _targets(value: object) -> object:
    """A single name stays a string when it is `all-linear` or a regular expression."""
    parts = _split_commas(value)
    if isinstance(value, str) and (value == "all-linear" or not _is_name_list(value)):
        return value
    return parts


def _is_name_list(value: str) -> bool:
    return all(c.isalnum() or c in "_,. " for c in value)


Names = Annotated[list[str], BeforeValidator(_split_commas)]
Targets = Annotated[str | list[str], BeforeValidator(_targets)]
Layers = Annotated[list[int], BeforeValidator(_parse_layers)]
IntMap = Annotated[dict[str, int], BeforeValidator(_parse_mapping)]
FloatMap = Annotated[dict[str, float], BeforeValidator(_parse_mapping)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_assignment=True, protected_namespaces=())


class ModelConfig(_Section):
    """The base model and the machine that runs it."""

    path: str = Field("", description="model folder, or a hub id such as org/name")
    revision: str | None = Field(None, description="hub revision: branch, tag or commit")
    dtype: Literal["auto", "bf16", "fp32", "fp16"] = Field(
        "auto",
        description="compute type of the weights; auto takes bf16 where the machine multiplies it"
        " natively, else fp32",
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    threads: int | None = Field(None, ge=1, description="CPU threads; all cores if not given")
    trust_remote_code: bool = Field(False, description="run Python code that the model repository ships")


class LoraConfig(_Section):
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685)."""

    r: int = Field(16, ge=1, description="rank of every update")
    alpha: float = Field(
        16.0,
        gt=0,
        alias="lora_alpha",
        description="the update is scaled by alpha / r (alpha / sqrt(r) with rslora)",
    )
    dropout: float = Field(
        0.0, ge=0, lt=1, alias="lora_dropout", description="dropout on the adapter's input"
    )
    target_modules: Targets = Field(
        "all-linear",
        description="module names (a,b), a regular expression matched against full names, or"
        " all-linear: every linear layer but the output head",
    )
    exclude_modules: Targets | None = Field(
        None, description="names or a regular expression that are never targets"
    )
    layers: Layers | None = Field(
        None, alias="layers_to_transform", description="block numbers to adapt: 0,3 or 2-5"
    )
    rank_pattern: IntMap = Field(
        default_factory=dict, description="rank per module: name or regular expression = rank"
    )
    alpha_pattern: FloatMap = Field(
        default_factory=dict, description="alpha per module: name or regular expression = alpha"
    )
    rslora: bool = Field(
        False, alias="use_rslora", description="rank-stabilised scaling, alpha / sqrt(r)"
    )
    init: Literal["kaiming", "gaussian"] = Field(
        "kaiming", description="how A starts: kaiming as PEFT, or gaussian; B starts at zero"
    )


class DataConfig(_Section):
    """What is trained on, and how a row becomes tokens."""

    path: str = Field("", description="jsonl, json, csv, parquet or txt file, or a hub data set")
    split: str = Field("train", description="split of a hub data set")
    limit: int | None = Field(None, ge=1, description="use the first N rows only")
    max_length: int = Field(512, ge=8, description="longest example, in tokens")
    template: str = Field(
        "auto",
        description="auto, chat (the tokenizer's own), instruction-response, alpaca, or a Jinja file",
    )
    supervise: Literal["all", "last", "everything"] = Field(
        "all",
        description="which tokens count: all completions, the last completion, or everything",
    )
    validation: float | str = Field(
        0.1, description="share of rows held out (0 for none), or a file of its own"
    )


class TrainConfig(_Section):
    """The training run."""

    method: Literal["lora", "full"] = Field("lora", description="train adapters, or every weight")
    batch_size: int = Field(8, ge=1, description="examples per optimizer step")
    epochs: float = Field(1.0, gt=0, description="passes over the data, if max_steps is not given")
    max_steps: int | None = Field(None, ge=1, description="optimizer steps; overrides epochs")
    learning_rate: float | None = Field(
        None, gt=0, description="peak learning rate; 2e-4 for lora, 2e-5 for full if not given"
    )
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="what the learning rate does after warm-up"
    )
    warmup: float = Field(
        0.03, ge=0, description="warm-up: a share of all steps if below 1, else a number of steps"
    )
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay of AdamW")
    max_grad_norm: float = Field(1.0, ge=0, description="gradient clipping; 0 for none")
    seed: int = Field(0, ge=0, description="seeds adapters, data order, split and dropout")
    max_tokens: int = Field(
        4096, ge=8, description="tokens per packed micro-batch; changes memory, not the result"
    )
    eval_every: int | None = Field(None, ge=1, description="steps between evaluations")
    save_every: int | None = Field(None, ge=1, description="steps between checkpoints")
    keep_last: int = Field(2, ge=1, description="checkpoints kept")
    patience: int | None = Field(
        None, ge=1, description="stop after this many evaluations without improvement"
    )
    tensorboard: bool = Field(False, description="also write TensorBoard event files")


class RunConfig(_Section):
    """A complete run: what `run.yaml` holds and what `config.yaml` in a run folder repeats."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    lora: LoraConfig = Field(default_factory=LoraConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    out: str | None = Field(None, description="run folder")

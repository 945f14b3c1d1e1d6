"""What a run will need, before anything runs: parameters, memory, time.

Parameters are counted and activations added up on the meta device; the time of a step is that of
one real block of this shape on this machine, times the number of blocks, plus the head at the same
speed. Neither needs the model's weights.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from lorikeet import console
from lorikeet.config import RunConfig
from lorikeet.data import Example, prepare
from lorikeet.kernels.loss import chunk_bytes
from lorikeet.lora import ParameterReport, grow_vocabulary, inject, parameter_report
from lorikeet.model import (
    FastNll,
    TokenNll,
    check_texts,
    choose,
    empty_model,
    load_tokenizer,
)
from lorikeet.model.agreement import choose_nll
from lorikeet.model.budget import measure, saved_by_block
from lorikeet.model.footprint import block_model, saved_bytes_per_token, seconds_per_block
from lorikeet.model.packing import enable_packing

_LENGTH = 256  # tokens of a row that is run to measure
_LOGIT_COPIES = 3  # float32 logits, their log-softmax, the gradient


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a step.

    Attributes:
        weights: the base model in its compute type.
        adapter: float32 masters of A and B.
        optimizer: AdamW's two moments, gradients, and masters of a low-precision full run.
        activations: what autograd keeps of the largest micro-batch.
        logits: the head's output on supervised rows, with its gradient.
    """

    weights: int
    adapter: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Workload:
    """Tokens of an average step and of its largest micro-batch."""

    step_tokens: float
    step_supervised: float
    micro_tokens: int
    micro_supervised: int


@dataclass(frozen=True)
class Plan:
    """The answer: see `summary`."""

    parameters: ParameterReport
    memory: Memory
    workload: Workload
    seconds_per_step: float
    dtype: str

    def summary(self) -> dict[str, Any]:
        """The figures as a JSON-ready dict; memory in bytes."""
        return {
            "base": self.parameters.base,
            "trainable": self.parameters.trainable,
            "percent": self.parameters.percent,
            "by_target": self.parameters.by_target,
            "memory": {**asdict(self.memory), "total": self.memory.total},
            "seconds_per_step": self.seconds_per_step,
            "tokens_per_step": self.workload.step_tokens,
            "dtype": self.dtype,
        }


def plan(config: RunConfig) -> Plan:
    """Plan a run. Without `data.path` every example is taken to be `data.max_length` long.

    Raises:
        InputError: the model's configuration cannot be read, or a target matches nothing.
    """
    config.require("model.path")
    machine = choose(
        device=config.model.device, dtype=config.model.dtype, threads=config.model.threads
    )
    model: Any = empty_model(
        config.model.path,
        dtype=machine.dtype_name,
        revision=config.model.revision,
        trust_remote_code=config.model.trust_remote_code,
    )
    tokenizer = _tokenizer(config) if config.data.path or config.lora.new_tokens else None
    grow_vocabulary(model, tokenizer, config.lora.new_tokens)
    _make_trainable(model, config)
    parameters = parameter_report(model)
    block = block_model(model, dtype=machine.dtype, device=machine.device)
    packing = enable_packing(block, device=machine.device)
    nll, _ = choose_nll(block, asked=config.model.fast, packing=packing)
    workload = _workload(config, model, tokenizer, packing=packing)
    without_tokens = {"trainable_tokens": None, "new_tokens": None}  # its vocabulary is another
    lora = config.lora.model_copy(update=without_tokens)
    _make_trainable(block, config.model_copy(update={"lora": lora}))
    memory = _memory(
        parameters,
        config,
        size=machine.dtype.itemsize,
        activations=_activations(model, block, nll, workload, packing=packing),
        logits=_logits(model, nll, workload, size=machine.dtype.itemsize),
    )
    tokens = min(_LENGTH, config.data.max_length)
    block_time = seconds_per_block(block, nll, tokens=tokens) / tokens
    seconds = _seconds(model, block, block_time, workload)
    return Plan(parameters, memory, workload, seconds, machine.dtype_name)


def _make_trainable(model: nn.Module, config: RunConfig) -> None:
    if config.train.method == "lora":
        inject(model, config.lora, seed=config.train.seed)
    else:
        model.requires_grad_(True)


def _tokenizer(config: RunConfig) -> Any:
    return load_tokenizer(
        config.model.path,
        revision=config.model.revision,
        trust_remote_code=config.model.trust_remote_code,
    )


def _workload(config: RunConfig, model: Any, tokenizer: Any, *, packing: bool) -> Workload:
    batch, longest = config.train.batch_size, config.data.max_length
    budget = config.train.max_tokens if packing else 0  # else a micro-batch is one document
    if not config.data.path:
        step = batch * longest
        micro = min(step, max(budget // longest, 1) * longest)
        return Workload(step, step, micro, micro)
    prepared = prepare(config.data, tokenizer, seed=config.train.seed)
    examples = prepared.train
    for warning in check_texts(model, prepared.ids):
        console.warn(warning)
    lengths = sum(len(example.ids) for example in examples) / len(examples)
    supervised = sum(example.supervised_tokens for example in examples) / len(examples)
    micro = int(min(batch * _longest(examples), max(budget, _longest(examples))))
    return Workload(batch * lengths, batch * supervised, micro, int(micro * supervised / lengths))


def _longest(examples: list[Example]) -> int:
    return max(len(example.ids) for example in examples)


def _activations(
    model: Any, block: Any, nll: TokenNll, workload: Workload, *, packing: bool
) -> int:
    """Bytes that are kept for the backward pass of the largest micro-batch."""
    blocks, tokens = model.config.num_hidden_layers, workload.micro_tokens
    if isinstance(nll, FastNll):
        of_block = saved_by_block(block, nll)
        of_head = measure(block, nll).token - of_block  # by every supervised row
        return blocks * of_block * tokens + of_head * workload.micro_supervised
    length = _LENGTH if packing else tokens  # of what grows with its square, the real one
    try:
        return saved_bytes_per_token(model, tokens=length, packing=packing) * tokens
    except RuntimeError:  # it chooses by values (experts, angles), so a block with values is run
        return blocks * saved_bytes_per_token(block, tokens=length, packing=False) * tokens


def _logits(model: Any, nll: TokenNll, workload: Workload, *, size: int) -> int:
    """Bytes of logits: a chunk and its product on the fast path, else of all supervised rows."""
    head = model.get_output_embeddings()
    vocabulary = head.weight.shape[0]
    if isinstance(nll, FastNll) and type(head) is nn.Linear:  # no adapter, no trained tokens
        return min(chunk_bytes(head.weight), size * vocabulary * workload.micro_supervised)
    return workload.micro_supervised * vocabulary * (4 * _LOGIT_COPIES + (size if size < 4 else 0))


def _memory(
    parameters: ParameterReport,
    config: RunConfig,
    *,
    size: int,
    activations: int,
    logits: int,
) -> Memory:
    full = config.train.method == "full"
    trainable = parameters.trainable
    masters = 4 * trainable if full and size < 4 else 0
    gradients = 4 * trainable + (size * trainable if masters else 0)
    return Memory(
        weights=size * parameters.base,
        adapter=0 if full else 4 * trainable,
        optimizer=8 * trainable + masters + gradients,
        activations=activations,
        logits=logits,
    )


def _seconds(model: Any, block: Any, block_time: float, workload: Workload) -> float:
    """Seconds of an average step from the seconds that one block takes for a token."""
    head = model.get_output_embeddings().weight
    block_size = sum(p.numel() for p in block.base_model.parameters())
    head_time = block_time * head.numel() / block_size
    blocks = model.config.num_hidden_layers * block_time * workload.step_tokens
    return blocks + head_time * workload.step_supervised

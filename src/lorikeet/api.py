"""The Python API: load a model, add LoRA, fit, evaluate, save.

    from lorikeet.api import *

    base = load_model("HuggingFaceTB/SmolLM2-135M-Instruct")
    data = load_data(base, DataConfig(path="rows.jsonl"))
    before = evaluate(base, data.validation)
    lora = add_lora(base, LoraConfig(r=16, alpha=16))
    fit(base, data.train, TrainConfig(max_steps=50, learning_rate=2e-4))
    print(paired_difference(evaluate(base, data.validation), before))
    save_adapter(base, "my-adapter", lora)

Thin on purpose: each function hands a loaded base and declared options to the part that works.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lorikeet.evaluate
from lorikeet import adapters, console, data, train
from lorikeet.adapters import hub
from lorikeet.config import DataConfig, LoraConfig, TrainConfig
from lorikeet.data import Example, Message, Prepared, Renderer
from lorikeet.errors import AdapterError
from lorikeet.evaluate import Score, paired_difference
from lorikeet.lora import grow_vocabulary, inject, parameter_report, unseen_tokens
from lorikeet.model import Base, check_texts, load_model

__all__ = [
    "DataConfig",
    "LoraConfig",
    "TrainConfig",
    "add_lora",
    "answer",
    "evaluate",
    "fit",
    "load_adapter",
    "load_data",
    "load_model",
    "paired_difference",
    "parameter_report",
    "push_to_hub",
    "save_adapter",
]


def load_data(base: Base, config: DataConfig, *, seed: int = 0) -> Prepared:
    """Read, split and render a data file for a model; refuse data that would train nothing.

    Args:
        base: from `load_model`; its tokenizer and template render the rows.
        config: path, length, template, what is supervised, what is held out.
        seed: of the split.

    Raises:
        DataError: with every problem of the file.
    """
    prepared = data.prepare(config, base.tokenizer, seed=seed)
    warnings = data.preflight(prepared, tokenizer=base.tokenizer, max_length=config.max_length)
    for warning in warnings:
        console.warn(warning)
    for warning in check_texts(base.model, prepared.ids):
        console.warn(warning)
    return prepared


def add_lora(base: Base, config: LoraConfig, *, seed: int = 0) -> LoraConfig:
    """Freeze the model and put adapters into it; they change nothing until they are trained.

    With `config.new_tokens` model and tokenizer learn these first, for good; call `load_data` after
    that, so that the rows are split into them.

    Returns:
        `config`, for `save_adapter`.

    Raises:
        AdapterError: a target matches nothing, the model carries adapters already, or a text
            cannot become a token.
    """
    grow_vocabulary(base.model, base.tokenizer, config.new_tokens)
    inject(base.model, config, seed=seed)
    return config


def fit(
    base: Base,
    examples: Sequence[Example],
    config: TrainConfig,
    *,
    record: Callable[[dict[str, Any]], None] = lambda line: None,
) -> train.TrainState:
    """Train what requires a gradient: the adapters, or everything with `config.method` "full".

    Args:
        base: the model.
        examples: `load_data(...).train`.
        config: batch size, steps, learning rate, seed.
        record: gets a dict of figures after every step.

    Raises:
        TrainingError: nothing would be learnt, or the loss is not finite.
    """
    for warning in unseen_tokens(base.model, (example.ids for example in examples)):
        console.warn(warning)
    if config.method == "full":
        base.model.requires_grad_(True)
    setup = train.set_up(base.model, examples, config, packing=base.packing, nll=base.nll)
    return train.fit(
        base.model,
        setup.optimizer,
        setup.steps,
        learning_rate=setup.schedule,
        total_steps=setup.total_steps,
        loss=setup.loss,
        hooks=train.Hooks(record=record),
    )


def evaluate(base: Base, examples: Sequence[Example]) -> Score:
    """Token-exact loss, perplexity and bits per byte, with the standard error over documents."""
    return lorikeet.evaluate.evaluate(base.model, examples, packing=base.packing, nll=base.nll)


def answer(base: Base, prompts: Sequence[str], *, max_new_tokens: int = 128) -> list[str]:
    """Greedy answers to user messages, rendered with the model's own template."""
    renderer = Renderer(base.tokenizer)
    messages: list[list[Message]] = [[{"role": "user", "content": text}] for text in prompts]
    return lorikeet.evaluate.answer(
        base.model,
        renderer,
        [renderer.prompt(message) for message in messages],
        max_new_tokens=max_new_tokens,
    )


def save_adapter(base: Base, folder: str | Path, config: LoraConfig) -> None:
    """Write the adapter in PEFT's format, with the tokenizer beside it.

    Raises:
        AdapterError: the model carries no adapter, or not the one that `config` describes.
        StorageError: the disk refused a write.
    """
    adapters.save_adapter(
        base.model,
        Path(folder),
        config=config,
        base_model=base.path,
        provenance=base.identity,
        tokenizer=base.tokenizer,
    )


def load_adapter(
    base: Base, folder: str | Path, *, allow_mismatch: bool = False
) -> adapters.AdapterInfo:
    """Put a saved adapter into the model: every tensor in its place, or an error.

    New tokens that the adapter brings are the base's from then on, with or without it.

    Args:
        base: the model; it must be the one that the adapter was trained on, as far as the adapter
            says, and so must its tokenizer.
        folder: the adapter.
        allow_mismatch: only warn of another base or tokenizer.

    Raises:
        AdapterError: the folder cannot be read or does not fit, or the adapter changes nothing;
            lists every problem.
    """
    info = adapters.read_adapter_config(Path(folder))
    differences = adapters.mismatches(info.provenance, **base.identity)
    if differences and not allow_mismatch:
        raise AdapterError(f"the adapter in {folder} does not belong to this model:", differences)
    for difference in differences:
        console.warn(f"the adapter in {folder}: {difference}")
    adapters.load_adapter(base.model, Path(folder), tokenizer=base.tokenizer)
    probe = Renderer(base.tokenizer).prompt([{"role": "user", "content": adapters.PROBE}])
    console.note(f"the adapter is applied: {adapters.logit_shift(base.model, probe)}")
    return info


def push_to_hub(
    folder: str | Path, repo_id: str, *, private: bool = False, token: str | None = None
) -> str:
    """Upload an adapter folder to the Hugging Face hub.

    Args:
        folder: the adapter; it is checked before anything is sent.
        repo_id: `owner/name`; the repository is made where there is none.
        private: make a new repository private.
        token: a hub token with write access; that of `hf auth login` or HF_TOKEN if not given.

    Returns:
        The repository's address.

    Raises:
        AdapterError: the adapter is broken, or the hub cannot be reached or refuses.
        ConfigError: `repo_id` cannot be a name on the hub.
    """
    return hub.push_to_hub(Path(folder), repo_id, private=private, token=token)

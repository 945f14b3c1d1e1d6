"""The model that a verb works on: a base, perhaps with an adapter, and how it is prompted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lorikeet import console
from lorikeet.adapters import (
    PROBE,
    AdapterInfo,
    load_adapter,
    logit_shift,
    mismatches,
    read_adapter_config,
)
from lorikeet.config import RunConfig
from lorikeet.data import Prepared, Renderer, Tokenizer
from lorikeet.errors import AdapterError
from lorikeet.evaluate import Sample, answer
from lorikeet.lora import disabled
from lorikeet.model import Base, load_model
from lorikeet.study.samples import questions


@dataclass(frozen=True)
class Subject:
    """A loaded model with its renderer; `adapter` is None for a base alone."""

    base: Base
    renderer: Renderer
    adapter: AdapterInfo | None


def load_subject(
    config: RunConfig, adapter: Path | None, *, allow_mismatch: bool = False
) -> Subject:
    """Load what `--model` and `--adapter` name, and say how far the adapter moves the logits.

    The base defaults to the one that the adapter names, the template to the one it was trained
    with. New tokens that the adapter brings are the base's from then on.

    Args:
        config: the options.
        adapter: its folder, or None.
        allow_mismatch: only warn of another base, tokenizer or template than it was trained with.

    Raises:
        InputError: model or adapter cannot be loaded, do not belong together, or the adapter
            changes nothing.
    """
    info = read_adapter_config(adapter) if adapter else None
    path = config.model.path or (info.base_model if info else "")
    if not path:
        config.require("model.path")
    base = load_model(
        path,
        dtype=config.model.dtype,
        device=config.model.device,
        threads=config.model.threads,
        fast=config.model.fast,
        revision=config.model.revision,
        trust_remote_code=config.model.trust_remote_code,
    )
    if info and config.data.template == "auto":
        config.data.template = trained_template(info)
    renderer = renderer_of(base.tokenizer, config)
    if info and adapter:
        _check_match(info, base, renderer, allow=allow_mismatch)
        load_adapter(base.model, adapter, tokenizer=base.tokenizer)
        renderer = renderer_of(base.tokenizer, config)  # the tokenizer may have learnt tokens
        shift = logit_shift(base.model, renderer.prompt([{"role": "user", "content": PROBE}]))
        console.note(f"the adapter is applied: {shift}")
    return Subject(base, renderer, info)


def renderer_of(tokenizer: Tokenizer, config: RunConfig) -> Renderer:
    """The renderer that the section `data` asks for."""
    return Renderer(
        tokenizer,
        template=config.data.template,
        max_length=config.data.max_length,
        supervise=config.data.supervise,
    )


def trained_template(info: AdapterInfo) -> str:
    """The built-in template that the adapter was trained with; `auto` for a file of the user's."""
    name = info.provenance.get("template", "auto")
    return name if name in ("chat", "instruction-response", "alpaca") else "auto"


def _check_match(info: AdapterInfo, base: Base, renderer: Renderer, *, allow: bool) -> None:
    found = base.identity
    if info.provenance.get("template") != "none":
        found["template_hash"] = renderer.template_hash
    differences = mismatches(info.provenance, **found)
    if differences and not allow:
        raise AdapterError(
            "the adapter does not belong to what it is to run with (--allow-mismatch makes this a"
            " warning):",
            differences,
        )
    for difference in differences:
        console.warn(f"the adapter: {difference}")


def answer_side_by_side(subject: Subject, prepared: Prepared, *, n: int) -> list[Sample]:
    """Answer rows of the data; with an adapter also with the base alone."""
    model, renderer = subject.base.model, subject.renderer
    asked = questions(prepared, renderer, n=n)
    prompts = [ids for _, _, ids in asked]
    answers = {"adapter" if subject.adapter else "model": answer(model, renderer, prompts)}
    if subject.adapter:
        with disabled(model):
            answers = {"base": answer(model, renderer, prompts), **answers}
    return [
        Sample(prompt, reference, {name: texts[i] for name, texts in answers.items()})
        for i, (prompt, reference, _) in enumerate(asked)
    ]


def adapter_folder(text: str | None) -> Path | None:
    """The folder that `--adapter` names: an adapter, or a run folder that holds one.

    Raises:
        AdapterError: there is no adapter.
    """
    if text is None:
        return None
    for path in (Path(text), Path(text) / "adapter"):
        if (path / "adapter_config.json").is_file():
            return path
    raise AdapterError(
        f"there is no adapter in {text}: expected a folder with adapter_config.json,"
        " or a run folder with one in its folder adapter/"
    )

"""The model that a verb works on: a base, perhaps with an adapter, and how it is prompted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lorikeet import console
from lorikeet.adapters import AdapterInfo, load_adapter, read_adapter_config
from lorikeet.config import RunConfig
from lorikeet.data import Prepared, Renderer
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


def load_subject(config: RunConfig, adapter: Path | None) -> Subject:
    """Load what `--model` and `--adapter` name.

    The base defaults to the one that the adapter names, the template to the one it was trained
    with. A base with other weights, or another template, is said.

    Raises:
        InputError: model or adapter cannot be loaded.
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
        config.data.template = _trained_template(info)
    renderer = Renderer(
        base.tokenizer,
        template=config.data.template,
        max_length=config.data.max_length,
        supervise=config.data.supervise,
    )
    if info and adapter:
        _warn_of_mismatch(info, base, renderer)
        load_adapter(base.model, adapter)
    return Subject(base, renderer, info)


def _trained_template(info: AdapterInfo) -> str:
    """The built-in template that the adapter was trained with; `auto` for a file of the user's."""
    name = info.provenance.get("template", "auto")
    return name if name in ("chat", "instruction-response", "alpaca") else "auto"


def _warn_of_mismatch(info: AdapterInfo, base: Base, renderer: Renderer) -> None:
    trained_on = info.provenance.get("base_fingerprint")
    if trained_on and trained_on != base.fingerprint:
        console.warn(
            f"the adapter was trained on other weights (fingerprint {trained_on[:12]}) than those"
            f" in {base.path} ({base.fingerprint[:12]})"
        )
    template = info.provenance.get("template_hash")
    if info.provenance.get("template") != "none" and template not in (None, renderer.template_hash):
        console.warn(
            f"the adapter was trained with the template {info.provenance.get('template')!r}; now"
            f" prompts are rendered with {renderer.template_name!r}"
        )


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

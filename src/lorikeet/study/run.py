"""One run from options to a finished run folder: load, prepare, train, evaluate, save."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lorikeet import console
from lorikeet.adapters import read_adapter_config, save_adapter
from lorikeet.adapters.card import CARD_FILE, Outcome, card
from lorikeet.config import RunConfig
from lorikeet.data import Example, Prepared, Renderer, preflight, prepare
from lorikeet.errors import ConfigError, ModelError
from lorikeet.evaluate import Score, evaluate, paired_difference
from lorikeet.evaluate.samples import Sample, answer
from lorikeet.files import atomic_folder, write_text
from lorikeet.lora import (
    ParameterReport,
    grow_vocabulary,
    inject,
    out_of_reach,
    parameter_report,
    unseen_tokens,
)
from lorikeet.model import Base, check_texts, load_model
from lorikeet.study.folder import RunFolder
from lorikeet.study.progress import StepProgress
from lorikeet.study.receipt import provenance, write_results
from lorikeet.study.result import RunResult
from lorikeet.study.samples import questions
from lorikeet.train import (
    Checkpoints,
    Hooks,
    MetricsLog,
    Setup,
    Sparing,
    TensorBoard,
    TrainState,
    fit,
    read_metrics,
    set_up,
)

SAMPLES = 3
"""Validation prompts that are answered before and after training."""

SEEN = 100
"""Most training documents that are scored before and after training, to show over-fitting."""


def train_run(config: RunConfig, *, resume: bool = False, label: str = "training") -> RunResult:
    """Do a whole run.

    Nothing is written before the model, the data and the targets have proven to fit.

    Args:
        config: the options; `model.path`, `data.path` and `out` are needed.
        resume: go on with the run in `out` from its newest checkpoint.
        label: what the progress bar calls it.

    Raises:
        InputError: anything wrong with the input, the machine or the disk.
    """
    config.require("model.path", "data.path", "out")
    folder = RunFolder(str(config.out))
    folder.check(config, resume=resume)
    if unused := config.unused():
        console.warn(f"--method full trains every weight: {', '.join(unused)} change nothing")
    base, prepared, renderer = load(config)
    return run_on(base, prepared, renderer, config, label=label, announce=console.note)


@dataclass(frozen=True)
class View:
    """What a model makes of the rows of a run.

    Attributes:
        score: on the validation rows; None without any.
        answers: to the first of them (`questions`).
    """

    score: Score | None
    answers: list[str]


def look(base: Base, prepared: Prepared, renderer: Renderer, *, max_tokens: int) -> View:
    """Measure and ask the model as it is now."""
    asked = questions(prepared, renderer, n=SAMPLES)
    return View(
        score(base, prepared.validation, max_tokens=max_tokens),
        answer(base.model, renderer, [ids for _, _, ids in asked]),
    )


def run_on(
    base: Base,
    prepared: Prepared,
    renderer: Renderer,
    config: RunConfig,
    *,
    label: str = "training",
    announce: Callable[[str], None] = lambda text: None,
    before: View | None = None,
    sparing: bool = False,
) -> RunResult:
    """Do a run on a loaded model, which keeps what it learnt.

    Args:
        base: the model; it carries nothing yet.
        prepared: the data.
        renderer: made the data.
        config: the options; `out` is a folder that has been checked.
        label: what the progress bar calls it.
        announce: gets a few lines on what is about to be done.
        before: what is known of the base on these validation rows; found out if None.
        sparing: without `train.save_every`, save as often as costs next to nothing.
    """
    folder = RunFolder(str(config.out))
    parameters = make_trainable(base, config)
    setup = set_up(base.model, prepared.train, config.train, packing=base.packing, nll=base.nll)
    if config.train.patience and not prepared.validation:
        raise ConfigError(
            "train.patience needs validation rows, and none are held out: give more rows, or a"
            " file of its own with --data.validation"
        )
    if setup.schedule.warmup_steps >= setup.total_steps:
        console.warn(
            f"the warm-up ({setup.schedule.warmup_steps} steps) is as long as the run"
            f" ({setup.total_steps}): the learning rate never gets to {config.train.peak:g};"
            " lower --train.warmup"
        )
    announce(_announcement(base, prepared, parameters, setup, config))
    inputs = identify(base, prepared)
    folder.check_inputs(inputs)
    before = before or look(base, prepared, renderer, max_tokens=setup.steps.max_tokens)
    if before.score and not math.isfinite(before.score.nll):
        raise ModelError(
            f"the loss of {base.path} on the held-out rows is {before.score.nll} before any"
            " training: its weights are damaged, or too large for --model.dtype"
            f" {base.machine.dtype_name}"
        )
    folder.claim(config, inputs)
    seen = _seen(prepared, setup)
    seen_before = score(base, seen, max_tokens=setup.steps.max_tokens)
    validate = _validator(base, prepared, setup)
    state = _train(base, config, setup, folder, label=label, validate=validate, sparing=sparing)
    after = look(base, prepared, renderer, max_tokens=setup.steps.max_tokens)
    method = config.train.method
    result = RunResult(
        folder=folder,
        parameters=parameters,
        state=state,
        base=before.score,
        tuned=after.score,
        samples=[
            Sample(prompt, reference, {"base": first, method: last})
            for (prompt, reference, _), first, last in zip(
                questions(prepared, renderer, n=SAMPLES), before.answers, after.answers, strict=True
            )
        ],
        seconds=sum(line.get("seconds", 0.0) for line in read_metrics(folder.metrics)),
        seen_base=seen_before,
        seen_tuned=score(base, seen, max_tokens=setup.steps.max_tokens),
    )
    save_tuned(base, config, folder, provenance(base, prepared, config))
    if method == "lora":
        write_card(result, prepared, config)
    write_results(result, base, prepared, config)
    return result


def load(config: RunConfig) -> tuple[Base, Prepared, Renderer]:
    """Load the model and the data that the options name, and check the data.

    Raises:
        InputError: either cannot be loaded, or there is nothing to learn from the data.
    """
    base = load_base(config)
    prepared = prepare(config.data, base.tokenizer, seed=config.train.seed)
    for warning in preflight(prepared, tokenizer=base.tokenizer, max_length=config.data.max_length):
        console.warn(warning)
    for warning in check_texts(base.model, prepared.ids):
        console.warn(warning)
    for warning in unseen_tokens(base.model, (example.ids for example in prepared.train)):
        console.warn(warning)
    renderer = Renderer(
        base.tokenizer, template=config.data.template, max_length=config.data.max_length
    )
    return base, prepared, renderer


def load_base(config: RunConfig) -> Base:
    """Load the model that the options name, with the new tokens that they name.

    Raises:
        ModelError: there is none, or it is broken.
        AdapterError: texts that cannot become tokens.
        ConfigError: the device or dtype is not to be had here.
    """
    base = load_model(
        config.model.path,
        dtype=config.model.dtype,
        device=config.model.device,
        threads=config.model.threads,
        fast=config.model.fast,
        revision=config.model.revision,
        trust_remote_code=config.model.trust_remote_code,
    )
    grow_vocabulary(base.model, base.tokenizer, config.lora.new_tokens)
    return base


def make_trainable(base: Base, config: RunConfig) -> ParameterReport:
    """Inject adapters, or free every weight; report what will be trained."""
    if config.train.method == "lora":
        for warning in out_of_reach(base.model, config.lora):
            console.warn(warning)
        inject(base.model, config.lora, seed=config.train.seed)
    else:
        base.model.requires_grad_(True)
    return parameter_report(base.model)


def score(base: Base, examples: Sequence[Example], *, max_tokens: int) -> Score | None:
    """The model as it is now on held-out rows; None without any."""
    if not examples:
        return None
    return evaluate(base.model, examples, max_tokens=max_tokens, packing=base.packing, nll=base.nll)


def _seen(prepared: Prepared, setup: Setup) -> list[Example]:
    """Some of what a run trains on; none without validation rows.

    They are spread over what the first epoch visits, as many as there are validation documents
    and at most `SEEN`: beside the validation rows they show how much of what was learnt carries
    over.
    """
    order = setup.steps.order
    steps = min(setup.total_steps, order.steps_per_epoch)
    visited = [index for step in range(steps) for index in order.indices(step)]
    n = min(SEEN, len(prepared.validation), len(visited))
    return [prepared.train[visited[i * len(visited) // n]] for i in range(n)]


def identify(base: Base, prepared: Prepared) -> dict[str, str | None]:
    """What a run stands on that its options cannot tell, by what it is called in an error."""
    return {
        "data": prepared.sha256,
        "validation data": prepared.validation_sha256,
        "weights of the base model": base.fingerprint,
        "template": prepared.template_hash,
    }


def save_tuned(base: Base, config: RunConfig, folder: RunFolder, made_by: dict[str, Any]) -> None:
    """Write what was trained: an adapter folder, or a whole model folder, with the tokenizer."""
    if config.train.method == "lora":
        save_adapter(
            base.model,
            folder.adapter,
            config=config.lora,
            base_model=base.path,
            provenance=made_by,
            tokenizer=base.tokenizer,
        )
        return
    with atomic_folder(folder.model) as draft:
        base.model.save_pretrained(str(draft))  # type: ignore[operator]
        base.tokenizer.save_pretrained(str(draft))


def write_card(result: RunResult, prepared: Prepared, config: RunConfig) -> None:
    """Write the model card into the adapter's folder."""
    base, tuned = result.base, result.tuned
    outcome = Outcome(
        steps=result.state.step,
        learning_rate=config.train.peak,
        batch_size=config.train.batch_size,
        rows=len(prepared.rows_train),
        base=base.summary() if base else None,
        tuned=tuned.summary() if tuned else None,
        difference=paired_difference(tuned, base).summary() if base and tuned else None,
    )
    folder = result.folder.adapter
    write_text(folder / CARD_FILE, card(read_adapter_config(folder), outcome=outcome))


def _train(
    base: Base,
    config: RunConfig,
    setup: Setup,
    folder: RunFolder,
    *,
    label: str,
    validate: Callable[[], float] | None,
    sparing: bool,
) -> TrainState:
    options = config.train
    checkpoints = Checkpoints(folder.checkpoints, keep_last=options.keep_last)
    state = checkpoints.restore(setup.optimizer) or TrainState()
    if state.step:
        console.note(f"resumed after step {state.step} of {setup.total_steps}")
    sinks: list[Callable[[dict[str, Any]], None]] = [
        MetricsLog(folder.metrics, resume_step=state.step)
    ]
    if options.tensorboard:
        sinks.append(TensorBoard(folder.tensorboard, resume_step=state.step))
    with StepProgress(label, setup.total_steps, done=state.step) as progress:
        sinks.append(progress)

        def record(line: dict[str, Any]) -> None:
            for sink in sinks:
                sink(line)

        def save(state: TrainState) -> None:
            checkpoints.save(state, setup.optimizer)

        often = sparing and options.save_every is None
        hooks = Hooks(
            record=record,
            validate=validate,
            eval_every=options.eval_every,
            save=Sparing(save, setup.total_steps) if often else save,
            save_every=1 if often else options.save_every,
            improved=(lambda _: checkpoints.save_best(setup.optimizer))
            if options.patience
            else None,
            patience=options.patience,
        )
        state = fit(
            base.model,
            setup.optimizer,
            setup.steps,
            learning_rate=setup.schedule,
            total_steps=setup.total_steps,
            loss=setup.loss,
            state=state,
            hooks=hooks,
        )
    if options.patience and state.best_step < state.step:
        checkpoints.restore_best(setup.optimizer)
        console.note(f"the weights of step {state.best_step} are kept: the best on validation")
    return state


def _validator(base: Base, prepared: Prepared, setup: Setup) -> Callable[[], float] | None:
    if not prepared.validation:
        return None

    def validate() -> float:
        scored = score(base, prepared.validation, max_tokens=setup.steps.max_tokens)
        assert scored is not None
        return scored.nll

    return validate


def _announcement(
    base: Base,
    prepared: Prepared,
    parameters: ParameterReport,
    setup: Setup,
    config: RunConfig,
) -> str:
    machine, report = base.machine, prepared.report
    rows = f"{report.rows:,} rows ({prepared.layout.name}, template {prepared.template_name})"
    train, held_out = len(prepared.train), len(prepared.validation)
    ignored = prepared.layout.ignored
    unused = f"; not used: {', '.join(ignored)}" if ignored else ""
    layout = "packed" if base.packing else "one document a row: this architecture cannot pack"
    return (
        f"model     {base.path}: {parameters.base:,} parameters,"
        f" {parameters.trainable:,} trainable ({parameters.percent:.2f} %)\n"
        f"machine   {machine.device}, {machine.dtype_name} ({machine.reason}),"
        f" {torch.get_num_threads()} threads\n"
        f"data      {rows}: {train:,} examples to train on, {held_out:,} held out{unused}\n"
        f"training  {setup.total_steps} steps of {setup.steps.order.batch_size} examples, {layout};"
        f" {base.path_taken}{', int8' * config.train.int8}"
        + (f"\nmemory    {setup.fit}" if setup.fit else "")
    )

"""One base model and one set of tokenised data, for trial after trial."""

from __future__ import annotations

import shutil
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from lorikeet import console
from lorikeet.config import DataConfig, RunConfig
from lorikeet.data import Example, Prepared, Renderer, preflight, prepare
from lorikeet.data.batch import permutation
from lorikeet.errors import ConfigError, LorikeetError
from lorikeet.evaluate import Score
from lorikeet.files import write_text
from lorikeet.lora import remove
from lorikeet.model import Base, fingerprint, forget_peak_memory, peak_memory
from lorikeet.study.folder import RunFolder
from lorikeet.study.protocol import Planned, Protocol, StudyFolder
from lorikeet.study.record import Cost, Question, Trial
from lorikeet.study.result import RunResult
from lorikeet.study.run import SAMPLES, View, identify, load_base, look, run_on, score
from lorikeet.study.samples import questions
from lorikeet.train import read_metrics

BASE = "base"
"""Name of the trial that trains nothing."""

OTHER = 200
"""Most documents of the second text that are scored, spread over all of it."""


@dataclass(frozen=True)
class HeldOut:
    """Rows that no trial trains on.

    Attributes:
        validation: what the runs see: their receipts and early stopping are about it.
        test: what results are about; the same rows where no choice is made by the others.
        other: the second text; empty for none.
    """

    validation: list[Example]
    test: list[Example]
    other: list[Example]


class Bench:
    """Does trials one after the other.

    The base model is loaded once and lent to each trial: adapters are taken out again, weights
    that were trained are put back, and what comes back is checked. Rows are tokenised once for
    every way of tokenising them.

    Args:
        protocol: what the trials share.
        folder: the study's folder.

    Raises:
        InputError: model or data cannot be loaded, or too little is held out.
    """

    def __init__(self, protocol: Protocol, folder: StudyFolder) -> None:
        self.protocol = protocol
        self.folder = folder
        self.loads = {"base": 0, "data": 0}
        self._base: tuple[str, Base] | None = None
        self._data: dict[str, Prepared] = {}
        self._views: dict[str, View] = {}
        config = protocol.config
        base = self._loaded(config)
        prepared = self._prepared(config.data, base)
        warnings = preflight(prepared, tokenizer=base.tokenizer, max_length=config.data.max_length)
        for warning in warnings:
            console.warn(warning)
        self.renderer = Renderer(
            base.tokenizer,
            template=config.data.template,
            max_length=config.data.max_length,
            supervise=config.data.supervise,
        )
        self._shared, self.held_out = _hold_out(protocol, prepared, self._other(base))
        asked = questions(self._shared, self.renderer, n=SAMPLES)
        folder.stand_on(
            {**identify(base, prepared), **_facts(base, prepared, self.held_out)},
            [Question(prompt, reference) for prompt, reference, _ in asked],
            warnings,
        )

    def measure_base(self) -> Trial:
        """The base model as it is, on the rows that every trial is measured on; written down."""
        base = self._loaded(self.protocol.config)
        view = self._view(base)
        trial = Trial(
            name=BASE,
            method=BASE,
            parameters=_size(base.model),
            test=self._score(base, self.held_out.test, seen=view),
            other=self._score(base, self.held_out.other),
            validation=view.score if self.protocol.halves else None,
            answers=view.answers,
        )
        self.folder.keep(trial)
        return trial

    def do(self, planned: Planned, *, label: str = "") -> Trial:
        """Do a trial, or go on with it, and write down what it found.

        A trial that fails is written down with its error; the next ones can go on.

        Raises:
            KeyboardInterrupt: the user's wish to stop is not a failure of the trial.
        """
        trial = about(planned)
        try:
            trial = self._run(planned, trial, label or planned.name)
        except Exception as error:  # a failed trial must not take the others with it
            known = isinstance(error, LorikeetError)
            trial = replace(trial, error=str(error) if known else repr(error))
            if not known:
                details = self.folder.path / "errors" / f"{planned.name}.txt"
                write_text(details, traceback.format_exc())
        self.folder.keep(trial)
        if trial.error is None:
            self._tidy(planned)
        return trial

    def _run(self, planned: Planned, trial: Trial, label: str) -> Trial:
        folder = RunFolder(self.folder.run(planned.name))
        config = planned.config.model_copy(update={"out": str(folder.path)})
        folder.check(config, resume=folder.config.is_file())
        base = self._loaded(config)
        data = self._prepared(config.data, base)
        data = replace(
            data if config.data.limit is None else data.first(config.data.limit),
            validation=self._shared.validation,
            rows_validation=self._shared.rows_validation,
        )
        _check_rows(planned, data)
        before = self._view(base)
        with _lent(base, method=config.train.method) as kept:
            counted = forget_peak_memory(base.machine.device)
            result = run_on(
                base, data, self.renderer, config, label=label, before=before, sparing=True
            )
            peak = peak_memory(base.machine.device) - kept if counted else None
            after = View(result.tuned, [])
            test = self._score(base, self.held_out.test, seen=after)
            other = self._score(base, self.held_out.other)
        return _filled(
            trial,
            result,
            rows=data.units,
            validation=result.tuned if self.protocol.halves else None,
            test=test,
            other=other,
            peak=peak,
        )

    def _tidy(self, planned: Planned) -> None:
        """Remove what only a trial that goes on needs."""
        folder = RunFolder(self.folder.run(planned.name))
        shutil.rmtree(folder.checkpoints, ignore_errors=True)
        if not self.protocol.keep_models:
            shutil.rmtree(folder.model, ignore_errors=True)

    def _loaded(self, config: RunConfig) -> Base:
        """The base for these options; another one takes the place of the last."""
        key = config.model.model_dump_json()
        if self._base is None or self._base[0] != key:
            self._base = None  # free its memory first
            self.loads["base"] += 1
            self._base = key, load_base(config)
        return self._base[1]

    def _prepared(self, data: DataConfig, base: Base) -> Prepared:
        """All rows of the study, tokenised as these options say."""
        shared = self.protocol.config
        data = data.model_copy(update={"limit": shared.data.limit})
        key = data.model_dump_json()
        if key not in self._data:
            self.loads["data"] += 1
            self._data[key] = prepare(data, base.tokenizer, seed=shared.train.seed)
        return self._data[key]

    def _other(self, base: Base) -> list[Example]:
        if self.protocol.other is None:
            return []
        length = self.protocol.config.data.max_length
        text = DataConfig(
            path=self.protocol.other, validation=0.0, max_length=length, supervise="everything"
        )
        windows = prepare(text, base.tokenizer, seed=0).train
        n = min(len(windows), OTHER)
        return [windows[i * len(windows) // n] for i in range(n)]

    def _view(self, base: Base) -> View:
        """What this base makes of the held-out rows that runs see."""
        assert self._base is not None
        key = self._base[0]
        if key not in self._views:
            tokens = self.protocol.config.train.max_tokens
            self._views[key] = look(base, self._shared, self.renderer, max_tokens=tokens)
        return self._views[key]

    def _score(
        self, base: Base, examples: list[Example], *, seen: View | None = None
    ) -> Score | None:
        """The model as it is now; what it has `seen` is not scored twice."""
        if seen is not None and examples is self.held_out.validation:
            return seen.score
        return score(base, examples, max_tokens=self.protocol.config.train.max_tokens)


def _check_rows(planned: Planned, data: Prepared) -> None:
    """Refuse a trial that its number of rows would misname, or leave with nothing to do.

    Raises:
        ConfigError: there are fewer rows than it is called by, or none of them is to train on.
    """
    rows = planned.config.data.limit
    if "data.limit" in planned.settings and rows is not None and rows > data.units:
        raise ConfigError(
            f"data.limit {rows:,} is more than the {data.units:,} rows that there are, so the trial"
            " would be that of all rows under another name; give a number up to that, or null for"
            " all"
        )
    if not data.train:
        raise ConfigError(
            f"none of the first {data.units:,} rows is to train on: they are held out, or have"
            " nothing to learn; give a higher data.limit"
        )


@contextmanager
def _lent(base: Base, *, method: str) -> Iterator[int]:
    """Within the block the model may be changed; after it, it is as it was before.

    Yields:
        Bytes of the copy of its weights that this takes.
    """
    before = fingerprint(base.model)
    weights = {}
    if method == "full":
        weights = {name: p.detach().clone() for name, p in base.model.named_parameters()}
    try:
        yield sum(weight.nbytes for weight in weights.values())
    finally:
        remove(base.model)
        _put_back(base.model, weights)
        if fingerprint(base.model) != before:
            raise RuntimeError("a trial changed the base model that it was lent")


@torch.no_grad()
def _put_back(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.grad = None
        parameter.requires_grad_(False)
        if name in weights:
            parameter.copy_(weights[name])


def _hold_out(
    protocol: Protocol, prepared: Prepared, other: list[Example]
) -> tuple[Prepared, HeldOut]:
    """The data as the runs see it, and what is held out.

    A comparison halves the held-out rows: learning rates are picked on one half, results come from
    the other. The halves depend on the seed of the split alone.
    """
    n = len(prepared.validation)
    needed = 4 if protocol.halves else 2
    if n < needed:
        raise ConfigError(
            f"a {'comparison' if protocol.halves else 'sweep'} needs at least {needed} held-out"
            f" examples, and data.validation gives {n}; give more data or a larger share"
        )
    if not protocol.halves:
        return prepared, HeldOut(prepared.validation, prepared.validation, other)
    order = permutation(n, f"{protocol.config.train.seed}/halves")
    chosen = set(order[: n // 2])
    halves: tuple[list[int], list[int]] = ([], [])
    for i in range(n):
        halves[i not in chosen].append(i)
    validation, test = ([prepared.validation[i] for i in half] for half in halves)
    rows = [prepared.rows_validation[i] for i in halves[0]]
    return (
        replace(prepared, validation=validation, rows_validation=rows),
        HeldOut(validation, test, other),
    )


def about(planned: Planned, *, error: str | None = None) -> Trial:
    """What is known of a trial before it runs, or of one that could not."""
    config = planned.config
    return Trial(
        name=planned.name,
        method=planned.method,
        settings=dict(planned.settings),
        seed=config.train.seed,
        rows=config.data.limit or 0,
        r=config.lora.r if config.train.method == "lora" else None,
        learning_rate=config.train.peak,
        error=error,
    )


def _facts(base: Base, prepared: Prepared, held_out: HeldOut) -> dict[str, int | str]:
    """Sizes that a reader of the results wants to know."""
    return {
        "template name": prepared.template_name,
        "rows": prepared.units,
        "training examples": len(prepared.train),
        "validation documents": len(held_out.validation),
        "test documents": len(held_out.test),
        "test tokens": sum(example.supervised_tokens for example in held_out.test),
        "documents of the second text": len(held_out.other),
        "dtype": base.machine.dtype_name,
    }


def _filled(
    trial: Trial,
    result: RunResult,
    *,
    rows: int,
    validation: Score | None,
    test: Score | None,
    other: Score | None,
    peak: int | None,
) -> Trial:
    lines = read_metrics(result.folder.metrics)
    steps = [line for line in lines if "loss" in line]
    return replace(
        trial,
        rows=rows,
        parameters=result.parameters.base,
        trainable=result.parameters.trainable,
        steps=result.state.step,
        tokens=sum(line["tokens"] for line in steps),
        supervised_tokens=sum(line["supervised_tokens"] for line in steps),
        saved_bytes=_saved(result.folder),
        curve=[(line["step"], line["loss"]) for line in steps],
        evaluations=[(line["step"], line["eval_nll"]) for line in lines if "eval_nll" in line],
        validation=validation,
        test=test,
        other=other,
        answers=[list(sample.answers.values())[-1] for sample in result.samples],
        cost=Cost(result.seconds, peak),
    )


def _saved(folder: RunFolder) -> int:
    """Bytes of the tensors that a run saved."""
    files: Sequence[Path] = [
        *folder.adapter.glob("*.safetensors"),
        *folder.model.glob("*.safetensors"),
    ]
    return sum(file.stat().st_size for file in files)


def _size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())

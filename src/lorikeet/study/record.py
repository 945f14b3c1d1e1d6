"""What a study knows: its trials, which of them belong together, and what they share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from lorikeet.evaluate import Score

SEED = "train.seed"
"""The option in which the trials of a group differ."""


@dataclass(frozen=True)
class Cost:
    """What a trial took on this machine; differs from one time to the next.

    Attributes:
        seconds: in optimizer steps, from the first to the last.
        peak_memory: most bytes that the process held while the trial went on, the base model and
            the data included; None where the system does not tell.
    """

    seconds: float
    peak_memory: int | None


@dataclass(frozen=True)
class Trial:
    """One run of a study, or the base model as it is.

    Attributes:
        name: unique in the study; its run folder is `runs/NAME`.
        method: "base", "lora", "full", or what a comparison calls a variant ("dora").
        settings: the options that the study varies (`lora.r`) and their values here.
        seed: `train.seed`.
        rows: rows of the data that were its to use; the held-out ones are among them.
        r: rank; None for the base and full fine-tuning.
        learning_rate: peak; None for the base.
        parameters: of the base model.
        trainable: parameters that were trained.
        steps: optimizer steps.
        tokens: all tokens of these steps.
        supervised_tokens: of these, the tokens that counted.
        saved_bytes: size of what is saved, an adapter or a model.
        curve: training loss, nats per token, by step: (step, loss).
        evaluations: the same on the validation rows, where it was asked for: (step, loss).
        validation: on the rows that choices (a learning rate) may be made by.
        test: on the rows that the study's results are about; None if the trial failed.
        other: on a second text, which shows what was forgotten.
        answers: to the study's questions, in their order.
        cost: what it took; None for the base.
        error: why it failed; None if it did not.
    """

    name: str
    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    rows: int = 0
    r: int | None = None
    learning_rate: float | None = None
    parameters: int = 0
    trainable: int = 0
    steps: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    saved_bytes: int = 0
    curve: Sequence[tuple[int, float]] = ()
    evaluations: Sequence[tuple[int, float]] = ()
    validation: Score | None = None
    test: Score | None = None
    other: Score | None = None
    answers: Sequence[str] = ()
    cost: Cost | None = None
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Everything, scores of single documents included, as a JSON-ready dict."""
        scores = {name: _score_to_json(getattr(self, name)) for name in _SCORES}
        return {**asdict(self), **scores}

    @staticmethod
    def from_json(found: Mapping[str, Any]) -> Trial:
        """What `to_json` made."""
        values = dict(found)
        for name in _SCORES:
            values[name] = _score_from_json(values[name])
        for name in ("curve", "evaluations"):
            values[name] = [(int(step), float(loss)) for step, loss in values[name]]
        values["cost"] = values["cost"] and Cost(**values["cost"])
        return Trial(**values)

    def summary(self) -> dict[str, Any]:
        """Its line in `metrics.json`."""
        seconds = self.cost.seconds if self.cost else 0.0
        return {
            "name": self.name,
            "method": self.method,
            "r": self.r,
            "rows": self.rows,
            "seed": self.seed,
            "learning_rate": self.learning_rate,
            "settings": dict(self.settings),
            "trainable": self.trainable,
            "trainable_share": self.trainable / self.parameters if self.parameters else 0.0,
            "steps": self.steps,
            "tokens": self.tokens,
            "supervised_tokens": self.supervised_tokens,
            "seconds": seconds,
            "seconds_per_step": seconds / self.steps if self.steps else 0.0,
            "tokens_per_second": self.tokens / seconds if seconds else 0.0,
            "peak_memory": self.cost.peak_memory if self.cost else None,
            "saved_bytes": self.saved_bytes,
            **{key: self.test and self.test.summary()[key] for key in _FIGURES},
            "validation_nll": self.validation and self.validation.nll,
            "other_nll": self.other and self.other.nll,
            "other_perplexity": self.other and self.other.perplexity,
            "error": self.error,
        }


@dataclass(frozen=True)
class Group:
    """Trials that differ in their seed alone.

    Attributes:
        label: what tables and plots call it: "lora r=8, 1,500 rows".
        settings: the options that the study varies, the seed left out.
        trials: those that came to their end, by seed; at least one.
    """

    label: str
    settings: Mapping[str, Any]
    trials: Sequence[Trial]

    @property
    def method(self) -> str:
        """The method of all of them."""
        return self.trials[0].method

    @property
    def tests(self) -> list[Score]:
        """The scores that results are about, one for each seed."""
        return [trial.test for trial in self.trials if trial.test is not None]


@dataclass(frozen=True)
class Question:
    """A prompt that every trial answers, and the data's own completion."""

    prompt: str
    reference: str


@dataclass(frozen=True)
class Candidate:
    """A learning rate that was tried for a method, and what came of it.

    Attributes:
        method: the method.
        learning_rate: peak.
        nll: on the validation rows; None if the trial failed.
        picked: whether the method's results come from this one.
    """

    method: str
    learning_rate: float
    nll: float | None
    picked: bool


@dataclass(frozen=True)
class Study:
    """A comparison or a sweep that came to its end.

    Attributes:
        kind: which of the two.
        trials: all whose results count, failed ones included, in the order of the plan. Those
            that only served to pick a learning rate are in `candidates`.
        varied: option to its values, in order; the seed is one of them. Of a comparison this is
            the seed alone: its methods differ in `Trial.method`.
        questions: what was asked of every trial.
        candidates: how learning rates were picked, by method; empty for a sweep.
        config: the options that all trials share, as in `config.yaml`.
        receipt: data hash, base fingerprint, versions, machine, how often base and data were
            loaded.
        other_name: what the second text is called; empty without one.
        notes: sentences about how the study was made that its reader should know.
    """

    kind: Literal["compare", "sweep"]
    trials: Sequence[Trial]
    varied: Mapping[str, Sequence[Any]]
    questions: Sequence[Question] = ()
    candidates: Sequence[Candidate] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    receipt: Mapping[str, Any] = field(default_factory=dict)
    other_name: str = ""
    notes: Sequence[str] = ()

    @property
    def base(self) -> Trial | None:
        """The base model as it is."""
        return next((trial for trial in self.trials if trial.method == "base"), None)

    @property
    def failed(self) -> list[Trial]:
        """Trials that did not come to their end."""
        return [trial for trial in self.trials if trial.error is not None]

    @property
    def groups(self) -> list[Group]:
        """The trials that did, without the base, those that differ in their seed alone together."""
        found: dict[str, list[Trial]] = {}
        for trial in self.trials:
            if trial.method != "base" and trial.error is None:
                found.setdefault(_label(trial), []).append(trial)
        return [
            Group(label, _unseeded(trials[0].settings), sorted(trials, key=lambda t: t.seed))
            for label, trials in found.items()
        ]


def short(option: str) -> str:
    """An option's name in a table: `r` for `lora.r`, `rows` for `data.limit`."""
    return {"data.limit": "rows", "train.method": "method"}.get(option, option.split(".")[-1])


def _label(trial: Trial) -> str:
    varied = {key: v for key, v in _unseeded(trial.settings).items() if key != "train.method"}
    parts = [f"{short(option)}={shown(value)}" for option, value in varied.items()]
    return " ".join([trial.method, *parts])


def _unseeded(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {option: value for option, value in settings.items() if option != SEED}


def shown(value: object) -> str:
    """An option's value in a table."""
    if isinstance(value, list | tuple):
        return "+".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


_SCORES = ("validation", "test", "other")
_FIGURES = ("nll", "nll_stderr", "perplexity", "bits_per_byte")


def _score_to_json(score: Score | None) -> dict[str, Any] | None:
    if score is None:
        return None
    return {
        "nats": score.nats.tolist(),
        "tokens_per_document": score.tokens_per_document.tolist(),
        "text_bytes": score.text_bytes,
    }


def _score_from_json(found: Mapping[str, Any] | None) -> Score | None:
    if found is None:
        return None
    return Score(
        nats=np.array(found["nats"], dtype=np.float64),
        tokens_per_document=np.array(found["tokens_per_document"], dtype=np.int64),
        text_bytes=found["text_bytes"],
    )

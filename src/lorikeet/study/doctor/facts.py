"""What a run folder says about its run, read once; every symptom is looked for in this alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lorikeet.adapters import read_adapter
from lorikeet.adapters.anatomy import Anatomy, examine
from lorikeet.config import RunConfig, load_config
from lorikeet.errors import ConfigError, InputError
from lorikeet.evaluate import Difference, Sample
from lorikeet.study.folder import RunFolder
from lorikeet.train import read_metrics


@dataclass(frozen=True)
class Curve:
    """What every optimizer step recorded; N steps.

    Attributes:
        loss: float64 [N], nats per supervised token before the step's update.
        learning_rate: float64 [N], of the step's update.
        grad_norm: float64 [N], before clipping; NaN where it was not recorded.
        supervised: float64 [N], supervised tokens.
    """

    loss: np.ndarray
    learning_rate: np.ndarray
    grad_norm: np.ndarray
    supervised: np.ndarray

    def __len__(self) -> int:
        return len(self.loss)

    @property
    def spent(self) -> np.ndarray:
        """Learning rates added up before each step, as a share of those of the whole run, [N].

        AdamW moves every weight by about the learning rate a step, so this is how much of all the
        moving was done; unlike the number of the step it takes the schedule in.
        """
        total = self.learning_rate.sum()
        before = np.cumsum(self.learning_rate) - self.learning_rate
        return before / total if total else np.linspace(0, 1, len(self), endpoint=False)


@dataclass(frozen=True)
class Measured:
    """The base and the tuned model on the same rows.

    Attributes:
        documents: how many.
        base: nats per token of the base.
        tuned: of the tuned model.
        tuned_stderr: standard error of that; None for a single document.
        difference: tuned - base, paired document by document.
    """

    documents: int
    base: float
    tuned: float
    tuned_stderr: float | None
    difference: Difference

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval of the difference; None for a single document."""
        return self.difference.interval

    def summary(self) -> dict[str, Any]:
        """The difference as a JSON-ready dict."""
        return {
            "documents": self.documents,
            "nll": self.difference.nll,
            "nll_stderr": self.difference.stderr,
            "interval95": self.interval,
        }

    def __str__(self) -> str:
        return str(self.difference)


@dataclass(frozen=True)
class RunFacts:
    """All that is known of a run.

    Attributes:
        path: the run folder.
        config: the options.
        finished: whether there is a receipt.
        curve: every step.
        evaluations: (step, nats per token on validation rows) along the way.
        validation: both models on rows held out; None without such rows or without a receipt.
        seen: both on some of the rows trained on; None without validation rows, and in older
            folders.
        moved: norm of the adapter's updates over that of the weights that they change; None after
            full fine-tuning, and in older folders.
        best_step: the step of the best evaluation.
        data: counts of the data's report; empty without a receipt.
        examples: examples to train on; None if not known.
        supervised_tokens: of one pass over these examples; None if not known.
        trainable: parameters that were trained.
        template: the template's name; `none` for plain documents, empty if not known.
        template_hash: sha256 of its source.
        own_template_hash: the same of the template that the saved tokenizer carries; None without.
        anatomy: of the adapter; None after full fine-tuning or without one.
        samples: answers of the base and the tuned model.
    """

    path: Path
    config: RunConfig
    finished: bool
    curve: Curve
    evaluations: Sequence[tuple[int, float]] = ()
    validation: Measured | None = None
    seen: Measured | None = None
    moved: float | None = None
    best_step: int | None = None
    data: Mapping[str, Any] = field(default_factory=dict)
    examples: int | None = None
    supervised_tokens: int | None = None
    trainable: int | None = None
    template: str = ""
    template_hash: str = ""
    own_template_hash: str | None = None
    anatomy: Anatomy | None = None
    samples: Sequence[Sample] = ()

    @property
    def steps(self) -> int:
        """Optimizer steps that were done."""
        return len(self.curve)

    @property
    def epochs(self) -> float | None:
        """Passes over the rows to train on; None if their number is not known."""
        return self.steps / self.steps_per_epoch if self.steps_per_epoch else None

    @property
    def steps_per_epoch(self) -> int | None:
        """Steps that visit every row once; None if their number is not known."""
        return -(-self.examples // self.config.train.batch_size) if self.examples else None


def is_run(path: Path) -> bool:
    """Whether a folder holds a run: its configuration marks it."""
    return RunFolder(path).config.is_file()


def read_facts(path: Path) -> RunFacts:
    """Read a run folder, finished or not.

    Raises:
        ConfigError: the folder holds no run, or files of it that cannot be read.
        AdapterError: the adapter in it cannot be read.
    """
    if not is_run(path):
        raise ConfigError(
            f"{path} is not a run folder: expected config.yaml and metrics.jsonl in it, as"
            " `lorikeet train --out FOLDER` writes them"
        )
    folder = RunFolder(path)
    config = load_config(folder.config)
    try:
        return _facts(folder, config)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise ConfigError(f"the run in {path} cannot be read: {error!r}") from error


def _facts(folder: RunFolder, config: RunConfig) -> RunFacts:
    lines = read_metrics(folder.metrics)
    receipt = _json(folder.receipt)
    result = receipt.get("result", {})
    data = receipt.get("data", {})
    validation = _measured(result)
    examples, tokens = _trained_on(receipt, validation)
    saved = folder.adapter if config.train.method == "lora" else folder.model
    return RunFacts(
        path=folder.path,
        config=config,
        finished=folder.finished,
        curve=_curve([line for line in lines if "loss" in line]),
        evaluations=[(line["step"], line["eval_nll"]) for line in lines if "eval_nll" in line],
        validation=validation,
        seen=_measured(result.get("seen") or {}),
        moved=result.get("moved"),
        best_step=result.get("best_step"),
        data=data,
        examples=examples,
        supervised_tokens=tokens,
        trainable=receipt.get("parameters", {}).get("trainable"),
        template=receipt.get("template", ""),
        template_hash=receipt.get("template_hash", ""),
        own_template_hash=_template_hash(saved),
        anatomy=_anatomy(folder.adapter),
        samples=_samples(folder.samples),
    )


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _curve(lines: Sequence[Mapping[str, Any]]) -> Curve:
    def column(name: str, default: float) -> np.ndarray:
        return np.array([line.get(name, default) for line in lines], dtype=np.float64)

    return Curve(
        loss=column("loss", np.nan),
        learning_rate=column("learning_rate", 0.0),
        grad_norm=column("grad_norm", np.nan),
        supervised=column("supervised_tokens", 1.0),
    )


def _measured(found: Mapping[str, Any]) -> Measured | None:
    base, tuned, difference = found.get("base"), found.get("tuned"), found.get("difference")
    if not base or not tuned or not difference:
        return None
    documents = base["documents"]
    df = difference.get("df") or max(documents - 1, 1)  # older receipts have none
    return Measured(
        documents=documents,
        base=base["nll"],
        tuned=tuned["nll"],
        tuned_stderr=tuned["nll_stderr"],
        difference=Difference(difference["nll"], difference["nll_stderr"], df),
    )


def _trained_on(
    receipt: Mapping[str, Any], validation: Measured | None
) -> tuple[int | None, int | None]:
    """Examples to train on and their supervised tokens; older receipts hold both sides' sum."""
    training = receipt.get("training")
    if training:
        return training["examples"], training["supervised_tokens"]
    data = receipt.get("data")
    if not data:
        return None, None
    examples = data["examples"] - (validation.documents if validation else 0)
    return examples, round(data["supervised_tokens"] * examples / max(data["examples"], 1))


def _template_hash(saved: Path) -> str | None:
    """Of the chat template beside the saved tokenizer."""
    file = saved / "chat_template.jinja"
    if file.is_file():
        return hashlib.sha256(file.read_bytes()).hexdigest()
    text = _json(saved / "tokenizer_config.json").get("chat_template")
    return hashlib.sha256(text.encode()).hexdigest() if isinstance(text, str) else None


def _anatomy(folder: Path) -> Anatomy | None:
    if not (folder / "adapter_config.json").is_file():
        return None
    adapter = read_adapter(folder)
    return examine(adapter) if adapter.updates else None


def _samples(path: Path) -> list[Sample]:
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    return [Sample(**json.loads(line)) for line in lines if line]

"""What a study's report says in words that are the same wherever it says them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from lorikeet.study.outcomes import Outcome
from lorikeet.study.prose import prose_file
from lorikeet.study.record import SEED, Study, short

MEASURED_HERE = ("versions", "machine", "loads")
"""Keys of a receipt that tell of this machine and this time, not of the experiment."""

_OF_A_METHOD = ("train.method", "train.learning_rate")  # what a comparison varies by itself
_UNIX = re.compile(r"(?<![\w.~:/])/(?:[^\s/:'\"`<>|]+/)+([^\s/:'\"`<>|]+)")
_WINDOWS = re.compile(r"\b[A-Za-z]:\\(?:[^\s\\:'\"`<>|]+\\)*([^\s\\:'\"`<>|]+)")


def title(study: Study) -> str:
    """`Comparison of base, lora and full` or `Sweep over r and rows`."""
    if study.kind == "compare":
        methods = dict.fromkeys(trial.method for trial in study.trials)
        return f"Comparison of {listed(list(methods))}"
    options = [short(option) for option, values in study.varied.items() if option != SEED]
    return f"Sweep over {listed(options)}" if options else "Sweep over seeds"


def lead(study: Study, outcomes: Sequence[Outcome]) -> str:
    """What was done, on what, in a few sentences."""
    failed = len(study.failed)
    trained = [trial for trial in study.trials if trial.method != "base"]
    parts = [f"{count(len(trained), 'run')} on {model(study)}"]
    sizes = {trial.parameters for trial in study.trials if trial.parameters}
    if sizes:
        parts.append(f" ({max(sizes):,} parameters)")
    if data(study):
        parts.append(f", trained on {data(study)}")
    if failed:
        parts.append(f"; {'all' if failed == len(trained) else failed} of them failed.")
    else:
        parts.append(".")
    if outcomes:
        test = outcomes[0].test
        parts.append(f" Results are those on {count(test.documents, 'held-out document')}.")
    return "".join(parts)


def reading(outcomes: Sequence[Outcome]) -> str:
    """How intervals and differences are to be read."""
    seeds = {len(outcome.seeds) for outcome in outcomes if not outcome.is_base}
    text = (
        "nll is in nats per token; lower is better. Brackets hold 95 % intervals. Differences are"
        " paired document by document, so they can be clear where the intervals of two"
        " perplexities overlap."
    )
    if 1 in seeds:
        text += (
            " Where there was a single seed, the intervals speak of other documents, not of other"
            " seeds."
        )
    return text


def again(study: Study) -> str:
    """The command that does the study again, in another folder."""
    if study.kind == "sweep":
        return "lorikeet sweep SWEEP.yaml --out ANOTHER_FOLDER"
    methods = list(dict.fromkeys(trial.method for trial in study.trials))
    grids: dict[str, list[str]] = {}
    for candidate in study.candidates:
        grids.setdefault(candidate.method, []).append(f"{candidate.learning_rate:g}")
    parts = ["lorikeet compare RUN.yaml", f"--methods {','.join(methods)}"]
    parts.append(f"--seeds {len(study.varied.get(SEED, ()))}")
    parts += [f"--grid {method}={','.join(rates)}" for method, rates in grids.items()]
    if study.other_name != prose_file().name:
        parts.append(f"--other {study.other_name or 'none'}")
    return " \\\n    ".join([*parts, "--out ANOTHER_FOLDER"])


def in_common(study: Study) -> dict[str, Any]:
    """The options that all trials share, without the study's folder."""
    varied = {*study.varied, *(_OF_A_METHOD if study.kind == "compare" else ())}
    found: dict[str, Any] = {}
    for section, values in study.config.items():
        if isinstance(values, Mapping):
            kept = {k: v for k, v in values.items() if f"{section}.{k}" not in varied}
            found[section] = kept
        elif section != "out":
            found[section] = values
    return found


def as_yaml(values: Mapping[str, Any]) -> str:
    """A mapping as YAML, in its own order."""
    return yaml.safe_dump(_plain(values), sort_keys=False, allow_unicode=True, width=88)


def stood_on(study: Study) -> dict[str, Any]:
    """What the receipt says of data, base model and template."""
    return {key: value for key, value in study.receipt.items() if key not in MEASURED_HERE}


def model(study: Study) -> str:
    """The base model's name: the last part of its path, or its name on the hub."""
    section = study.config.get("model")
    path = section.get("path") if isinstance(section, Mapping) else None
    return without_places(str(path)).removeprefix("…/") if path else "the base model"


def data(study: Study) -> str:
    """The data's name, likewise; empty if it is not known."""
    section = study.config.get("data")
    path = section.get("path") if isinstance(section, Mapping) else None
    return without_places(str(path)).removeprefix("…/") if path else ""


def without_places(text: str) -> str:
    """The text with every absolute path cut down to its last part."""
    return _WINDOWS.sub(r"…\\\1", _UNIX.sub(r"…/\1", text))


def anywhere(values: Any) -> Any:
    """The same for every text in nested mappings and lists."""
    if isinstance(values, Mapping):
        return {key: anywhere(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [anywhere(value) for value in values]
    return without_places(values) if isinstance(values, str) else values


def listed(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)


def count(number: int, noun: str) -> str:
    """`1 run`, `12 runs`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def sentence(text: str) -> str:
    """A warning as a sentence: a capital first, a full stop last."""
    return f"{text[:1].upper()}{text[1:].removesuffix('.')}."


def _plain(value: Any) -> Any:
    """The same of types that YAML knows."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value if isinstance(value, bool | int | float | str | None) else str(value)

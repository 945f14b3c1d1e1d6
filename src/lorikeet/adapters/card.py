"""The model card of an adapter folder: its README.md, for people and for the hub.

It says what was set and what was measured, and nothing else; paths of this machine stay out of it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lorikeet.adapters.schema import AdapterInfo
from lorikeet.adapters.vocabulary import recorded
from lorikeet.lora import Vocabulary

CARD_FILE = "README.md"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_LONGEST = 200  # characters of a value that a file, which may come from anywhere, gives


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run knows beyond the adapter's own configuration; None is left out of the card.

    Attributes:
        steps: optimizer steps taken.
        learning_rate: its peak.
        batch_size: examples per optimizer step.
        rows: rows of the data that it was trained on.
        base: `Score.summary()` of the base model.
        tuned: `Score.summary()` of the base with the adapter, on the same examples.
        difference: `Difference.summary()` of the two.
    """

    steps: int | None = None
    learning_rate: float | None = None
    batch_size: int | None = None
    rows: int | None = None
    base: Mapping[str, Any] | None = None
    tuned: Mapping[str, Any] | None = None
    difference: Mapping[str, Any] | None = None


def card(info: AdapterInfo, *, outcome: Outcome | None = None, license: str = "unknown") -> str:
    """The README.md of an adapter: front matter that the hub reads, then prose.

    Args:
        info: the adapter's configuration, base model and provenance.
        outcome: what its run did and measured; without it there are no figures.
        license: an identifier that the hub knows, such as `apache-2.0`.
    """
    outcome = outcome or Outcome()
    parts = [
        _front_matter(info.base_model, license),
        "# LoRA adapter",
        _introduction(info),
        "## Settings",
        "\n".join(f"- {name}: {value}" for name, value in _settings(info, outcome)),
        "## Measured",
        "\n\n".join(_measured(outcome)),
        "## How to load it",
        _loading(info.base_model, recorded(info.provenance)),
    ]
    versions = info.provenance.get("versions")
    if isinstance(versions, Mapping) and versions:
        named = [f"{_flat(package)} {_flat(version)}" for package, version in versions.items()]
        parts += ["## Versions", ", ".join(map(_code, named))]
    return "\n\n".join(parts) + "\n"


def is_hub_id(base_model: str) -> bool:
    """Whether this reads as `owner/name` on the hub, and is no folder here."""
    named = _HUB_ID.fullmatch(base_model) and not re.search(r"--|\.\.", base_model)
    return bool(named) and not Path(base_model).exists()


def _front_matter(base_model: str, license: str) -> str:
    fields: dict[str, Any] = {"base_model": base_model} if is_hub_id(base_model) else {}
    fields |= {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "license": license,
        "tags": ["lora", "lorikeet"],
    }
    return f"---\n{yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)}---"


def _introduction(info: AdapterInfo) -> str:
    base = info.base_model
    if is_hub_id(base):
        on = f"[{base}](https://huggingface.co/{base})"
    elif base:
        on = f"a local model, {_code(_leaf(base))}"
    else:
        on = "a base model that its configuration does not name"
    made = "with Lorikeet" if info.provenance else "by a tool that left no record"
    return f"Low-rank updates for {on}, made {made}. The base model's weights are not included."


def _settings(info: AdapterInfo, outcome: Outcome) -> Iterator[tuple[str, str]]:
    config, made_by = info.config, info.provenance
    yield "rank", str(config.r)
    yield "alpha", f"{config.alpha:g}"
    for name, on in (("rank-stabilised scaling", config.rslora), ("DoRA", config.dora)):
        if on:
            yield name, "yes"
    for name, pattern in (("rank", config.rank_pattern), ("alpha", config.alpha_pattern)):
        if pattern:
            yield f"{name} by module", _listed([f"{k} = {v:g}" for k, v in pattern.items()])
    targets = config.target_modules
    yield "targets", _listed([targets] if isinstance(targets, str) else targets)
    if config.layers:
        yield "blocks", ", ".join(map(str, config.layers))
    gained = recorded(made_by)
    if gained:
        yield "new tokens", _listed([str(token) for token in gained.tokens])
    if config.dropout:
        yield "dropout", f"{config.dropout:g}"
    for name, value in (
        ("steps", outcome.steps),
        ("learning rate (peak)", outcome.learning_rate),
        ("batch size (examples per step)", outcome.batch_size),
    ):
        if value is not None:
            yield name, f"{value:g}" if isinstance(value, float) else f"{value:,}"
    if outcome.rows is not None:
        yield "trained on", f"{outcome.rows:,} rows"
    for name, key in (
        ("data sha256", "data_sha256"),
        ("template", "template"),
        ("longest example (tokens)", "max_length"),
        ("seed", "seed"),
        ("fingerprint of the base's weights", "base_fingerprint"),
    ):
        if made_by.get(key) is not None:
            yield name, _code(_leaf(made_by[key]) if key == "template" else _flat(made_by[key]))


def _measured(outcome: Outcome) -> Iterator[str]:
    base, tuned = outcome.base, outcome.tuned
    if base is None or tuned is None:
        yield "Nothing was measured on held-out rows."
        return
    yield f"On {base['documents']:,} held-out examples, {base['tokens']:,} supervised tokens:"
    yield "\n".join(
        [
            "| | perplexity | standard error | nll (nats/token) | standard error |",
            "|---|---|---|---|---|",
            *(_score_row(name, s) for name, s in (("base", base), ("with the adapter", tuned))),
        ]
    )
    if outcome.difference is not None:
        yield f"Paired difference: {_difference(outcome.difference)}."
    if base["nll_stderr"] is not None:
        yield (
            "Standard errors are over documents; that of a perplexity is the perplexity times"
            " that of the nll, to first order."
        )


def _score_row(name: str, score: Mapping[str, Any]) -> str:
    perplexity, error = score["perplexity"], score["nll_stderr"]
    figures = [
        f"{perplexity:.3f}",
        "n/a" if error is None or math.isinf(perplexity) else f"{perplexity * error:.3f}",
        f"{score['nll']:.4f}",
        "n/a" if error is None else f"{error:.4f}",
    ]
    return f"| {name} | {' | '.join(figures)} |"


def _difference(found: Mapping[str, Any]) -> str:
    said = f"{found['nll']:+.4f} nats/token (below zero is better)"
    if found["interval95"] is None:
        return said
    low, high = found["interval95"]
    return f"{said}, 95 % interval [{low:+.4f}, {high:+.4f}]"


def _loading(base_model: str, gained: Vocabulary | None) -> str:
    base = base_model if is_hub_id(base_model) else "BASE_MODEL"
    tokenizer = "ADAPTER" if gained else base
    resized = ""
    if gained and gained.rows > gained.base_rows:
        resized = f"\nbase.resize_token_embeddings({gained.rows})"
    return f"""\
`ADAPTER` is this folder, or for PEFT its id on the hub{_what_base_is(base)}.

With PEFT:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{tokenizer}")
base = AutoModelForCausalLM.from_pretrained("{base}"){resized}
model = PeftModel.from_pretrained(base, "ADAPTER").eval()
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))
```

With Lorikeet:

```python
from lorikeet.api import answer, load_adapter, load_model

base = load_model("{base}")
load_adapter(base, "ADAPTER")
print(answer(base, ["What is LoRA?"])[0])
```"""


def _what_base_is(base: str) -> str:
    return "; `BASE_MODEL` is the base model's folder or id" if base == "BASE_MODEL" else ""


def _listed(names: Sequence[str]) -> str:
    return ", ".join(_code(_flat(name)) for name in names)


def _leaf(path: object) -> str:
    """The last part of what may be a path of this machine."""
    return re.split(r"[/\\]+", _flat(path).rstrip("/\\"))[-1]


def _flat(value: object) -> str:
    """One line of printable text, cut to a length that a card can bear."""
    text = "".join(c if c.isprintable() else " " for c in str(value))
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST else text[:_LONGEST] + " ..."


def _code(value: str) -> str:
    """A Markdown code span, in which nothing is markup, around any one line of text."""
    text = _flat(value) or " "
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " if "`" in text else ""
    return f"{fence}{pad}{text}{pad}{fence}"

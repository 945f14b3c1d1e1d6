"""From the options of a run to examples for training and validation, and what to say about them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from lorikeet.config import DataConfig
from lorikeet.data.batch import permutation
from lorikeet.data.example import Example
from lorikeet.data.layout import Layout, Row, detect, normalise
from lorikeet.data.render import Rendered, Renderer
from lorikeet.data.source import read_rows
from lorikeet.data.tokenizer import Tokenizer
from lorikeet.errors import DataError

_TELLING = {
    *("system", "system_prompt", "tools", "functions", "history", "reasoning", "thinking"),
    *("reasoning_content", "input", "context", "output", "response", "answer", "completion"),
}
"""Names of columns and of messages' keys that mean something to a model."""


@dataclass(frozen=True)
class Report:
    """What became of the rows, training and validation together.

    Attributes:
        rows: rows read.
        examples: examples made of them, those without supervision left out.
        tokens: tokens of these examples.
        supervised_tokens: of these, the tokens that count.
        truncated: rows that `max_length` cut.
        without_supervision: rows without a supervised token: their prompt fills `max_length`.
        eos_supervised: examples in which the token that ends the text or turn is supervised.
        boundary_merges: examples whose first tokens are not those of the prompt alone, because a
            token of the tokenizer reaches over the end of the prompt.
        rewritten: examples whose template shows earlier turns otherwise than when they were last.
        special_in_text: rows whose own text holds control tokens, which are read as such.
        copies: held-out examples that are, token by token, training examples too.
        longest: tokens of the longest example.
        mean_length: tokens of the average example.
        needed_length: the smallest `max_length` at which every row has a supervised token.
    """

    rows: int
    examples: int
    tokens: int
    supervised_tokens: int
    truncated: int
    without_supervision: int
    eos_supervised: int
    boundary_merges: int
    rewritten: int
    special_in_text: int
    copies: int
    longest: int
    mean_length: float
    needed_length: int


@dataclass(frozen=True)
class Prepared:
    """The data of a run.

    Attributes:
        train: examples to train on, in file order.
        validation: examples held out, in file order; may be empty.
        units: rows of `data.path`; windows, of a single document.
        units_train: the number of the row (or window), from 0, that each example of `train` shows.
        rows_train: the row that each example of `train` shows; for a window of a long document
            the text of that window.
        rows_validation: the same for `validation`.
        layout: what the columns meant.
        template_name: the template in use; `none` for plain documents.
        template_hash: sha256 of its source.
        sha256: hash of the rows read from `data.path`.
        validation_sha256: hash of the rows of a validation file, if there is one.
        report: what became of the rows.
    """

    train: list[Example]
    validation: list[Example]
    units: int
    units_train: list[int]
    rows_train: list[Row]
    rows_validation: list[Row]
    layout: Layout
    template_name: str
    template_hash: str
    sha256: str
    validation_sha256: str | None
    report: Report

    @property
    def ids(self) -> Iterator[tuple[int, ...]]:
        """The token ids of every example, held out or not."""
        return (example.ids for example in (*self.train, *self.validation))

    def first(self, n: int) -> Prepared:
        """The same data with the first `n` rows alone; held out is what was held out of all."""
        kept = sum(unit < n for unit in self.units_train)
        return replace(
            self,
            units=min(n, self.units),
            train=self.train[:kept],
            units_train=self.units_train[:kept],
            rows_train=self.rows_train[:kept],
        )


def prepare(config: DataConfig, tokenizer: Tokenizer, *, seed: int) -> Prepared:
    """Read, check, split and render the data of a run.

    The split is a permutation of the rows that depends on the seed alone: what is held out is the
    same for every template, length and model. A single document is split by its windows. Rows
    without a supervised token are counted and left out: they would only dilute a step.

    Args:
        config: the section `data` of a run.
        tokenizer: the base model's.
        seed: seeds the split.

    Raises:
        DataError: unreadable data, no known layout, or rows that do not fit it.
    """
    renderer = Renderer(
        tokenizer,
        template=config.template,
        max_length=config.max_length,
        supervise=config.supervise,
    )
    source = _Source.read(config.path, renderer, split=config.split, limit=config.limit)
    held_out: _Source | None = None
    if isinstance(config.validation, str):
        held_out = _Source.read(config.validation, renderer, split=config.split, limit=None)
        train, validation = list(range(len(source.units))), held_out.units
    else:
        train, held = _split(len(source.units), config.validation, seed=seed)
        validation = [source.units[i] for i in held]
    kept_train = [(i, rendered) for i in train for rendered in _kept(source.units[i])]
    kept_validation = [rendered for unit in validation for rendered in _kept(unit)]
    used = [*(source.units[i] for i in train), *validation]
    trained_on = {rendered.example.ids for _, rendered in kept_train}
    copies = sum(rendered.example.ids in trained_on for rendered in kept_validation)
    plain = source.layout.name == "text"
    return Prepared(
        train=[rendered.example for _, rendered in kept_train],
        validation=[rendered.example for rendered in kept_validation],
        units=len(source.units),
        units_train=[unit for unit, _ in kept_train],
        rows_train=[rendered.row for _, rendered in kept_train],
        rows_validation=[rendered.row for rendered in kept_validation],
        layout=source.layout,
        template_name="none" if plain else renderer.template_name,
        template_hash=hashlib.sha256(b"").hexdigest() if plain else renderer.template_hash,
        sha256=source.sha256,
        validation_sha256=held_out.sha256 if held_out else None,
        report=_report(
            [r for u in used for r in u],
            rows=source.n_rows + (held_out.n_rows if held_out else 0),
            copies=copies,
        ),
    )


def preflight(prepared: Prepared, *, tokenizer: Tokenizer, max_length: int) -> list[str]:
    """Refuse data that would train nothing or never teach the model to stop.

    Returns:
        Warnings, a sentence each, about what is odd but not fatal.

    Raises:
        DataError: with every reason not to start.
    """
    report = prepared.report
    problems = []
    lost, total = report.without_supervision, report.examples + report.without_supervision
    full = (
        f"{lost} of {total} examples have nothing to learn: the prompt alone fills"
        f" --data.max_length {max_length}; every one has something from {report.needed_length} on"
    )
    if not prepared.train:
        problems.append("there is not one supervised token to train on")
    if lost > total / 2:
        problems.append(full)
    if not report.eos_supervised and prepared.layout.name != "text":
        problems.append(_never_stops(report, tokenizer, max_length))
    if problems:
        raise DataError("this data cannot be trained on as it is", problems)
    return [
        *([full + "; they are left out"] if lost else []),
        *_warnings(report, max_length),
        *_copies(report, held_out=len(prepared.validation)),
        *_unused(prepared.layout),
    ]


def _never_stops(report: Report, tokenizer: Tokenizer, max_length: int) -> str:
    if tokenizer.eos_token_id is None:
        return "no example ends with a supervised end token: the tokenizer names no EOS token"
    return (
        "no example ends with a supervised end token, so the model would never learn to stop:"
        f" --data.max_length {max_length} cuts {report.truncated} of {report.rows} rows"
    )


def _warnings(report: Report, max_length: int) -> list[str]:
    n = report.examples
    facts = {
        f"{report.truncated} of {report.rows} rows are longer than --data.max_length {max_length}"
        " and lose their end": report.truncated,
        f"in {report.boundary_merges} of {n} examples a token reaches over the end of the prompt:"
        " training shows other tokens there than generation will": report.boundary_merges,
        f"in {report.rewritten} of {n} examples the template rewrites earlier turns: they are"
        " trained on as they look in the whole conversation": report.rewritten,
        f"{report.special_in_text} of {n} examples have control tokens in their own text, which"
        " are read as control tokens": report.special_in_text,
    }
    return [sentence for sentence, count in facts.items() if count]


def _copies(report: Report, *, held_out: int) -> list[str]:
    if not report.copies:
        return []
    return [
        f"{report.copies} of {held_out} held-out examples are copies of training examples: figures"
        " on them show what was learnt by heart; take the doubles out of the file"
    ]


def _unused(layout: Layout) -> list[str]:
    """A warning of columns and keys that by their names belong to what should be learnt."""
    names = [name for name in layout.ignored if name.rpartition(".")[2] in _TELLING]
    if not names:
        return []
    return [
        f"the rows have {', '.join(names)}, which the layout {layout.name} does not use: nothing of"
        " it is trained on"
    ]


@dataclass(frozen=True)
class _Source:
    """A rendered file. Its units are what a split moves: rows, or windows of a single document."""

    units: list[list[Rendered]]
    layout: Layout
    sha256: str
    n_rows: int

    @staticmethod
    def read(path: str, renderer: Renderer, *, split: str, limit: int | None) -> _Source:
        rows = read_rows(path, split=split, limit=limit)
        layout = detect(rows)
        units = renderer.render(normalise(rows, layout), rows.origins)
        if len(units) == 1:
            units = [[window] for window in units[0]]
        return _Source(units, layout, rows.sha256, len(rows.rows))


def _split(n: int, share: float, *, seed: int) -> tuple[list[int], list[int]]:
    """Numbers to train on and to hold out: at least one of two or more if the share is not zero."""
    held = min(max(round(share * n), 1), n - 1) if share else 0
    chosen = set(permutation(n, f"{seed}/split")[:held])
    return [i for i in range(n) if i not in chosen], sorted(chosen)


def _kept(unit: Iterable[Rendered]) -> list[Rendered]:
    return [rendered for rendered in unit if any(rendered.example.supervised)]


def _report(rendered: Sequence[Rendered], *, rows: int, copies: int) -> Report:
    kept = [one for one in rendered if any(one.example.supervised)]
    lengths = [len(one.example.ids) for one in kept]
    return Report(
        rows=rows,
        examples=len(kept),
        tokens=sum(lengths),
        supervised_tokens=sum(one.example.supervised_tokens for one in kept),
        truncated=sum(one.example.truncated for one in rendered),
        without_supervision=len(rendered) - len(kept),
        eos_supervised=sum(one.stops for one in kept),
        boundary_merges=sum(one.boundary_merge for one in kept),
        rewritten=sum(one.rewritten for one in kept),
        special_in_text=sum(one.special_in_text for one in kept),
        copies=copies,
        longest=max(lengths, default=0),
        mean_length=sum(lengths) / max(len(lengths), 1),
        needed_length=max((one.needed_length for one in rendered), default=0),
    )

"""What an adapter needs of its base's vocabulary beyond what the base has: tokens, and their rows.

Ours say it in their provenance. Of another tool's adapter the tokenizer in its folder says it,
together with the shapes of its tensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from lorikeet import console
from lorikeet.adapters.files import inside
from lorikeet.adapters.names import copy_names, tensor_name
from lorikeet.adapters.schema import AdapterInfo
from lorikeet.errors import AdapterError
from lorikeet.lora import NewToken, Tables, Vocabulary, ids_by_table, tables, vocabulary
from lorikeet.lora.vocabulary import leading, listed

KEY = "vocabulary"
"""Where an adapter's provenance says what the vocabulary has gained."""

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_FILES = (
    *(TOKENIZER_FILE, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja"),
)
"""What a tokenizer consists of, its template included; not every one has them all."""


@dataclass(frozen=True, slots=True)
class Needed:
    """What the base's vocabulary must gain before an adapter fits.

    Attributes:
        vocabulary: None if it need not.
        starts: tables in the adapter's file that new rows start from, by the name of the module.
    """

    vocabulary: Vocabulary | None = None
    starts: Mapping[str, Tensor] = field(default_factory=dict)


def recorded(
    provenance: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None
) -> Vocabulary | None:
    """What an adapter of ours says; None if it says nothing.

    Args:
        provenance: where it says it.
        tensors: what its file holds, if more is to be done than to show it: no vocabulary grows by
            more rows than a table in the file has.

    Raises:
        AdapterError: it says something else than what we write.
    """
    found = provenance.get(KEY)
    if found is None:
        return None
    damaged = f"the adapter's record of new tokens ({KEY}) is damaged"
    try:
        rows, base_rows = (
            TypeAdapter(int).validate_python(found[key], strict=True)
            for key in ("rows", "base_rows")
        )
        tokens = TypeAdapter(tuple[NewToken, ...]).validate_python(found["new_tokens"])
    except (ValidationError, KeyError, TypeError) as error:
        raise AdapterError(f"{damaged}: {error}") from None
    ids = [token.id for token in tokens]
    if not (0 <= base_rows <= rows and ids == sorted(set(ids)) and all(0 <= n < rows for n in ids)):
        raise AdapterError(f"{damaged}: {base_rows} rows, then {rows}, with tokens {listed(ids)}")
    most = max((len(t) for t in (tensors or {}).values() if t.dim() == 2), default=0)
    if tensors is not None and rows - base_rows > most:
        raise AdapterError(f"{damaged}: {rows} rows, of which the adapter has {most} at most")
    return Vocabulary(tokens, rows, base_rows)


def needed(
    model: nn.Module,
    tokenizer: Any,
    folder: Path,
    info: AdapterInfo,
    tensors: Mapping[str, Tensor],
) -> Needed:
    """What the base's vocabulary must gain for the adapter in `folder`.

    Args:
        model: the base.
        tokenizer: its tokenizer; None if the caller has none, which is enough for an adapter that
            needs nothing.
        folder: the adapter's folder.
        info: what its configuration says.
        tensors: what its file holds.

    Raises:
        AdapterError: rows or tokens that are needed are nowhere; lists every finding.
    """
    own = recorded(info.provenance, tensors)
    if own is None:
        return _of_another_tool(model, tokenizer, folder, info, tensors)
    if tokenizer is None and own != vocabulary(model):
        raise AdapterError(
            f"the adapter in {folder} brings new tokens, {own}; give the base's tokenizer too, so"
            " that it can learn them"
        )
    return Needed(own)


def _of_another_tool(
    model: nn.Module,
    tokenizer: Any,
    folder: Path,
    info: AdapterInfo,
    tensors: Mapping[str, Tensor],
) -> Needed:
    if getattr(model, "get_input_embeddings", None) is None:  # only transformers' models have it
        return Needed()
    found, before = tables(model), vocabulary(model)
    given = _added_tokens(folder)
    if before is not None:
        texts = {token.id: token.text for token in given}
        if all(texts.get(token.id, token.text) == token.text for token in before.tokens):
            return Needed()
        raise AdapterError(
            f"the tokenizer in {folder} has other tokens than the base's vocabulary has gained,"
            f" {before}; load the base anew"
        )
    held = _Held.of(model, found, info, tensors)
    if tokenizer is None or not given:
        return _without_tokenizer(folder, held, given=given)
    known = tokenizer.get_vocab()
    taken = set(known.values())
    lacking = [t for t in given if t.text not in known and t.id not in taken]
    gained = [t for t in lacking if held.brings(t.id)]
    _check_rows(folder, held, gained)
    left = [str(t) for t in lacking if t not in gained]
    if left:
        console.warn(
            f"the tokenizer in {folder} has tokens of which the adapter brings no rows; the base's"
            f" does without them: {listed(left)}"
        )
    if not gained and held.size == held.rows:
        return Needed()
    return Needed(Vocabulary(tuple(gained), held.size, held.rows), held.starts)


@dataclass(frozen=True, slots=True)
class _Held:
    """The rows of tokens that an adapter's file holds, beside those that the base has.

    Attributes:
        rows: of the base.
        size: of the model that the adapter was trained on.
        ids: trained ids by table, those of a tied head included.
        starts: by table, the base's with new rows, or all of it trained.
        whole: tables that are trained whole.
        own: tables with a weight of their own, each with those that share it.
    """

    rows: int
    size: int
    ids: Mapping[str, Sequence[int]]
    starts: Mapping[str, Tensor]
    whole: frozenset[str]
    own: Mapping[str, tuple[str, ...]]

    @staticmethod
    def of(
        model: nn.Module, found: Tables, info: AdapterInfo, tensors: Mapping[str, Tensor]
    ) -> _Held:
        own = {found.name: (found.name, *found.tied), **{name: (name,) for name in found.heads}}
        ids = ids_by_table(model, info.config.trainable_tokens)
        if found.name in ids:
            ids = {**dict.fromkeys(found.tied, ids[found.name]), **ids}
        saved = info.config.modules_to_save or []
        whole = frozenset(n for n in found.all if any(n.endswith(entry) for entry in saved))
        full = {
            name: tensors[key]
            for name in found.all
            for key in copy_names(f"{name}.weight")
            if key in tensors and tensors[key].dim() == 2
        }
        starts = {}
        for name, sharing in own.items():
            copies = [n for n in sharing if n in full and n not in whole]
            trained = [n for n in sharing if n in full and whole.issuperset(sharing)]
            if copies or trained:
                starts[name] = full[(copies or trained)[0]]
        factors = {tensor_name(found.name, "A", embedding=True): 1}
        factors |= {tensor_name(n, "B", embedding=False): 0 for n in (*found.tied, *found.heads)}
        sizes = [len(table) for table in full.values()]
        sizes += [tensors[k].shape[dim] for k, dim in factors.items() if k in tensors]
        sizes += [1 + max(trained) for trained in ids.values()]
        rows = found.embedding.num_embeddings
        return _Held(rows, max([rows, *sizes]), ids, starts, whole, own)

    def has(self, table: str, token: int) -> bool:
        """Whether the file has this row of a table, for all that share it."""
        sharing = self.own[table]
        return token < len(self.starts.get(table, ())) or all(
            name in self.whole or token in self.ids.get(name, ()) for name in sharing
        )

    def brings(self, token: int) -> bool:
        """Whether the adapter makes something of a token: its rows were trained, or are new."""
        if token >= self.rows:
            return all(self.has(table, token) for table in self.own)
        return any(token in own for own in self.ids.values()) or not self.whole.isdisjoint(self.own)


def _without_tokenizer(folder: Path, held: _Held, *, given: Sequence[NewToken]) -> Needed:
    """Nothing is needed, or nothing can be done.

    Raises:
        AdapterError: rows are needed.
    """
    if held.size <= held.rows:
        return Needed()
    sizes = f"a vocabulary of at least {held.size} tokens, and the base has {held.rows} rows"
    if given:
        advice = "Give the base's tokenizer too, so that it can learn the new tokens"
    else:
        advice = (
            "What its new tokens are is for the tokenizer to say that it was trained with: save it"
            f" into that folder (tokenizer.save_pretrained, which writes a {TOKENIZER_FILE})"
        )
    raise AdapterError(f"the adapter in {folder} was trained with {sizes}. {advice}")


def _check_rows(folder: Path, held: _Held, gained: Sequence[NewToken]) -> None:
    """Check that every row beyond the base's is somewhere, and that what was trained has a text.

    Raises:
        AdapterError: with every finding.
    """
    problems = []
    for table in held.own:
        lost = (n for n in range(held.rows, held.size) if not held.has(table, n))
        if shown := leading(lost):
            problems.append(f"{table}, rows of the tokens {shown}")
    named = {token.id for token in gained}
    trained = dict.fromkeys(n for own in held.ids.values() for n in own if n >= held.rows)
    nameless = [n for n in trained if n not in named]
    if nameless and not problems:
        problems.append(f"{TOKENIZER_FILE}, texts of the tokens {listed(nameless)}")
    if problems:
        raise AdapterError(
            f"the adapter in {folder} was trained with {held.size} rows, and the base has"
            f" {held.rows}. Some of what is new was not saved with it (PEFT writes whole tables"
            " with save_embedding_layers=True). Missing:",
            problems,
        )


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of the tokenizer in a folder; none without one.

    Raises:
        AdapterError: one of them is a link to somewhere else.
    """
    if not (folder / TOKENIZER_FILE).is_file():
        return []
    return [inside(folder, name) for name in TOKENIZER_FILES if (folder / name).is_file()]


def require_tokens(folder: Path, gained: Vocabulary | None) -> None:
    """Check that the tokenizer in a folder knows the tokens that an adapter has brought.

    Raises:
        AdapterError: it does not.
    """
    known = {(token.id, token.text) for token in _added_tokens(folder)}
    lacking = [str(t) for t in (gained.tokens if gained else ()) if (t.id, t.text) not in known]
    if lacking:
        raise AdapterError(
            f"the tokenizer in {folder} does not know the adapter's new tokens {listed(lacking)};"
            " save the one that it was trained with there"
        )


def _added_tokens(folder: Path) -> list[NewToken]:
    """The added tokens of the tokenizer in a folder, by id; none without one.

    Raises:
        AdapterError: its file is damaged.
    """
    if not (folder / TOKENIZER_FILE).is_file():
        return []
    path = inside(folder, TOKENIZER_FILE)
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        entries = [{**entry, "text": entry.pop("content")} for entry in raw["added_tokens"]]
        found = TypeAdapter(list[NewToken]).validate_python(entries)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise AdapterError(f"{path} is damaged or no tokenizer: {error}") from None
    return sorted(found, key=lambda token: token.id)

"""A vocabulary that grows: texts that become single tokens, and rows of the model for them.

Growing changes a base for good: its tokenizer knows the new tokens from then on, and its embedding
and head have rows for them. Adapters come and go as before; without one the new rows are what they
were at the start. Rows that the base had before stay what they were, bit for bit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lorikeet.errors import AdapterError
from lorikeet.lora.inject import require_plain
from lorikeet.lora.targets import base_modules, layer_kind
from lorikeet.lora.vocabulary import MARK, NewToken, Tables, Vocabulary, listed, tables, vocabulary


def grow_vocabulary(
    model: nn.Module, tokenizer: Any, texts: Sequence[str] | None
) -> Vocabulary | None:
    """Make every text one token, and give the model rows for them.

    Embedding and head grow only if they have fewer rows than the tokenizer now has ids; many models
    are padded. Either way a new token's row becomes the mean of the rows of the pieces into which
    the tokenizer has split its text so far, summed in float32; in a head with a weight of its own
    that of the head's rows. A head's bias is 0 in rows that are added. Nothing is drawn at random.

    Args:
        model: a base without adapters.
        tokenizer: its tokenizer, a fast one; changed in place.
        texts: the new tokens; none changes nothing, and neither do those that are there already
            because the model has grown by the same ones before.

    Raises:
        AdapterError: texts that the tokenizer has as a token already or cannot find again, a model
            that has grown by others or has no rows for its own tokenizer; lists every finding, and
            nothing is changed.
    """
    before = vocabulary(model)
    if not texts or (before and before.texts == list(texts)):
        return before
    tokens = new_tokens(tokenizer, texts)
    old = tables(model).embedding.num_embeddings
    rows = max(old, 1 + max(token.id for token in tokens))
    with growing(model, tokenizer, Vocabulary(tokens, rows, old)):
        return vocabulary(model)


def add_tokens(tokenizer: Any, texts: Sequence[str] | None) -> None:
    """Make every text one token of a tokenizer, in place.

    Raises:
        AdapterError: as `grow_vocabulary`.
    """
    tokenizer.add_tokens([token.added() for token in new_tokens(tokenizer, texts or ())])


def new_tokens(tokenizer: Any, texts: Sequence[str]) -> tuple[NewToken, ...]:
    """The tokens that texts would become; the tokenizer stays as it is.

    Raises:
        AdapterError: see `grow_vocabulary`.
    """
    known = tokenizer.get_vocab()
    problems = []
    for text in texts:
        pieces = _pieces(tokenizer, text)
        whole = pieces[0] if len(pieces) == 1 and pieces != [tokenizer.unk_token_id] else None
        own = known.get(text, whole)
        if own is not None:
            problems.append(
                f"{text!r} is a token already, {own}; to train its row, give"
                f" lora.trainable_tokens {own}"
            )
        elif not pieces:
            problems.append(f"of {text!r} the tokenizer leaves nothing")
    if not problems:
        trial = copy.deepcopy(tokenizer)
        trial.add_tokens([NewToken(0, text).added() for text in texts])
        ids = [trial.convert_tokens_to_ids(text) for text in texts]
        lost = [text for n, text in zip(ids, texts, strict=True) if n not in _pieces(trial, text)]
        problems += [f"{text!r} is not found again by the tokenizer" for text in lost]
    if problems:
        raise AdapterError("these texts cannot become new tokens:", problems)
    return tuple(NewToken(n, text) for n, text in zip(ids, texts, strict=True))


def _pieces(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer([text], add_special_tokens=False)["input_ids"][0]
    return ids


@contextmanager
def growing(
    model: nn.Module,
    tokenizer: Any,
    grown: Vocabulary | None,
    *,
    starts: Mapping[str, Tensor] | None = None,
) -> Iterator[None]:
    """Grow a model at once and its tokenizer at the end; after an error in the block neither.

    This is where every vocabulary grows, for training and for an adapter that was trained so.

    Args:
        model: a base without adapters.
        tokenizer: its tokenizer; it must give the tokens the ids that they have in `grown`.
        grown: what is gained; None, or what the model has gained before, changes nothing.
        starts: by the name of the embedding or head, a table [rows or fewer, dim] to take the new
            rows from, in place of the means of `grow_vocabulary`, as far as it goes.

    Raises:
        AdapterError: the model or the tokenizer cannot grow like this; lists every finding.
    """
    before = vocabulary(model)
    if grown is None or grown == before:
        yield
        return
    require_plain(model)
    if before:
        raise AdapterError(
            f"the vocabulary was to grow by {grown}, but has grown by {before} before; load the"
            " base anew"
        )
    found = tables(model)
    trial = copy.deepcopy(tokenizer)
    trial.add_tokens([token.added() for token in grown.tokens])
    problems = [*_rigid(model, found, grown), *_other_ids(tokenizer, trial, found, grown)]
    if problems:
        raise AdapterError(f"the vocabulary cannot grow by {grown}:", problems)
    undo = _grow(model, found, tokenizer, grown, starts or {})
    try:
        yield
    except BaseException:
        for step in reversed(undo):
            step()
        raise
    tokenizer.add_tokens([token.added() for token in grown.tokens])


def _rigid(model: nn.Module, found: Tables, grown: Vocabulary) -> Iterator[str]:
    """Why the model's rows cannot become more."""
    old = found.embedding.num_embeddings
    if grown.base_rows != old:
        yield f"{found.name} has {old} rows, and {grown.base_rows} before they grow are wanted"
    if layer_kind(found.embedding) != "embedding":
        yield f"{found.name} is of class {type(found.embedding).__name__}"
    for name, module in {**found.tied, **found.heads}.items():
        if layer_kind(module) != "linear":
            yield f"{name} is of class {type(module).__name__}, which is no plain head"
        elif len(module.weight) != old:  # type: ignore[arg-type]
            yield f"{name} has {len(module.weight)} rows, {found.name} {old}"  # type: ignore[arg-type]
    own = set(found.all)
    for name, module in base_modules(model):
        if isinstance(module, nn.Embedding) and module.num_embeddings == old and name not in own:
            yield f"{name} has a row for every token, too, of which nothing is known"


def _other_ids(tokenizer: Any, trial: Any, found: Tables, grown: Vocabulary) -> Iterator[str]:
    """Why the tokenizer does not go with the model or with these tokens."""
    known = tokenizer.get_vocab()
    for token in grown.tokens:
        own = trial.convert_tokens_to_ids(token.text)
        if token.text in known:
            yield f"{token.text!r} is a token of the base already, {own}"
        elif own != token.id:
            yield f"{token.text!r} would be token {own} here, not {token.id}"
    rows = found.embedding.num_embeddings
    beyond = sorted((n, text) for text, n in known.items() if n >= rows)
    if beyond:
        homeless = [f"{text} ({n})" for n, text in beyond]
        yield (
            f"the tokenizer has tokens for which the model, of {rows} rows, has none:"
            f" {listed(homeless)}; take them out of the tokenizer first"
        )


@torch.no_grad()
def _grow(
    model: nn.Module,
    found: Tables,
    tokenizer: Any,
    grown: Vocabulary,
    starts: Mapping[str, Tensor],
) -> list[Callable[[], None]]:
    """Exchange the tables for larger ones; return what undoes that, in the order of the changes."""
    undo: list[Callable[[], None]] = []

    def put(owner: dict[str, Any], key: str, value: Any) -> None:
        before = owner.get(key)
        undo.append(lambda: owner.update({key: before}))
        owner[key] = value

    def resize(owner: Any, key: str) -> None:
        before = getattr(owner, key)
        undo.append(lambda: setattr(owner, key, before))
        setattr(owner, key, grown.rows)

    old = found.embedding.num_embeddings
    pieces = {token.id: _pieces(tokenizer, token.text) for token in grown.tokens}
    made: dict[int, nn.Parameter] = {}  # a tied weight stays one
    for name, module in found.all.items():
        weight = module._parameters["weight"]
        assert weight is not None
        if id(weight) not in made:
            made[id(weight)] = _larger(weight, grown.rows, pieces, starts.get(name))
        put(module._parameters, "weight", made[id(weight)])
        bias = module._parameters.get("bias")
        if bias is not None and grown.rows > old:
            longer = torch.cat([bias, bias.new_zeros(grown.rows - old)])
            put(module._parameters, "bias", nn.Parameter(longer, bias.requires_grad))
        resize(module, "num_embeddings" if module is found.embedding else "out_features")
    config: Any = model.config
    for owner in (config.get_text_config(), *model.modules()):
        if vars(owner).get("vocab_size") == old:
            resize(owner, "vocab_size")
    put(model.__dict__, MARK, grown)
    return undo


def _larger(
    weight: nn.Parameter, rows: int, pieces: Mapping[int, Sequence[int]], start: Tensor | None
) -> nn.Parameter:
    """A table [rows, dim] that begins with `weight`, the new tokens' rows as they start."""
    larger = weight.new_zeros(rows, weight.shape[1])
    larger[: len(weight)] = weight
    for token, parts in pieces.items():
        larger[token] = weight[torch.tensor(parts, device=weight.device)].float().mean(0)
    if start is not None:
        given = sorted({n for n in pieces if n < len(start)} | set(range(len(weight), len(start))))
        larger[given] = start[given].to(larger)
    return nn.Parameter(larger, weight.requires_grad)

"""Any number of adapters beside one base model, one of them in use."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from lorikeet.adapters.parts import Parts, read_parts
from lorikeet.adapters.schema import AdapterInfo
from lorikeet.errors import AdapterError
from lorikeet.lora import remove, require_plain, tables

_NAME = re.compile(r"\w[\w.-]*")


class AdapterSet:
    """Named adapters of one model, which is loaded once.

    `use` changes which modules the model calls and nothing else: no weight is written, copied or
    added to. Trained values live in the layers of their adapter until they are saved.

    An adapter with new tokens makes the base's vocabulary grow when it is loaded, for good: the
    base and all other adapters have the new rows as they were at the start. It must come before
    adapters that change embedding or head, and all that bring tokens must bring the same.

    Args:
        model: a base without adapters; it stays one until `use`. Its parameters get frozen.
        tokenizer: the model's; needed for adapters with new tokens, which it learns.

    Raises:
        AdapterError: the model carries an adapter already.
    """

    def __init__(self, model: nn.Module, *, tokenizer: Any = None) -> None:
        require_plain(model)
        self._model = model.requires_grad_(False)
        self._tokenizer = tokenizer
        self._parts: dict[str, Parts] = {}
        self._active: str | None = None

    @property
    def names(self) -> list[str]:
        """The adapters, in the order in which they came."""
        return list(self._parts)

    @property
    def active(self) -> str | None:
        """The adapter in use; None for the base alone."""
        return self._active

    def load(self, name: str, folder: Path) -> AdapterInfo:
        """Read an adapter folder; the adapter in use stays in use.

        Raises:
            AdapterError: the name is taken or not one, or the adapter cannot be read or does not
                fit; nothing is loaded then.
        """
        if not _NAME.fullmatch(name):
            raise AdapterError(
                f"an adapter cannot be called {name!r}: expected letters, digits, dots, dashes and"
                " underscores, the first of them no dot and no dash"
            )
        if name in self._parts:
            raise AdapterError(f"there is an adapter {name!r} already; drop it first")
        with self.using(None):
            info, parts = read_parts(
                self._model, folder, tokenizer=self._tokenizer, bound=self._bound()
            )
        for layer in parts.layers.values():
            layer.requires_grad_(False)
        for parameter in parts.whole.values():
            parameter.requires_grad_(False)
        self._parts[name] = parts
        return info

    def drop(self, name: str) -> None:
        """Forget an adapter; if it was in use, the base alone is."""
        self._require(name)
        if self._active == name:
            self.use(None)
        del self._parts[name]

    def use(self, name: str | None) -> None:
        """Make the model answer with this adapter, or as the base alone.

        Raises:
            AdapterError: there is no adapter of this name; the one in use stays.
        """
        if name is not None:
            self._require(name)
        if name == self._active:
            return
        remove(self._model)
        if name is not None:
            for layer in self._parts[name].layers.values():
                layer.train(self._model.training)
            self._parts[name].put(self._model)
        self._active = name

    @contextmanager
    def using(self, name: str | None) -> Iterator[None]:
        """Within the block the model answers with this adapter; afterwards as before."""
        before = self._active
        self.use(name)
        try:
            yield
        finally:
            self.use(before)

    def _bound(self) -> list[str]:
        """The adapters that change a table with a row for every token."""
        if self._tokenizer is None:  # without it no vocabulary grows
            return []
        names = set(tables(self._model).all)
        return [
            name
            for name, parts in self._parts.items()
            if names & {*parts.layers, *(whole.rpartition(".")[0] for whole in parts.whole)}
        ]

    def _require(self, name: str) -> None:
        if name not in self._parts:
            known = ", ".join(self._parts) or "none"
            raise AdapterError(f"there is no adapter {name!r}; loaded: {known}")

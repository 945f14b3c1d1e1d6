"""How a model is spoken to, in the metadata of a GGUF file: as it was in training."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import Keys

from lorikeet.data import Renderer
from lorikeet.errors import DataError, ModelError
from lorikeet.gguf.metadata import Field

_TEMPLATE = "tokenizer.chat_template"
_ADDS_BOS = "tokenizer.ggml.add_bos_token"
_EOS, _EOT, _EOM = Keys.Tokenizer.EOS_ID, Keys.Tokenizer.EOT_ID, Keys.Tokenizer.EOM_ID
_KNOWN_ENDS = frozenset(
    {
        *("<|eot_id|>", "<|im_end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>"),
        *("<EOT>", "_<EOT>", "<|end_of_text|>"),
    }
)
"""Tokens that end an answer in llama.cpp whatever a file says (src/llama-vocab.cpp)."""


@dataclass(frozen=True, slots=True)
class Chat:
    """The chat template that a model knows.

    Attributes:
        template: its Jinja source.
        begins: whether the ids of a rendered conversation begin with BOS; None if the template
            could not be tried.
        ends: tokens that end an answer.
    """

    template: str
    begins: bool | None
    ends: frozenset[int]

    @staticmethod
    def of(renderer: Renderer) -> Chat:
        """What a renderer shows to a model."""
        try:
            ids = renderer.prompt([{"role": "user", "content": "x"}])
        except DataError:  # a template that wants more than a question
            return Chat(renderer.template.text, None, renderer.stop_ids())
        bos = renderer.tokenizer.bos_token_id
        begins = bos is not None and ids[:1] == [bos]
        return Chat(renderer.template.text, begins, renderer.stop_ids())

    def metadata(self, fields: Mapping[str, Field]) -> dict[str, Field]:
        """The keys that make llama.cpp speak so.

        llama.cpp puts BOS before every rendered conversation if the tokenizer does so before texts.
        Where the template has the say and wants none, it would be a token that the model has never
        seen there; the key turns it off, for plain texts too.

        Args:
            fields: the keys of the vocabulary.
        """
        own = {_TEMPLATE: Field("str", self.template)}
        adds = fields.get(_ADDS_BOS)
        if adds and adds.value and self.begins is False:
            own[_ADDS_BOS] = Field("bool", False)
        return own


def read_generation(folder: Path) -> dict[str, Any]:
    """A model's generation_config.json; empty if there is none.

    Raises:
        ModelError: it is damaged.
    """
    path = folder / "generation_config.json"
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {path}: {error}") from None
    if not isinstance(found, dict):
        raise ModelError(f"{path} must hold an object, found a {type(found).__name__}")
    return found


def configured_ends(folder: Path, config: Mapping[str, Any]) -> frozenset[int]:
    """The tokens at which a model's own files say that an answer ends, as transformers reads them.

    Args:
        folder: the model's.
        config: its config.json, which counts where there is no generation_config.json.
    """
    given = (read_generation(folder) or config).get("eos_token_id")
    ids = given if isinstance(given, list) else [given]
    return frozenset(index for index in ids if type(index) is int)


def ending(
    fields: Mapping[str, Field], ids: Collection[int]
) -> tuple[dict[str, Field], tuple[str, ...]]:
    """Keys that make llama.cpp end an answer at tokens.

    A file has a place for three of them: EOS, EOT, EOM. Others end one only if llama.cpp knows
    their names.

    Args:
        fields: the keys of the vocabulary.
        ids: the tokens; those beyond the vocabulary are passed over.

    Returns:
        The keys, and the names of tokens for which there is no place left.
    """
    names = fields[Keys.Tokenizer.LIST].value
    held = {fields[key].value for key in (_EOS, _EOT, _EOM) if key in fields}
    more = [i for i in sorted(set(ids) - held) if 0 <= i < len(names)]
    more = [i for i in more if names[i] not in _KNOWN_ENDS]
    free = [key for key in (_EOM, _EOT) if key not in fields]
    found = {key: Field("u32", index) for key, index in zip(free, more, strict=False)}
    return found, tuple(names[index] for index in more[len(found) :])

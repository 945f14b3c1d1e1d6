"""How a model is spoken to, in the metadata of a GGUF file: as it was in training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lorikeet.data import Renderer
from lorikeet.errors import DataError
from lorikeet.gguf.metadata import Field

_TEMPLATE = "tokenizer.chat_template"
_ADDS_BOS = "tokenizer.ggml.add_bos_token"


@dataclass(frozen=True, slots=True)
class Chat:
    """The chat template that a model knows.

    Attributes:
        template: its Jinja source.
        begins: whether the ids of a rendered conversation begin with BOS; None if the template
            could not be tried.
    """

    template: str
    begins: bool | None

    @staticmethod
    def of(renderer: Renderer) -> Chat:
        """What a renderer shows to a model."""
        try:
            ids = renderer.prompt([{"role": "user", "content": "x"}])
        except DataError:  # a template that wants more than a question
            return Chat(renderer.template.text, None)
        bos = renderer.tokenizer.bos_token_id
        return Chat(renderer.template.text, bos is not None and ids[:1] == [bos])

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

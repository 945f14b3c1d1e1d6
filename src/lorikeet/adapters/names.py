"""The names that an adapter's tensors have in PEFT's files."""

from __future__ import annotations

from typing import Literal, NamedTuple

PREFIX = "base_model.model."

Part = Literal["A", "B", "magnitude"]


class Place(NamedTuple):
    """Where a tensor belongs.

    Attributes:
        module: full name of the adapted module.
        part: which of the adapter's tensors it is.
        embedding: whether the module is one; a magnitude does not tell, and says no.
    """

    module: str
    part: Part
    embedding: bool


_SUFFIXES: dict[str, tuple[Part, bool]] = {
    ".lora_A.weight": ("A", False),
    ".lora_B.weight": ("B", False),
    ".lora_embedding_A": ("A", True),
    ".lora_embedding_B": ("B", True),
    ".lora_magnitude_vector": ("magnitude", False),
}
_TOKENS = ".token_adapter.trainable_tokens_delta"


def tensor_name(module: str, part: Part, *, embedding: bool) -> str:
    """The name of a tensor in the file."""
    wanted = (part, embedding and part != "magnitude")
    suffix = next(suffix for suffix, found in _SUFFIXES.items() if found == wanted)
    return f"{PREFIX}{module}{suffix}"


def place(key: str) -> Place | None:
    """Where the tensor of this name belongs; None if it is none of an adapter's."""
    if not key.startswith(PREFIX):
        return None
    for suffix, (part, embedding) in _SUFFIXES.items():
        if key.endswith(suffix):
            return Place(key[len(PREFIX) : -len(suffix)], part, embedding)
    return None


def whole_key(parameter: str, *, adapted: bool) -> str:
    """The name in the file of a parameter of the base; `adapted` says whether its module is."""
    module, _, leaf = parameter.rpartition(".")
    return f"{PREFIX}{module}.base_layer.{leaf}" if adapted else f"{PREFIX}{parameter}"


def token_name(module: str) -> str:
    """The name in the file of the trained rows of an embedding or a head."""
    return f"{PREFIX}{module}{_TOKENS}"


def token_module(key: str) -> str | None:
    """The module whose trained rows the tensor of this name holds; None if it holds none."""
    if not (key.startswith(PREFIX) and key.endswith(_TOKENS)):
        return None
    return key[len(PREFIX) : -len(_TOKENS)]


_COPIES = ("", ".base_layer", ".token_adapter.base_layer")
"""What PEFT puts between a module and its parameter when it writes the base's own."""


def copy_names(parameter: str) -> list[str]:
    """The names in the file that a parameter of the base may have."""
    module, _, leaf = parameter.rpartition(".")
    return [f"{PREFIX}{module}{wrapped}.{leaf}" for wrapped in _COPIES]


def base_parameter(key: str) -> str:
    """The base's name of the parameter that a tensor of the file stands for."""
    name = key.removeprefix(PREFIX)
    for wrapped in reversed(_COPIES[1:]):
        name = name.replace(f"{wrapped}.", ".")
    return name

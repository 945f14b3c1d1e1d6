"""The types of options: how the text of a flag and a value in a YAML file become one value."""

from __future__ import annotations

import json
import re
from typing import Annotated

import yaml
from pydantic import BeforeValidator, Discriminator, Field, Tag


def _split_commas(value: object) -> object:
    """A flag gives `a,b` or a JSON list of texts; a YAML file gives a list."""
    if isinstance(value, str) and re.match(r"""\s*\[\s*['"]""", value):
        return _json_list(value)
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return value


def _json_list(value: str) -> list[str]:
    try:
        found = json.loads(value)
    except ValueError:
        found = None
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        raise ValueError(f"""expected a,b or ["a", "b"], found {value!r}""")
    return found


def _parse_mapping(value: object) -> object:
    """A flag gives `{q_proj: 8}` or `q_proj=8,k_proj=4`; a YAML file gives a mapping."""
    if not isinstance(value, str):
        return value
    expected = f"expected q_proj=8,k_proj=4 or {{q_proj: 8}}, found {value!r}"
    if value.lstrip().startswith("{"):
        try:
            return yaml.safe_load(value)
        except yaml.YAMLError:
            raise ValueError(expected) from None
    parts = [part.rpartition("=") for part in value.split(",") if part.strip()]
    if not all(key for key, _, _ in parts):
        raise ValueError(expected)
    return {key.strip(): size.strip() for key, _, size in parts}


def _parse_numbers(value: object) -> object:
    """`2-5` means 2, 3, 4 and 5; `0,3` and lists of integers are taken as they are."""
    if isinstance(value, int):
        return [value]
    if not isinstance(value, str):
        return value
    found: list[int] = []
    for part in value.split(","):
        first, _, last = part.partition("-")
        if not (first.strip().isdigit() and (not last or last.strip().isdigit())):
            raise ValueError(f"expected numbers such as '0,3' or '2-5', found {value!r}")
        numbers = range(int(first), int(last or first) + 1)
        if not numbers:
            raise ValueError(f"{part.strip()} runs backwards; expected numbers such as '2-5'")
        found.extend(numbers)
    return found


def _parse_tokens(value: object) -> object:
    """As `_parse_numbers`; or `{embed_tokens: [5, 9], lm_head: [5]}`, for a flag and for YAML."""
    if not isinstance(value, str) or not value.lstrip().startswith("{"):
        return _parse_numbers(value)
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        raise ValueError(f"expected {{embed_tokens: [5, 9]}}, found {value!r}") from None


def _targets(value: object) -> object:
    """A single name stays a string when it is `all-linear` or a regular expression."""
    parts = _split_commas(value)
    if isinstance(value, str) and (value == "all-linear" or not _is_name_list(value)):
        return value
    return parts


def _share_or_file(value: object) -> object:
    """A flag's `0.2` is a share; anything that is not a number is a file."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return value
    if isinstance(value, (int, float)) and not 0 <= value < 1:
        raise ValueError("expected a share from 0 up to (not including) 1, or a file")
    return value


def _is_name_list(value: str) -> bool:
    return all(c.isalnum() or c in "_,. " for c in value)


def _bytes(value: object) -> object:
    """`6GB`, `800 MB` or a number of bytes; decimal units, and binary ones (GiB) too."""
    if not isinstance(value, str) or value.strip().isdigit():
        return value
    match = re.fullmatch(r"([\d.]+)\s*([kmgt])(i?)b?", value.strip().lower())
    if match is None:
        raise ValueError(f"expected a size such as 6GB or 800MB, found {value!r}")
    number, unit, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** ("kmgt".index(unit) + 1))


Memory = Annotated[int, BeforeValidator(_bytes), Field(ge=1)]
Names = Annotated[list[str], BeforeValidator(_split_commas)]
Targets = Annotated[str | list[str], BeforeValidator(_targets)]
Layers = Annotated[list[int], BeforeValidator(_parse_numbers)]
_Ids = list[Annotated[int, Field(ge=0)]]
Tokens = Annotated[
    Annotated[_Ids, Tag("ids")] | Annotated[dict[str, _Ids], Tag("by module")],
    Discriminator(lambda value: "by module" if isinstance(value, dict) else "ids"),
    BeforeValidator(_parse_tokens),
]
IntMap = Annotated[dict[str, int], BeforeValidator(_parse_mapping)]
FloatMap = Annotated[dict[str, float], BeforeValidator(_parse_mapping)]
ShareOrFile = Annotated[float | str, BeforeValidator(_share_or_file)]

BRANCHES = ("str", "float", "list[str]", "ids", "by module")
"""What pydantic calls the members of these unions where an error lies; no names of options."""

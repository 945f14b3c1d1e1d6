"""Parameters of the base that are trained whole, beside the adapters: modules to save, biases.

A trained copy takes the place of the base's parameter in its module; the base's own is kept aside,
untouched, and comes back when adapters are disabled, swapped or removed. A weight that other
modules share stays the base's for them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from torch import nn

from lorikeet.config import LoraConfig
from lorikeet.errors import AdapterError
from lorikeet.lora.targets import base_modules

_ASIDE = "_lorikeet_base"  # a module's own parameters whose places are taken, by name


def whole_names(model: nn.Module, config: LoraConfig, targets: Iterable[str]) -> list[str]:
    """Full names of the base's parameters that are trained whole.

    `modules_to_save` names modules by the end of their names, whatever comes before it (as in PEFT,
    "norm" takes in "input_layernorm"); `bias` is "none", "all", or
    "lora_only" for those of the adapted modules `targets`.

    Raises:
        AdapterError: a module to save matches nothing, is adapted, or holds one that is.
    """
    modules = dict(base_modules(model))
    adapted = set(targets)
    found: dict[str, None] = {}
    problems: list[str] = []
    for entry in config.modules_to_save or []:
        saved = [name for name in modules if name.endswith(entry)]
        if not saved:
            problems.append(f"modules_to_save: {entry!r} matches no module")
        for name in saved:
            inner = [n for n in modules if n == name or n.startswith(f"{name}.")]
            both = sorted(adapted & set(inner))
            if both:
                problems.append(f"modules_to_save: {entry!r} takes in {both[0]}, which is adapted")
            own = (
                f"{n}.{leaf}"
                for n in inner
                for leaf in modules[n]._parameters
                if _has(modules[n], leaf)
            )
            found.update(dict.fromkeys(own))
    if config.bias != "none":
        chosen = (
            modules if config.bias == "all" else {n: modules[n] for n in modules if n in adapted}
        )
        biases = [f"{name}.bias" for name, module in chosen.items() if _has(module, "bias")]
        found.update(dict.fromkeys(biases))
    if problems:
        raise AdapterError("what is to be trained whole does not fit the model:", problems)
    return list(found)


def trained_copies(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Parameter]:
    """New parameters equal to the base's, by full name; the model does not use them yet."""
    modules = dict(base_modules(model))
    copies = {}
    for name in names:
        module, _, leaf = name.rpartition(".")
        copies[name] = nn.Parameter(modules[module]._parameters[leaf].detach().clone())  # type: ignore[union-attr]
    return copies


def put_whole(model: nn.Module, copies: Mapping[str, nn.Parameter]) -> None:
    """Put trained copies in the places of the base's parameters."""
    modules = dict(base_modules(model))
    for name, copy in copies.items():
        module, _, leaf = name.rpartition(".")
        aside = modules[module].__dict__.setdefault(_ASIDE, {})
        aside[leaf] = modules[module]._parameters[leaf]
        modules[module]._parameters[leaf] = copy


def whole_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained copies in the model, by the full name of the base's parameter."""
    return {
        f"{name}.{leaf}": parameter
        for name, module in base_modules(model)
        for leaf in module.__dict__.get(_ASIDE, {})
        if (parameter := module._parameters[leaf]) is not None
    }


def own_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The base's parameters by full name, each of a tie, whatever stands in their places."""
    for name, module in base_modules(model):
        aside = module.__dict__.get(_ASIDE, {})
        for leaf, parameter in module._parameters.items():
            own = aside.get(leaf, parameter)
            if own is not None:
                yield f"{name}.{leaf}", own


def take_whole(model: nn.Module) -> dict[str, nn.Parameter]:
    """Put the base's parameters back; return the copies that stood in their places."""
    taken = whole_parameters(model)
    for _, module in base_modules(model):
        for leaf, own in module.__dict__.pop(_ASIDE, {}).items():
            module._parameters[leaf] = own
    return taken


def _has(module: nn.Module, leaf: str) -> bool:
    return isinstance(module._parameters.get(leaf), nn.Parameter)

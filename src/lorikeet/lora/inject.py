"""Adapters into a model and out of it: the model is changed in place, its weights never."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from lorikeet.config import LoraConfig
from lorikeet.errors import AdapterError
from lorikeet.lora.layer import LoraEmbedding, LoraLayer, LoraLinear
from lorikeet.lora.targets import Target, find_targets
from lorikeet.lora.tokens import (
    TokenEmbedding,
    TokenHead,
    TokenLayer,
    token_layers,
    token_layers_around,
    trained_ids,
)
from lorikeet.lora.whole import (
    put_whole,
    take_whole,
    trained_copies,
    whole_names,
    whole_parameters,
)


def inject(model: nn.Module, config: LoraConfig, *, seed: int) -> list[Target]:
    """Freeze `model`, wrap the modules that `config` names and draw fresh adapters.

    A fresh adapter changes nothing: B is zero. What A becomes depends on the seed and the
    module's name alone, not on the other targets, the device, the dtype or the global generators;
    with PiSSA it depends on the weight alone. Rows of trained tokens start as the base's; through a
    tied head their logits may differ from the base's by rounding.

    Raises:
        AdapterError: the model carries adapters already, or the configuration does not fit it.
    """
    require_plain(model)
    targets = find_targets(model, config)
    if config.init == "pissa":
        _require_rank(model, targets)
    names = whole_names(model, config, [target.name for target in targets])
    if config.bias != "none" and not any(name.endswith(".bias") for name in names):
        raise AdapterError(f"bias is {config.bias!r}, but the model has no such bias to train")
    tokens = token_layers_around(
        model,
        trained_ids(model, config, whole=names),
        adapted={target.name for target in targets},
        whole=names,
    )
    whole = trained_copies(model, names)
    layers = attach(model, targets, dropout=config.dropout, dora=config.dora)
    put_whole(model, whole)
    wrap(model, tokens)
    for name, layer in layers.items():
        layer.reset(layer_generator(seed, name), config.init)
    return targets


def _require_rank(model: nn.Module, targets: Sequence[Target]) -> None:
    """PiSSA takes as many singular triplets as the rank says; there must be so many."""
    sides = {t.name: min(model.get_parameter(f"{t.name}.weight").shape) for t in targets}
    short = [f"{t.name} (rank {t.r} of {sides[t.name]})" for t in targets if t.r > sides[t.name]]
    if short:
        raise AdapterError("PiSSA has fewer singular values than the rank asks for in:", short)


def attach(
    model: nn.Module, targets: Sequence[Target], *, dropout: float, dora: bool = False
) -> dict[str, LoraLayer]:
    """Freeze `model` and wrap `targets`, with A and B zero; return the new layers by name.

    Raises:
        AdapterError: the model carries adapters already, or DoRA is to adapt an embedding.
    """
    require_plain(model)
    model.requires_grad_(False)
    layers = layers_around(model, targets, dropout=dropout, dora=dora)
    wrap(model, layers)
    return layers


def layers_around(
    model: nn.Module, targets: Sequence[Target], *, dropout: float, dora: bool = False
) -> dict[str, LoraLayer]:
    """New layers around the targets, by name, A and B zero; the model does not use them yet.

    Raises:
        AdapterError: DoRA is to adapt an embedding.
    """
    embeddings = [target.name for target in targets if target.kind == "embedding"]
    if dora and embeddings:
        raise AdapterError(
            f"DoRA adapts linear layers only, and {', '.join(embeddings)} is an embedding; leave"
            " it out of the targets or turn lora.dora off"
        )
    layers: dict[str, LoraLayer] = {}
    for target in targets:
        base = model.get_submodule(target.name)
        if isinstance(base, nn.Embedding):
            layers[target.name] = LoraEmbedding(base, r=target.r, scale=target.scale)
        else:
            layers[target.name] = LoraLinear(
                base, r=target.r, scale=target.scale, dropout=dropout, dora=dora
            )
    return layers


def wrap(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Put layers in the places of the modules that they wrap."""
    for name, layer in layers.items():
        _replace(model, name, layer)


def layer_generator(seed: int, name: str) -> torch.Generator:
    """The CPU generator of one module's adapter, a function of the run's seed and the name."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """The adapted layers by the name of the module that each wraps, in the model's order."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LoraLinear | LoraEmbedding)
    }


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The masters by name: `<module>.lora_A` [r, in], `<module>.lora_B` [out, r], and with DoRA
    `<module>.magnitude` [out]; of trained tokens `<embedding or head>.rows` [n, dim]."""
    return {
        f"{name}.{own}": parameter
        for name, layer in _wrappers(model).items()
        for own, parameter in layer.named_parameters(recurse=False)
    }


def _wrappers(model: nn.Module) -> dict[str, LoraLayer | TokenLayer]:
    """Everything that stands in the place of a module of the base, in the model's order."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LoraLinear | LoraEmbedding | TokenEmbedding | TokenHead)
    }


def remove(model: nn.Module) -> None:
    """Put the base's modules and parameters back, the very objects; they stay frozen."""
    take_whole(model)
    for name, layer in _wrappers(model).items():
        _replace(model, name, layer.base)


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Within the block the adapters contribute nothing: outputs are the base's, bit for bit."""
    layers = list(_wrappers(model).values())
    before = [layer.enabled for layer in layers]
    for layer in layers:
        layer.enabled = False
    whole = take_whole(model)
    try:
        yield
    finally:
        put_whole(model, whole)
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled


def require_plain(model: nn.Module) -> None:
    """Check that the model carries no adapter yet.

    Raises:
        AdapterError: it does.
    """
    layers = lora_layers(model)
    if layers:
        raise AdapterError(
            f"the model already carries {len(layers)} LoRA layers (the first at"
            f" {next(iter(layers))}); remove them first"
        )
    if token_layers(model):
        raise AdapterError("the model already carries trained tokens; remove them first")
    if whole_parameters(model):
        raise AdapterError("the model already carries trained copies of parameters; remove them")


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)

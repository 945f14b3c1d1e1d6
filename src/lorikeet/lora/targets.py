"""Which modules a LoraConfig means, with PEFT's matching rules and a finding for every miss."""

from __future__ import annotations

import copy
import difflib
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from lorikeet.config import LoraConfig
from lorikeet.errors import AdapterError
from lorikeet.lora.layer import LoraEmbedding, LoraLinear

Kind = Literal["linear", "conv1d", "embedding"]

# The first numbered segment is the block: `model.layers.3.mlp.experts.0` is in block 3 (as PEFT).
_BLOCK = re.compile(r".*?\.[^.]*\.(?P<block>\d+)\.")


@dataclass(frozen=True, slots=True)
class Target:
    """A module that is adapted, and how.

    Attributes:
        name: the module's full name in the model, such as `model.layers.0.self_attn.q_proj`.
        kind: what is wrapped.
        r: rank.
        alpha: numerator of the scale.
        scale: alpha / r, or alpha / sqrt(r) with rank-stabilised scaling (arXiv:2312.03732).
    """

    name: str
    kind: Kind
    r: int
    alpha: float
    scale: float

    @property
    def leaf(self) -> str:
        """The last part of the name, such as `q_proj`."""
        return leaf_name(self.name)


@dataclass(frozen=True, slots=True)
class Match:
    """What a configuration selects in a model.

    Attributes:
        targets: in the model's order; empty if the configuration is broken.
        broken: what cannot be done at all: broken patterns, modules of an unsupported class.
        unused: entries of the configuration that select nothing.
    """

    targets: tuple[Target, ...]
    broken: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()


def find_targets(model: nn.Module, config: LoraConfig) -> list[Target]:
    """List the modules that `config` adapts, in the model's order.

    A name matches the module of that name and those whose name ends with it after a dot; a string
    is a regular expression for the full name; "all-linear" is every linear layer but the output
    head; `layers` keeps numbered blocks (a module given by its full name stays); the keys of
    `rank_pattern` and `alpha_pattern` match the end of a name, the first that matches wins.
    Modules that already carry an adapter are seen as their base.

    Raises:
        AdapterError: an entry matches nothing, a regular expression is broken, or a matched
            module is none of `nn.Linear`, `Conv1D` and `nn.Embedding`; lists every such finding.
    """
    match = match_targets(model, config)
    if match.broken or match.unused:
        raise AdapterError(
            f"the adapter does not fit the model, which has {inventory(model)}:",
            [*match.broken, *match.unused],
        )
    return list(match.targets)


def match_targets(model: nn.Module, config: LoraConfig) -> Match:
    """As `find_targets`, but return the findings instead of raising them."""
    unreadable = list(_unreadable_patterns(config))
    if unreadable:
        return Match((), broken=(*unreadable, *_out_of_bounds(config)))
    modules = dict(base_modules(model))
    selected = _selected(model, modules, config)
    kinds = {name: layer_kind(modules[name]) for name in selected}
    broken = (
        *_out_of_bounds(config),
        *_class_problems({n: modules[n] for n, kind in kinds.items() if kind is None}, config),
    )
    unused = (
        *_target_problems(config, selected, modules),
        *_exclude_problems(config, modules),
        *_layer_problems(config, selected),
        *_key_problems("rank_pattern", config.rank_pattern, selected),
        *_key_problems("alpha_pattern", config.alpha_pattern, selected),
    )
    if broken:
        return Match((), broken, unused)
    targets = (_target(name, kind, config) for name, kind in kinds.items() if kind is not None)
    return Match(tuple(targets), unused=unused)


def out_of_reach(model: nn.Module, config: LoraConfig) -> list[str]:
    """A warning if `all-linear` leaves out experts, whose weights are stacked, else nothing."""
    if config.target_modules != "all-linear":
        return []
    stacked = {
        name: module
        for name, module in base_modules(model)
        if "Experts" in type(module).__name__
        and any(p.dim() == 3 for p in module.parameters(recurse=False))
    }
    if not stacked:
        return []
    inside = sum(p.numel() for module in stacked.values() for p in module.parameters())
    share = inside / sum(p.numel() for p in model.parameters())
    leaves = ", ".join(dict.fromkeys(map(leaf_name, stacked)))
    return [
        f"all-linear leaves out {leaves} ({share:.0%} of the model): their weights are stacked, and"
        f" no adapter can take them; --lora.modules_to_save {leaves} trains them whole"
    ]


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the model's modules by name as they are without adapters."""
    wrapped: set[str] = set()
    for name, module in model.named_modules():
        if name.rpartition(".")[0] in wrapped or not name:
            continue
        if isinstance(module, LoraLinear | LoraEmbedding):
            wrapped.add(name)
            yield name, module.base
        else:
            yield name, module


def leaf_name(name: str) -> str:
    """The last part of a dotted name."""
    return name.rpartition(".")[2]


def _selected(
    model: nn.Module, modules: dict[str, nn.Module], config: LoraConfig
) -> dict[str, bool]:
    """Names that the configuration selects; the value says whether `layers` had a say in it."""
    head = _output_head(model)
    selected: dict[str, bool] = {}
    for name, module in modules.items():
        if config.exclude_modules and _matches(config.exclude_modules, name):
            continue
        if config.target_modules == "all-linear":
            found = (isinstance(module, nn.Linear) or _is_conv1d(module)) and module is not head
        else:
            found = _matches(config.target_modules, name)
        exact = isinstance(config.target_modules, list) and name in config.target_modules
        if found and (exact or not config.layers or block_number(name) in config.layers):
            selected[name] = bool(config.layers) and not exact
    return selected


def block_number(name: str) -> int | None:
    """The number of the block that a module belongs to, or None outside of the blocks."""
    found = _BLOCK.match(name)
    return int(found["block"]) if found else None


def _matches(selector: str | list[str], name: str) -> bool:
    if isinstance(selector, str):
        return re.fullmatch(selector, name) is not None
    return any(_is_named(name, entry) for entry in selector)


def _is_named(name: str, entry: str) -> bool:
    return name == entry or name.endswith(f".{entry}")


def _key_matches(key: str, name: str) -> bool:
    return re.match(rf"(.*\.)?({key})$", name) is not None


def _output_head(model: nn.Module) -> nn.Module | None:
    # Only transformers' models have this method; another nn.Module has no head to spare.
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head else None
    return head.base if isinstance(head, LoraLinear) else head


def layer_kind(module: nn.Module) -> Kind | None:
    """What a module can be wrapped as; a subclass that computes something else is not taken."""
    forward = type(module).forward
    if isinstance(module, nn.Linear) and (forward is nn.Linear.forward or _computes_linear(module)):
        return "linear"
    if _is_conv1d(module):
        return "conv1d"
    scaled = getattr(module, "embed_scale", None) is not None
    if isinstance(module, nn.Embedding) and (forward is nn.Embedding.forward or scaled):
        return "embedding"
    return None


def _computes_linear(module: nn.Linear) -> bool:
    """Whether a subclass with a forward pass of its own (Falcon's) gives x Wᵀ + b all the same.

    It is tried with small weights in the place of its own, which may be on the meta device. One
    that keeps more than a weight and a bias (scales, other modules) is not tried: it uses them.
    """
    held = [name for name, _ in [*module.named_parameters(), *module.named_buffers()]]
    if not {*held, *module._modules} <= {"weight", "bias"}:
        return False
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(s, generator=generator) for s in ((2, 3, 5), (7, 5), (7,)))
    own = {"weight": weight, "bias": bias if "bias" in held else None}
    trial = copy.copy(module)
    trial.__dict__ |= {"_parameters": own, "in_features": 5, "out_features": 7}
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            for training in (True, False):
                trial.training = training
                found = type(module).forward(trial, x)
                torch.testing.assert_close(found, F.linear(x, weight, own["bias"]))
    except Exception:  # whatever it raises, it is no plain product
        return False
    return True


def _is_conv1d(module: nn.Module) -> bool:
    """GPT-2's linear layer, which transformers keeps under this name; its weight is [in, out]."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def scaled_rank(config: LoraConfig, name: str) -> tuple[int, float, float]:
    """Rank, alpha and scale that a configuration gives the module of this full name."""
    r = next((v for k, v in config.rank_pattern.items() if _key_matches(k, name)), config.r)
    alphas = (v for k, v in config.alpha_pattern.items() if _key_matches(k, name))
    alpha = next(alphas, config.alpha)
    return r, alpha, alpha / math.sqrt(r) if config.rslora else alpha / r


def _target(name: str, kind: Kind, config: LoraConfig) -> Target:
    return Target(name, kind, *scaled_rank(config, name))


def _unreadable_patterns(config: LoraConfig) -> Iterator[str]:
    """Regular expressions that do not compile."""
    patterns = [("rank_pattern", key) for key in config.rank_pattern]
    patterns += [("alpha_pattern", key) for key in config.alpha_pattern]
    if isinstance(config.target_modules, str):
        patterns.append(("target_modules", config.target_modules))
    if isinstance(config.exclude_modules, str):
        patterns.append(("exclude_modules", config.exclude_modules))
    for field, pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            yield f"{field}: {pattern!r} is not a regular expression: {error}"


def _out_of_bounds(config: LoraConfig) -> Iterator[str]:
    for key, r in config.rank_pattern.items():
        if r < 1:
            yield f"rank_pattern: {key} = {r}; a rank is at least 1"
    for key, alpha in config.alpha_pattern.items():
        if not alpha > 0:
            yield f"alpha_pattern: {key} = {alpha:g}; an alpha is above 0"


def _target_problems(
    config: LoraConfig, selected: Iterable[str], modules: dict[str, nn.Module]
) -> Iterator[str]:
    names, targets = list(selected), config.target_modules
    if isinstance(targets, str):
        if not names:
            yield f"target_modules: {targets!r} selects no module"
        return
    if not targets:
        yield "target_modules: the list is empty"
    for entry in targets:
        if any(_is_named(name, entry) for name in names):
            continue
        if any(_is_named(name, entry) for name in modules):
            reason = "only modules that exclude_modules or layers leave out"
            yield f"target_modules: {entry!r} matches {reason}"
        else:
            yield f"target_modules: {entry!r} matches no module{_suggestion(entry, modules)}"


def _exclude_problems(config: LoraConfig, modules: dict[str, nn.Module]) -> Iterator[str]:
    # One of a class that cannot be adapted, too: all-linear would find it.
    layers = [n for n, m in modules.items() if layer_kind(m) or isinstance(m, nn.Linear)]
    selector = config.exclude_modules or []
    for entry in [selector] if isinstance(selector, str) else selector:
        if not any(_matches(entry if entry is selector else [entry], name) for name in layers):
            what = f"exclude_modules: {entry!r} matches no linear layer and no embedding"
            yield what + _suggestion(entry, layers)


def _layer_problems(config: LoraConfig, selected: dict[str, bool]) -> Iterator[str]:
    blocks = {block_number(name) for name, by_layer in selected.items() if by_layer}
    missing = [number for number in config.layers or [] if number not in blocks]
    if missing:
        yield f"layers: no target in block {', '.join(map(str, missing))}"


def _key_problems(field: str, pattern: Iterable[str], selected: Iterable[str]) -> Iterator[str]:
    names = list(selected)
    for key in pattern:
        if not any(_key_matches(key, name) for name in names):
            yield f"{field}: {key!r} matches none of the targets{_suggestion(key, names)}"


def _class_problems(unsupported: dict[str, nn.Module], config: LoraConfig) -> Iterator[str]:
    """One line a class, naming its first module."""
    by_class: dict[str, list[str]] = {}
    for name, module in unsupported.items():
        by_class.setdefault(type(module).__name__, []).append(name)
    for cls, names in by_class.items():
        others = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        leaves = ",".join(dict.fromkeys(map(leaf_name, names)))
        named = isinstance(config.target_modules, list)  # what is named is not left out again
        way_out = "" if named else f"; --lora.exclude_modules {leaves} leaves it out"
        yield (
            f"target_modules: {names[0]}{others} is of class {cls};"
            f" only Linear, Conv1D and Embedding can be adapted{way_out}"
        )


def _suggestion(entry: str, names: Iterable[str]) -> str:
    known = names if "." in entry else map(leaf_name, names)
    close = difflib.get_close_matches(entry, dict.fromkeys(known), n=3)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def inventory(model: nn.Module) -> str:
    """The leaf names that can be adapted: `q_proj, k_proj linear; embed_tokens embedding`."""
    leaves: dict[Kind, dict[str, None]] = {"linear": {}, "conv1d": {}, "embedding": {}}
    for name, module in base_modules(model):
        kind = layer_kind(module)
        if kind is not None:
            leaves[kind][leaf_name(name)] = None
    parts = [f"{', '.join(found)} ({kind})" for kind, found in leaves.items() if found]
    return "; ".join(parts) or "no layer that can be adapted"

"""Whether the tensors of an adapter file are exactly those that a model's targets need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from lorikeet.adapters.names import Part, copy_names, tensor_name
from lorikeet.lora import Target, own_parameters

_SHOWN = 8  # names per kind of finding; the rest is counted


def misfits(
    model: nn.Module,
    targets: Sequence[Target],
    tensors: Mapping[str, torch.Tensor],
    *,
    dora: bool = False,
    whole: Mapping[str, str] | None = None,
    rows: Mapping[str, tuple[int, ...]] | None = None,
) -> list[str]:
    """Describe every way in which `tensors` differ from what is needed; empty if none.

    Copies of the base model's own weights are allowed in the file if they are equal to them.

    Args:
        model: the base.
        targets: the adapted modules.
        tensors: the file's.
        dora: whether there are magnitudes.
        whole: parameters of the base that were trained whole, name in the file by their own.
        rows: shapes of the rows of trained tokens by their name in the file.
    """
    expected = _expected_shapes(model, targets, dora)
    base = dict(own_parameters(model))
    expected.update({key: tuple(base[name].shape) for name, key in (whole or {}).items()})
    expected.update(rows or {})
    shared = [key for key in expected if key in tensors]
    others = [key for key in tensors if key not in expected]
    own = _own_weights(model)
    findings = {
        "missing": [key for key in expected if key not in tensors],
        "unexpected": [key for key in others if key not in own],
        "misshapen": [
            f"{key} is {list(tensors[key].shape)}, needed is {list(expected[key])}"
            for key in shared
            if tuple(tensors[key].shape) != expected[key]
        ],
        "not floating-point": [k for k in shared if not tensors[k].is_floating_point()],
        "not finite": [k for k in shared if not tensors[k].isfinite().all()],
        "base weights that differ from the model's (resized or retrained?)": [
            key for key in others if key in own and not _is_copy(tensors[key], own[key])
        ],
    }
    return [listing(what, names) for what, names in findings.items() if names]


def listing(what: str, names: Sequence[str]) -> str:
    """One line: what is wrong, with how many tensors, and the first of their names."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{what} ({len(names)}): {', '.join(names[:_SHOWN])}{more}"


def _expected_shapes(
    model: nn.Module, targets: Sequence[Target], dora: bool
) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for target in targets:
        weight = model.get_parameter(f"{target.name}.weight")
        fan_in, fan_out = weight.shape[::-1] if target.kind == "linear" else weight.shape
        own: dict[Part, tuple[int, ...]] = {"A": (target.r, fan_in), "B": (fan_out, target.r)}
        if dora:
            own["magnitude"] = (fan_out,)
        embedding = target.kind == "embedding"
        for part, shape in own.items():
            shapes[tensor_name(target.name, part, embedding=embedding)] = shape
    return shapes


def _own_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's weights under the names that PEFT saves them by, adapted or not."""
    weights: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        weights |= dict.fromkeys(copy_names(name), parameter.detach())
    return weights


def _is_copy(saved: torch.Tensor, own: torch.Tensor) -> bool:
    """Whether a saved base weight is the model's, in the coarser of the two dtypes."""
    if saved.shape != own.shape:
        return False
    own = own.cpu()
    return torch.equal(own.to(saved.dtype), saved) or torch.equal(saved.to(own.dtype), own)

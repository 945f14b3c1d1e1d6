"""How many parameters a model has and how many of them are trained."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lorikeet.lora.inject import lora_layers, lora_parameters
from lorikeet.lora.targets import leaf_name
from lorikeet.lora.tokens import token_layers
from lorikeet.lora.whole import own_parameters, whole_parameters


@dataclass(frozen=True, slots=True)
class ParameterReport:
    """Parameter counts.

    Attributes:
        base: parameters of the model without adapters; tied weights count once.
        trainable: parameters that receive gradients.
        by_target: the trained parameters by the last part of the module name (`q_proj`, ...).
    """

    base: int
    trainable: int
    by_target: dict[str, int]

    @property
    def percent(self) -> float:
        """Trainable parameters in per cent of the base model's."""
        return 100.0 * self.trainable / self.base


def parameter_report(model: nn.Module) -> ParameterReport:
    """Count the parameters of a model, with or without adapters; works on the meta device."""
    adapters = {id(p) for p in lora_parameters(model).values()}
    own = {id(p): p for _, p in own_parameters(model) if id(p) not in adapters}
    by_target: dict[str, int] = {}
    for name, layer in lora_layers(model).items():
        leaf = leaf_name(name)
        size = sum(master.numel() for master in layer.parameters(recurse=False))
        by_target[leaf] = by_target.get(leaf, 0) + size
    for name, wrapper in token_layers(model).items():
        if wrapper.rows is not None:
            by_target[f"{leaf_name(name)}, single tokens"] = wrapper.rows.numel()
    for name, parameter in whole_parameters(model).items():
        leaf = f"{leaf_name(name.rpartition('.')[0])}, whole"
        by_target[leaf] = by_target.get(leaf, 0) + parameter.numel()
    return ParameterReport(
        base=sum(p.numel() for p in own.values()),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        by_target=by_target,
    )

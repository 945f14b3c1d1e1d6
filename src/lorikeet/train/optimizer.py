"""AdamW on float32 masters, whatever the precision of the model."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorikeet.errors import TrainingError


class Optimizer:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) with gradient clipping.

    Parameters that are already float32 (LoRA's A and B) are updated in place. Others (full
    fine-tuning in bf16) get a float32 master, because bf16 would round small updates away; their
    gradients are added up in float32 and the result is copied back once a step.

    `moved` names the parameters that have had a gradient other than zero so far, `updates` counts
    the updates of this process (with loss scaling a step that overflows makes none).

    Args:
        parameters: name to trainable parameter.
        weight_decay: decoupled decay of matrices; vectors (norms, biases) never decay.
        max_grad_norm: clip the global gradient norm to this; 0 for none.
        loss_scaling: scale losses dynamically, for fp16 activations.
        loraplus_lr_ratio: learning rate of every B over that of all else (LoRA+: Hayou et al. 2024,
            arXiv:2402.12354, equation 5).
        sparse: names of tables of which a step moves the rows that it shows, which may be none.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        *,
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
        loss_scaling: bool = False,
        loraplus_lr_ratio: float = 1.0,
        sparse: Collection[str] = (),
    ) -> None:
        self.parameters = dict(parameters)
        self.masters = {name: _master(p) for name, p in self.parameters.items()}
        self.max_grad_norm = max_grad_norm
        self.sparse = frozenset(sparse)
        groups: dict[tuple[bool, float], dict[str, Any]] = {}
        for name, master in self.masters.items():
            matrix = master.dim() > 1
            ratio = loraplus_lr_ratio if name.endswith(".lora_B") else 1.0
            group = {"params": [], "weight_decay": weight_decay if matrix else 0.0, "ratio": ratio}
            groups.setdefault((not matrix, ratio), group)["params"].append(master)
        ordered = [groups[key] for key in sorted(groups)]
        self._adamw = torch.optim.AdamW(ordered, lr=0.0, fused=True)
        device = next(iter(self.masters.values())).device.type
        self._scaler = torch.amp.GradScaler(device, enabled=loss_scaling)
        self.moved: set[str] = set()
        self.updates = 0

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss` (a scalar) to what this step has gathered."""
        self._scaler.scale(loss).backward()
        for name, parameter in self.parameters.items():
            master = self.masters[name]
            if master is parameter or parameter.grad is None:
                continue
            if master.grad is None:
                master.grad = torch.zeros_like(master)
            master.grad += parameter.grad
            parameter.grad = None

    def step(self, learning_rate: float) -> float:
        """Clip, update, clear the gradients; return the gradient norm before clipping.

        Raises:
            TrainingError: the gradient is not finite and loss scaling is off; nothing is updated.
        """
        self._note_moved()
        self._scaler.unscale_(self._adamw)
        gradients = [m.grad for m in self.masters.values() if m.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        finite = bool(norm.isfinite())
        if not finite and not self._scaler.is_enabled():
            raise TrainingError(
                "the gradient is not finite; the weights of the last step are kept."
                " Try a lower learning rate or --model.dtype fp32"
            )
        if self.max_grad_norm:
            torch.nn.utils.clip_grads_with_norm_(self.masters.values(), self.max_grad_norm, norm)
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate * group["ratio"]
        self._scaler.step(self._adamw)
        self._scaler.update()
        self._adamw.zero_grad(set_to_none=True)
        self._publish()
        self.updates += finite
        return float(norm)

    def _note_moved(self) -> None:
        for name in self.masters.keys() - self.moved:
            gradient = self.masters[name].grad
            if gradient is not None and bool(gradient.any()):
                self.moved.add(name)

    @torch.no_grad()
    def _publish(self) -> None:
        for name, parameter in self.parameters.items():
            if self.masters[name] is not parameter:
                parameter.copy_(self.masters[name])

    def state_dict(self) -> dict[str, Any]:
        """Everything that a bit-exact resume needs, the masters included."""
        return {
            "adamw": self._adamw.state_dict(),
            "scaler": self._scaler.state_dict(),
            "masters": {name: master.detach() for name, master in self.masters.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict()`, the model's own trainable parameters included."""
        self._adamw.load_state_dict(state["adamw"])
        if self._scaler.is_enabled():
            self._scaler.load_state_dict(state["scaler"])
        self.load_masters(state["masters"])

    @torch.no_grad()
    def load_masters(self, masters: Mapping[str, Tensor]) -> None:
        """Overwrite the weights, by name; the moments of AdamW stay."""
        for name, master in self.masters.items():
            master.copy_(masters[name])
        self._publish()


def _master(parameter: nn.Parameter) -> Tensor:
    if parameter.dtype in (torch.float32, torch.float64):
        return parameter
    return parameter.detach().float().requires_grad_()

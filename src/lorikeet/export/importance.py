"""How much every column of a weight matters: the importance matrix of llama.cpp.

A linear layer multiplies column j of its weight with the j-th value of its input, so an error there
costs in proportion to that value's mean square. Quantisers weigh their errors by it (llama.cpp,
tools/imatrix: sums of squares over the tokens of a text, divided by their number; neither the
embedding nor the head has one).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorikeet.data import Example, pack
from lorikeet.errors import DataError
from lorikeet.gguf.metadata import Field
from lorikeet.lora import LoraLinear


@dataclass(frozen=True, slots=True, eq=False)
class Importance:
    """Mean squares of the inputs of linear layers.

    Attributes:
        means: float32 [in] by the name of the weight.
        documents: how many were run through the model.
        tokens: how many tokens they have.
        source: where they come from, for the file's metadata.
    """

    means: Mapping[str, Tensor]
    documents: int
    tokens: int
    source: str

    def of(self, weight: str) -> Tensor | None:
        """The importance of a weight's columns, float32 [in]; None for a weight without one.

        A base model's checkpoint names its weights without the prefix `model.`.
        """
        found = self.means.get(weight)
        return self.means.get(f"model.{weight}") if found is None else found

    def metadata(self) -> dict[str, Field]:
        """The keys with which llama-quantize marks a file that was made with a matrix."""
        return {
            "quantize.imatrix.file": Field("str", self.source),
            "quantize.imatrix.dataset": Field("str", self.source),
            "quantize.imatrix.entries_count": Field("i32", len(self.means)),
            "quantize.imatrix.chunks_count": Field("i32", self.documents),
        }


@torch.no_grad()
def measure_importance(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    source: str,
    progress: Callable[[int, int], None] | None = None,
) -> Importance:
    """Run documents through a model, with or without an adapter, and look at what goes in where.

    Every token counts, supervised or not.

    Args:
        model: a causal language model in eval mode.
        examples: the documents, each by itself.
        source: where they come from.
        progress: is told how many documents are through, and of how many.

    Raises:
        DataError: there are no documents.
    """
    if not examples:
        raise DataError("there is nothing to calibrate on: the file has no documents")
    sums: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def add(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            squares = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).float().square().sum(0)
            sums[name] = sums[name] + squares.double() if name in sums else squares.double()

        return add

    tokens = 0
    device = next(model.parameters()).device
    with ExitStack() as hooks:
        for name, module in _linear_layers(model).items():
            handle = module.register_forward_pre_hook(watch(f"{name}.weight"))
            hooks.callback(handle.remove)
        for i, example in enumerate(examples):
            ids = pack([example]).to(device).ids
            model(input_ids=ids[None], use_cache=False, logits_to_keep=1)
            tokens += len(ids)
            if progress:
                progress(i + 1, len(examples))
    means = {name: (total / tokens).float().cpu() for name, total in sums.items()}
    return Importance(means, len(examples), tokens, source)


def _linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers by the names that they have without adapters, the head left out."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = name.rpartition(".")[0] in found
        if isinstance(module, nn.Linear | LoraLinear) and not inside and module is not head:
            found[name] = module
    return found

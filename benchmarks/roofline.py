"""What a step needs at least, in floating-point operations, and what the machine could do.

A multiplication and an addition count as two. With T tokens, S of them supervised, P parameters in
the blocks' linear layers, P_h in the head, rank r, documents of length L, and H heads of size D in
each of n layers:

    frozen base, forward and backward to the inputs     4 P T + 4 P_h S
    full fine-tuning, also to the weights               6 P T + 6 P_h S
    LoRA                                                6 r (in + out) T   for each linear layer
    attention, forward                                  2 H D L^2 n        for each document
    attention, backward                                 2.5 times that

The head works on supervised rows only. Attention's two products are 4 H D L^2, of which a causal
mask needs half; its backward has five products to the forward's two. Norms, activations, embedding,
loss and optimizer count nothing: they are not products. Recomputation and pads count nothing
either: whoever has them does more than is needed. What could be saved at layer 0, whose input needs
no gradient, is below 1 % and left in.

The time at the roofline is this count divided by the machine's rate on the model's own products,
which a worker measures in the same round.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from benchmarks.workload import StepSize
from lorikeet.model import empty_model

BACKWARD_OF_ATTENTION = 2.5


@dataclass(frozen=True)
class Shape:
    """A model's products.

    Attributes:
        linears: (inputs, outputs, count) of each kind of linear layer in the blocks.
        head: (inputs, outputs) of the output head, tied or not.
        layers: blocks.
        attention_width: heads times their size.
        vocabulary: rows of the input embedding.
    """

    linears: tuple[tuple[int, int, int], ...]
    head: tuple[int, int]
    layers: int
    attention_width: int
    vocabulary: int

    @staticmethod
    def of(folder: Path) -> Shape:
        """Read it off the model's structure, without weights."""
        model: Any = empty_model(folder)
        head = model.get_output_embeddings()
        linears = Counter(
            (module.in_features, module.out_features)
            for module in model.modules()
            if isinstance(module, nn.Linear) and module is not head
        )
        config = model.config
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return Shape(
            linears=tuple((i, o, count) for (i, o), count in sorted(linears.items())),
            head=(head.in_features, head.out_features),
            layers=config.num_hidden_layers,
            attention_width=config.num_attention_heads * size,
            vocabulary=model.get_input_embeddings().num_embeddings,
        )

    @property
    def block_parameters(self) -> int:
        """P: weights of the blocks' linear layers."""
        return sum(i * o * count for i, o, count in self.linears)

    @property
    def head_parameters(self) -> int:
        """P_h: weights of the head."""
        return self.head[0] * self.head[1]

    def lora_parameters(self, r: int) -> int:
        """Weights of A and B on every linear layer of the blocks."""
        return sum(r * (i + o) * count for i, o, count in self.linears)


def base_operations(shape: Shape, step: StepSize) -> float:
    """Of the products with frozen weights: what the `gemm` worker does."""
    return 4.0 * (shape.block_parameters * step.tokens + shape.head_parameters * step.supervised)


def attention_operations(shape: Shape, step: StepSize) -> float:
    """Of attention, forward and backward, each document attending to itself."""
    squares = sum(length * length for length in step.lengths)
    return (1 + BACKWARD_OF_ATTENTION) * 2 * shape.attention_width * shape.layers * squares


def step_operations(
    shape: Shape, step: StepSize, *, method: Literal["lora", "full"], r: int
) -> float:
    """Of a whole step."""
    base = base_operations(shape, step)
    if method == "full":
        base *= 6 / 4
    else:
        base += 6.0 * shape.lora_parameters(r) * step.tokens
    return base + attention_operations(shape, step)

"""The matrix products of a LoRA step through the frozen weights, and nothing else.

For each linear layer of the blocks the product forward and the one for the input's gradient, on the
step's tokens; for the head the same on its supervised tokens. Each layer has weights of its own, as
in a model: they do not stay in the cache from one layer to the next.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.protocol import Channel, Job
from benchmarks.workers.meter import meter_of

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Product:
    """One layer's two products on the rows of a step, with everything allocated beforehand."""

    weight: Tensor  # [out, in]
    activation: Tensor  # [rows, in]
    gradient: Tensor  # [rows, out]
    results: tuple[Tensor, Tensor]  # [rows, out], [rows, in]

    def run(self) -> None:
        """Forward, and backward to the input."""
        torch.mm(self.activation, self.weight.T, out=self.results[0])
        torch.mm(self.gradient, self.weight, out=self.results[1])


def make_weights(job: Job) -> tuple[list[Tensor], Tensor]:
    """Random weights [out, in] of the shapes in the job's settings: the blocks', and the head's."""
    kind: Any = {"dtype": DTYPES[job.dtype], "device": job.device}
    linears = [
        torch.randn(outputs, inputs, **kind)
        for inputs, outputs, count in job.settings["linears"]
        for _ in range(count)
    ]
    inputs, outputs = job.settings["head"]
    return linears, torch.randn(outputs, inputs, **kind)


def make_products(
    linears: list[Tensor], head: Tensor, *, tokens: int, supervised: int
) -> list[Product]:
    """The products of a step; layers of one shape share their activations and results."""
    shared: dict[tuple[int, torch.Size], Product] = {}
    products = []
    for weight, rows in [*((weight, tokens) for weight in linears), (head, supervised)]:
        key = (rows, weight.shape)
        if key not in shared:
            x, y = (weight.new_empty(rows, n).normal_() for n in reversed(weight.shape))
            shared[key] = Product(weight, x, y, (y.clone(), x.clone()))
        products.append(replace(shared[key], weight=weight))
    return products


def main() -> None:
    """Do the job named on the command line."""
    job = Job.read(sys.argv[1])
    channel = Channel(meter_of(job.device))
    linears, head = make_weights(job)
    channel.hello(threads=torch.get_num_threads(), device=head.device.type, packages=["torch"])
    for rows in job.step_rows():
        tokens = sum(len(row.ids) for row in rows)
        supervised = sum(sum(row.supervised) for row in rows)
        products = make_products(linears, head, tokens=tokens, supervised=supervised)
        channel.wait()
        for product in products:
            product.run()
        channel.stop()
        channel.answer(loss=None, tokens=tokens, supervised=supervised)


if __name__ == "__main__":
    main()

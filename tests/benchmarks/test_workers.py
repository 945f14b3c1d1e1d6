"""What the workers do in a step, and where."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from benchmarks.protocol import Job, Row
from benchmarks.workers.bare_loop import collate, train_step
from benchmarks.workers.gemm_worker import make_products, make_weights

ROWS = [Row([1 + k % 9 for k in range(n)], [0] * 2 + [1] * (n - 2)) for n in (5, 9, 3, 12)]


def test_rows_are_padded_on_the_right() -> None:
    batch = collate([Row([4, 5, 6], [0, 1, 1]), Row([7, 8], [0, 1])])
    assert batch["input_ids"].tolist() == [[4, 5, 6], [7, 8, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, 5, 6], [-100, 8, -100]]


@pytest.mark.parametrize("micro", [1, 2])
def test_micro_batches_change_nothing(micro: int, stories: Path) -> None:
    trained = []
    for rows in (4, micro):
        model: Any = AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        loss = train_step(model, optimizer, ROWS, micro=rows, device="cpu")
        trained.append((float(loss), model.get_output_embeddings().weight))
    (loss, weight), (other, others) = trained
    assert other == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(others, weight)


class Bigram(nn.Module):
    """Enough of a causal language model for a step, on a device where nothing can be computed."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 10)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        use_cache: bool,
        num_items_in_batch: int,
    ) -> SimpleNamespace:
        logits = self.table(input_ids * attention_mask)[:, :-1]
        nats = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
        return SimpleNamespace(loss=nats / num_items_in_batch)


def test_a_step_stays_on_its_device() -> None:
    """On the meta device a tensor from elsewhere, or one that is read, would be an error."""
    model = Bigram().to("meta")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=False)
    loss = train_step(model, optimizer, ROWS, micro=2, device="meta")
    assert (loss.device.type, loss.shape) == ("meta", ())


def test_the_products_are_made_on_the_device() -> None:
    settings = {"linears": [(2, 3, 4), (3, 2, 1)], "head": (2, 10)}
    job = Job("", "", 1, step_examples=1, micro_examples=1, device="meta", settings=settings)
    linears, head = make_weights(job)
    assert len(linears) == 5
    for product in make_products(linears, head, tokens=7, supervised=3):
        product.run()
        tensors = [product.weight, product.activation, product.gradient, *product.results]
        assert {(tensor.device.type, tensor.dtype) for tensor in tensors} == {
            ("meta", torch.bfloat16)
        }

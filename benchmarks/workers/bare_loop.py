"""The loop that the bare contestants share: what is trained comes in, the steps go out.

Padded micro-batches, fused AdamW, the gradient clipped at 1, no cache. The loss is read after the
clock has stopped, so that no micro-batch waits for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.protocol import Channel, Job, Row

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def run_loop(
    channel: Channel, job: Job, model: Any, *, lr: float, packages: Sequence[str], **facts: Any
) -> None:
    """Train what requires a gradient on the job's rows, a step for each `go`.

    Args:
        channel: to the orchestrator.
        job: what is to be done.
        model: in training mode, on the job's device.
        lr: learning rate.
        packages: whose versions are told.
        facts: what else is told of the model.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=lr, fused=True)
    steps = list(job.step_rows())
    channel.hello(
        threads=torch.get_num_threads(),
        device=trainable[0].device.type,
        packages=packages,
        trainable=sum(p.numel() for p in trainable),
        weights=sorted({str(p.dtype) for p in model.parameters()}),
        **facts,
    )
    for rows in steps:
        channel.wait()
        loss = train_step(model, optimizer, rows, micro=job.micro_examples, device=job.device)
        channel.stop()
        channel.answer(
            loss=float(loss),
            tokens=sum(len(row.ids) for row in rows),
            supervised=sum(sum(row.supervised) for row in rows),
        )


def train_step(
    model: Any, optimizer: torch.optim.Optimizer, rows: list[Row], *, micro: int, device: str
) -> Tensor:
    """One optimizer step in micro-batches of `micro` rows; nats per supervised token []."""
    supervised = sum(sum(row.supervised) for row in rows)
    loss = torch.zeros((), device=device)
    for first in range(0, len(rows), micro):
        batch = {
            name: tensor.to(device) for name, tensor in collate(rows[first : first + micro]).items()
        }
        part = model(**batch, use_cache=False, num_items_in_batch=supervised).loss
        part.backward()
        loss += part.detach()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss


def collate(rows: list[Row]) -> dict[str, Tensor]:
    """Pad to the longest row, on the right: ids, mask and labels, each [rows, longest]."""
    longest = max(len(row.ids) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, -100)
    for index, row in enumerate(rows):
        n = len(row.ids)
        ids[index, :n] = torch.tensor(row.ids)
        mask[index, :n] = 1
        labels[index, :n] = torch.where(torch.tensor(row.supervised) > 0, ids[index, :n], -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}

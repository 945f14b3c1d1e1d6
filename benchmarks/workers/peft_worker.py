"""A bare loop around a transformers model, with PEFT's LoRA or all weights trained.

Tuned by hand as far as it goes without replacing parts of PEFT or transformers: bf16 adapters (no
casts of the activations), no dropout, no gradient checkpointing, no cache, fused AdamW.
"""

from __future__ import annotations

import sys
from typing import Any

import peft
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.protocol import Channel, Job, Row

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
PEAK = {"lora": 2e-4, "full": 2e-5}


def load(job: Job) -> Any:
    """The model with what is trained requiring a gradient."""
    model: Any = AutoModelForCausalLM.from_pretrained(job.model, dtype=DTYPES[job.dtype])
    if job.settings["method"] == "full":
        return model.train()
    lora = peft.LoraConfig(
        r=job.r,
        lora_alpha=job.r,
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(model, lora, autocast_adapter_dtype=False).train()


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


def train_step(model: Any, optimizer: torch.optim.Optimizer, rows: list[Row], micro: int) -> float:
    """One optimizer step in micro-batches of `micro` rows; nats per supervised token."""
    supervised = sum(sum(row.supervised) for row in rows)
    loss = 0.0
    for first in range(0, len(rows), micro):
        batch = collate(rows[first : first + micro])
        part = model(**batch, use_cache=False, num_items_in_batch=supervised).loss
        part.backward()
        loss += float(part.detach())
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss


def main() -> None:
    """Do the job named on the command line."""
    channel = Channel()
    job = Job.read(sys.argv[1])
    model = load(job)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=PEAK[job.settings["method"]], fused=True)
    steps = list(job.step_rows())
    channel.hello(
        threads=torch.get_num_threads(),
        packages=["torch", "transformers", "peft"],
        trainable=sum(p.numel() for p in trainable),
        weights=sorted({str(p.dtype) for p in model.parameters()}),
    )
    for rows in steps:
        channel.wait()
        loss = train_step(model, optimizer, rows, job.micro_examples)
        channel.stop()
        channel.answer(
            loss=loss,
            tokens=sum(len(row.ids) for row in rows),
            supervised=sum(sum(row.supervised) for row in rows),
        )


if __name__ == "__main__":
    main()

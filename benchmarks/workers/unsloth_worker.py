"""Unsloth's model in the bare loop, with gradient checkpointing as it has it or without.

Unsloth rewrites transformers and PEFT when it is imported, so that it must come before them, and
prints while it does: it is imported after the channel has taken stdout.
"""

from __future__ import annotations

import sys
from typing import Any

from benchmarks.protocol import Channel, Job
from benchmarks.workers.bare_loop import DTYPES, run_loop
from benchmarks.workers.meter import meter_of

PEAK = 2e-4
LENGTH = 2048
"""Unsloth's own default: below 512 it would turn to another way of checkpointing."""

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
"""All linear layers of a Llama but the head, by name: these Unsloth replaces."""


def load(job: Job) -> Any:
    """The model in 16 bit with LoRA, by Unsloth's defaults but for what the job says."""
    from unsloth import FastLanguageModel  # type: ignore[import-not-found]

    checkpointing = job.settings["use_gradient_checkpointing"]
    longest = max(len(row.ids) for rows in job.step_rows() for row in rows)
    model, _ = FastLanguageModel.from_pretrained(
        model_name=job.model,
        max_seq_length=max(LENGTH, longest),
        dtype=DTYPES[job.dtype],
        load_in_4bit=False,
        load_in_16bit=True,
        use_gradient_checkpointing=checkpointing,
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=job.r,
        lora_alpha=job.r,
        target_modules=LINEARS,
        use_gradient_checkpointing=checkpointing,
    )
    return model.train()


def main() -> None:
    """Do the job named on the command line."""
    job = Job.read(sys.argv[1])
    channel = Channel(meter_of(job.device))
    model = load(job)
    packages = ["torch", "transformers", "peft", "unsloth", "unsloth_zoo"]
    run_loop(
        channel,
        job,
        model,
        lr=PEAK,
        packages=packages,
        checkpointing=job.settings["use_gradient_checkpointing"],
    )


if __name__ == "__main__":
    main()

"""A transformers model in the bare loop, with PEFT's LoRA or all weights trained.

Tuned by hand as far as it goes without replacing parts of PEFT or transformers: bf16 adapters (no
casts of the activations), no dropout, no gradient checkpointing. With `autocast_adapter_dtype`, as
PEFT has it when nobody says otherwise, the adapters are float32.
"""

from __future__ import annotations

import sys
from typing import Any

import peft
import torch
from transformers import AutoModelForCausalLM

from benchmarks.protocol import Channel, Job
from benchmarks.workers.bare_loop import DTYPES, run_loop
from benchmarks.workers.meter import meter_of

PEAK = {"lora": 2e-4, "full": 2e-5}


def load(job: Job) -> Any:
    """The model with what is trained requiring a gradient."""
    with torch.device(job.device):  # straight to it, without a copy in main memory
        model: Any = AutoModelForCausalLM.from_pretrained(job.model, dtype=DTYPES[job.dtype])
    if job.settings["method"] == "full":
        return model.train()
    lora = peft.LoraConfig(
        r=job.r,
        lora_alpha=job.r,
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        use_dora=job.settings.get("use_dora", False),
    )
    autocast = job.settings["autocast_adapter_dtype"]
    return peft.get_peft_model(model, lora, autocast_adapter_dtype=autocast).train()


def main() -> None:
    """Do the job named on the command line."""
    job = Job.read(sys.argv[1])
    channel = Channel(meter_of(job.device))
    packages = ["torch", "transformers", "peft"]
    run_loop(channel, job, load(job), lr=PEAK[job.settings["method"]], packages=packages)


if __name__ == "__main__":
    main()

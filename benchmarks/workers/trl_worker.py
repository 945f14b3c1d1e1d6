"""TRL's SFTTrainer, driven step by step by a callback.

It gets the same rows as everybody, tokenised, with the mask of the completion, and visits them in
their order. Its collation happens before the clock starts, which is in its favour.
"""

from __future__ import annotations

import sys
import tempfile
from typing import Any

import peft
import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from benchmarks.protocol import Channel, Job
from benchmarks.workers.meter import meter_of

DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


class Counted(SFTTrainer):  # type: ignore[misc]
    """The trainer, with a count of the tokens that reach its steps."""

    tokens = 0
    supervised = 0

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Count the micro-batch and hand it on."""
        self.tokens += int(inputs["attention_mask"].sum())
        self.supervised += int((inputs["labels"][:, 1:] != -100).sum())
        return super().training_step(model, inputs, *args, **kwargs)


class Turns(TrainerCallback):  # type: ignore[misc]
    """Blocks before every step and answers after it."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.trainer: Counted

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """The micro-batches are there; the step has not begun."""
        self.channel.wait()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """The optimizer has stepped."""
        self.channel.stop()

    def on_log(self, *args: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        """The loss of the step, which is logged after it ended; the last log is of the run."""
        if "loss" in logs:
            trainer = self.trainer
            self.channel.answer(
                loss=logs["loss"], tokens=trainer.tokens, supervised=trainer.supervised
            )
            trainer.tokens = trainer.supervised = 0


def options(job: Job, folder: str) -> SFTConfig:
    """TRL's defaults but for the batch, the order, and what writes files or bars."""
    tuned: dict[str, Any] = {}
    if job.settings["tuned"]:
        tuned = {
            "model_init_kwargs": {"dtype": DTYPES[job.dtype]},
            "bf16": job.dtype == "bf16",
            "gradient_checkpointing": False,
        }
    return SFTConfig(
        output_dir=folder,
        per_device_train_batch_size=job.micro_examples,
        gradient_accumulation_steps=job.step_examples // job.micro_examples,
        max_steps=job.steps,
        use_cpu=job.device == "cpu",
        max_length=max(512, *(len(row.ids) for rows in job.step_rows() for row in rows)),
        completion_only_loss=True,
        train_sampling_strategy="sequential",
        logging_steps=1,  # a step's loss is known no other way; it is read outside of the clock
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **tuned,
    )


def main() -> None:
    """Do the job named on the command line."""
    job = Job.read(sys.argv[1])
    channel = Channel(meter_of(job.device))
    rows = [row for rows in job.step_rows() for row in rows]
    data = Dataset.from_dict(
        {
            "input_ids": [row.ids for row in rows],
            "completion_mask": [row.supervised for row in rows],
        }
    )
    lora = peft.LoraConfig(
        r=job.r,
        lora_alpha=job.r,
        lora_dropout=job.settings["dropout"],
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    turns = Turns(channel)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Counted(
            job.model,
            args=options(job, folder),
            train_dataset=data,
            peft_config=lora,
            callbacks=[turns],
        )
        turns.trainer = trainer
        channel.hello(
            threads=torch.get_num_threads(),
            device=trainer.model.device.type,
            packages=["torch", "transformers", "peft", "trl", "accelerate"],
            trainable=sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
            weights=sorted({str(p.dtype) for p in trainer.model.parameters()}),
            autocast_bf16=trainer.args.bf16,
            checkpointing=trainer.args.gradient_checkpointing,
            optimizer=str(trainer.args.optim),
        )
        trainer.train()


if __name__ == "__main__":
    main()

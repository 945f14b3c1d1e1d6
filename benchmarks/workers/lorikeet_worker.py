"""Lorikeet through its Python API, as a user calls it, on the rows that everybody gets.

The whole of `fit` is on the clock, which stands still only while the worker waits for its turn. The
first step includes what `fit` builds before it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from inspect import signature
from time import perf_counter
from typing import Any

import torch

from benchmarks.protocol import Channel, Job, read_rows
from benchmarks.workers.meter import meter_of
from lorikeet.api import DataConfig, LoraConfig, TrainConfig, add_lora, fit, load_data, load_model
from lorikeet.data import Epochs, Example
from lorikeet.model import Base

LOAD_OPTIONS = ("fast",)
"""Settings of a contestant that are keywords of `load_model`. New ones come here, or below."""

LORA_OPTIONS = ("dropout", "dora")
"""Settings of a contestant that are fields of `LoraConfig`."""

TRAIN_OPTIONS = ("method", "int8")
"""Settings of a contestant that are fields of `TrainConfig`."""


def options(settings: dict[str, Any], names: Sequence[str], known: Iterable[str]) -> dict[str, Any]:
    """The settings of these names, as keyword arguments.

    Raises:
        SystemExit: one of them is not `known` to this version of Lorikeet.
    """
    found = {name: settings[name] for name in names if name in settings}
    missing = sorted(found.keys() - set(known))
    if missing:
        raise SystemExit(f"this Lorikeet has no option {', '.join(missing)}")
    return found


def read_examples(job: Job, base: Base) -> tuple[list[Example], dict[str, Any]]:
    """The job's rows; or those of a raw data file, rendered here, with the seconds that took."""
    if "data" not in job.settings:
        return [
            Example(tuple(row.ids), tuple(map(bool, row.supervised)), 0, "benchmark")
            for row in read_rows(job.rows)
        ], {}
    config = DataConfig(path=job.settings["data"], max_length=512, validation=0.0)
    started = perf_counter()
    examples = load_data(base, config).train
    return examples, {"prepare_seconds": perf_counter() - started}


def placed(examples: Sequence[Example], config: TrainConfig) -> list[Example]:
    """The examples in such places that the first epoch's permutation visits them in their order."""
    order = Epochs(len(examples), batch_size=config.batch_size, seed=config.seed)
    visited = [index for step in range(order.steps_per_epoch) for index in order.indices(step)]
    places = dict(zip(visited, examples, strict=True))
    return [places[index] for index in range(len(examples))]


def main() -> None:
    """Do the job named on the command line."""
    job = Job.read(sys.argv[1])
    channel = Channel(meter_of(job.device))
    train = options(job.settings, TRAIN_OPTIONS, TrainConfig.model_fields)
    config = TrainConfig(batch_size=job.step_examples, max_steps=job.steps, **train)
    load = options(job.settings, LOAD_OPTIONS, signature(load_model).parameters)
    base = load_model(job.model, dtype=job.dtype, device=job.device, **load)
    examples, facts = read_examples(job, base)
    examples = placed(examples, config)
    if config.method == "lora":
        lora = options(job.settings, LORA_OPTIONS, LoraConfig.model_fields)
        add_lora(base, LoraConfig(r=job.r, alpha=float(job.r), **{"dropout": 0.0, **lora}))
    channel.hello(
        threads=torch.get_num_threads(),
        device=base.machine.device.type,
        packages=["torch", "transformers", "lorikeet"],
        path=base.path_taken,
        packing=base.packing,
        weights=sorted({str(p.dtype) for p in base.model.parameters()}),
        **facts,
    )

    def record(line: dict[str, Any]) -> None:
        channel.stop()
        tokens, supervised = line["tokens"], line["supervised_tokens"]
        channel.answer(loss=line["loss"], tokens=tokens, supervised=supervised)
        if line["step"] < job.steps:
            channel.wait()

    channel.wait()
    fit(base, examples, config, record=record)


if __name__ == "__main__":
    main()

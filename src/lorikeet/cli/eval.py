"""`lorikeet eval`: one honest number for a model, with or without an adapter."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorikeet import console
from lorikeet.cli.options import add_adapter, add_json, add_options, count, given, read_config
from lorikeet.config import load_config
from lorikeet.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from lorikeet.cli.subject import Subject
    from lorikeet.config import RunConfig
    from lorikeet.data import Prepared
    from lorikeet.evaluate import Sample
    from lorikeet.study.folder import RunFolder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add_adapter(parser)
    parser.add_argument(
        "--split",
        choices=["all", "train", "validation"],
        default="all",
        help="which rows of the data count: all, or one side of the split that a training run with"
        " the same --seed and --data.validation makes (default: all)",
    )
    parser.add_argument(
        "--samples", type=count, default=0, help="also answer this many rows (default: 0)"
    )
    add_json(parser)
    add_options(parser, ["model", "data", "train"])


def run(args: argparse.Namespace) -> int:
    """Evaluate; with an adapter also the base alone, and the paired difference."""
    config = read_config(args)
    config.require("data.path")
    if args.split == "all" and "data.validation" in given(args):
        console.warn("--data.validation changes nothing with --split all, which takes every row")
    from lorikeet.cli.subject import adapter_folder, answer_side_by_side, load_subject
    from lorikeet.evaluate import evaluate, paired_difference
    from lorikeet.lora import disabled

    adapter = adapter_folder(args.adapter)
    subject = load_subject(config, adapter, allow_mismatch=args.allow_mismatch)
    prepared = _prepare(subject, config, args.split)
    if args.split != "train":
        _warn_of_rows_seen(subject, adapter, prepared, config, held_out=args.split == "validation")
    examples = prepared.validation if args.split == "validation" else prepared.train
    base = subject.base

    def measure(what: str) -> Any:
        score = evaluate(
            base.model,
            examples,
            max_tokens=config.train.max_tokens,
            packing=base.packing,
            nll=base.nll,
        )
        if not math.isfinite(score.nll):
            raise ModelError(
                f"the loss of the {what} on these rows is {score.nll}: weights are damaged, or too"
                f" large for --model.dtype {base.machine.dtype_name}"
            )
        return score

    score = measure("model" if subject.adapter is None else "adapter")
    found: dict[str, Any] = {"model": base.path, "adapter": args.adapter, **score.summary()}
    rows = [_row("model" if subject.adapter is None else "adapter", score)]
    if subject.adapter is not None:
        with disabled(base.model):
            alone = measure("base")
        difference = paired_difference(score, alone)
        found |= {"base": alone.summary(), "difference": difference.summary()}
        rows.insert(0, _row("base", alone))
    samples: list[Sample] = []
    if args.samples:
        samples = answer_side_by_side(subject, prepared, n=args.samples)
        found["samples"] = [sample.summary() for sample in samples]
    if args.json:
        console.out.print_json(json.dumps(found))
        return 0
    columns = ["", "nll", "std. error", "perplexity", "bits/byte", "tokens", "documents"]
    console.out.print(console.table(f"{config.data.path} ({args.split})", columns, rows))
    if subject.adapter is not None:
        console.out.print(f"adapter - base: {difference}", markup=False)
    for sample in samples:
        console.show_sample(sample.prompt, {"data": sample.reference, **sample.answers})
    return 0


def _prepare(subject: Subject, config: RunConfig, split: str) -> Prepared:
    from lorikeet.data import preflight, prepare
    from lorikeet.model import check_texts

    if split == "all":
        config.data.validation = 0.0
    prepared = prepare(config.data, subject.base.tokenizer, seed=config.train.seed)
    for warning in preflight(
        prepared, tokenizer=subject.base.tokenizer, max_length=config.data.max_length
    ):
        console.warn(warning)
    for warning in check_texts(subject.base.model, prepared.ids):
        console.warn(warning)
    if split == "validation" and not prepared.validation:
        raise ConfigError(
            f"--split validation has no document: data.validation {config.data.validation} of"
            f" {prepared.units} rows holds none out that has anything to learn; give a larger"
            " share, more rows, or --split all"
        )
    return prepared


def _warn_of_rows_seen(
    subject: Subject, adapter: Path | None, prepared: Prepared, config: RunConfig, *, held_out: bool
) -> None:
    """Say it if the adapter, or the model, was trained on the rows that it is to be measured on."""
    from lorikeet.study.folder import RunFolder
    from lorikeet.study.receipt import documents_sha256

    what = "model" if adapter is None else "adapter"
    folder = (adapter or Path(subject.base.path)).resolve()
    run = RunFolder(folder.parent)  # if it is one
    if subject.adapter is not None:
        trained: Mapping[str, Any] = subject.adapter.provenance
    else:
        trained = _receipt(run) if folder == run.model else {}
    if "data_sha256" not in trained:
        return
    if trained["data_sha256"] != prepared.sha256:
        if folder in (run.adapter, run.model) and _same_data(run, config):
            console.warn(
                f"the {what} was trained on other rows of the same data (another --data.limit, or"
                " the file has changed since), so it may have seen some of these; give that run's"
                " options (its config.yaml has them) with --split validation to leave them out"
            )
        return
    if not held_out:
        console.warn(
            f"the {what} was trained on these very rows, but for those that were held out: its"
            " figures show what was learnt by heart, too; --split validation leaves that out"
        )
        return
    here = documents_sha256(prepared.validation)
    if trained.get("held_out_sha256", here) != here:
        console.warn(
            f"these are not the documents that were held out when the {what} was trained on this"
            " data, so it may have seen most of them; give that run's --seed, --data.validation"
            " and --data.max_length (its config.yaml has them)"
        )


def _receipt(run: RunFolder) -> dict[str, Any]:
    """What a run folder tells of how its model came about; empty if there is none."""
    try:
        found = json.loads(run.receipt.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _same_data(run: RunFolder, config: RunConfig) -> bool:
    """Whether a run was trained on the data that the options name."""
    try:
        path = load_config(run.config).data.path
    except ConfigError:
        return False
    return path == config.data.path or Path(path).resolve() == Path(config.data.path).resolve()


def _row(name: str, score: Any) -> list[str]:
    found = score.summary()
    return [
        name,
        f"{found['nll']:.4f}",
        _figure(found["nll_stderr"]),
        f"{found['perplexity']:.3f}",
        _figure(found["bits_per_byte"]),
        f"{found['tokens']:,}",
        f"{found['documents']:,}",
    ]


def _figure(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.4f}"

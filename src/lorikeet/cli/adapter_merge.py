"""`lorikeet adapter merge`: a model with an adapter folded into its weights, and proof of it."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorikeet import console
from lorikeet.cli.base_folder import base_folder, check_base
from lorikeet.cli.options import add_adapter, add_json, add_options, read_config
from lorikeet.cli.verification import add_verify, exact_subject, material, verify_problems
from lorikeet.errors import CheckFailed, ConfigError

if TYPE_CHECKING:
    from lorikeet.adapters import Adapter
    from lorikeet.adapters.merge import MergeReport
    from lorikeet.cli.subject import Subject
    from lorikeet.config import RunConfig
    from lorikeet.export import Tolerance, Verification


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add_adapter(parser)
    parser.add_argument("--out", metavar="DIR", required=True, help="the new model folder")
    parser.add_argument(
        "--shard-size", metavar="SIZE", default="5GB", help="largest weight file (default: 5GB)"
    )
    add_verify(
        parser,
        "compare the merged model, loaded from disk, with base and adapter in memory: on --data, or"
        " on text that Lorikeet brings along; in float32 unless --model.dtype is given",
    )
    add_json(parser)
    add_options(parser, ["model", "data"])


def run(args: argparse.Namespace) -> int:
    """Merge; with --verify also compare, and fail if what comes out is another model."""
    config = read_config(args)
    shard_bytes = _check(args)
    from lorikeet.adapters import read_adapter
    from lorikeet.cli.subject import adapter_folder

    folder = adapter_folder(args.adapter)
    if folder is None:
        raise ConfigError("there is nothing to merge: give --adapter DIR")
    adapter = read_adapter(folder)
    config.model.path = config.model.path or adapter.base_model
    config.require("model.path")
    base = base_folder(config)
    if args.verify:  # base and adapter are compared as they are loaded
        subject = exact_subject(config, base, folder, allow_mismatch=args.allow_mismatch)
    else:
        subject = None
        check_base(base, adapter, config, allow=args.allow_mismatch)
    report = _merge(base, adapter, Path(args.out), folder, shard_bytes)
    compared = _compare(args, config, subject, report) if subject else None
    problems = compared[0].problems(compared[1]) if compared else []
    if args.json:
        console.out.print_json(json.dumps(_summary(report, compared, problems)))
    else:
        _show(report, compared)
    if problems:
        lines = "".join(f"\n  - {problem}" for problem in problems)
        raise CheckFailed(f"the model in {report.out} is not the base with the adapter:{lines}")
    return 0


def _check(args: argparse.Namespace) -> int:
    """The size of a shard in bytes, after a look at how the flags go together."""
    from pydantic import TypeAdapter, ValidationError

    from lorikeet.values import Memory

    problems = verify_problems(args)
    shard_bytes = 0
    try:
        shard_bytes = TypeAdapter(Memory).validate_python(args.shard_size)
    except ValidationError:
        problems.append(f"--shard-size: expected a size such as 5GB, found {args.shard_size!r}")
    if problems:
        raise ConfigError("these flags do not hold:", problems)
    return shard_bytes


def _merge(
    base: Path, adapter: Adapter, out: Path, tokenizer: Path, shard_bytes: int
) -> MergeReport:
    from lorikeet.adapters.merge import merge

    with console.progress_bar("merging", 0) as bar:
        task = bar.task_ids[0]

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        return merge(
            base, adapter, out, tokenizer=tokenizer, shard_bytes=shard_bytes, progress=show
        )


def _compare(
    args: argparse.Namespace, config: RunConfig, subject: Subject, report: MergeReport
) -> tuple[Verification, Tolerance]:
    """Load what was written, as anybody would, and run it beside base and adapter."""
    from lorikeet.export import run_by, tolerance_of, verify
    from lorikeet.model import load_model

    base = subject.base
    compared = material(config, subject, prompts=args.prompts)
    merged = load_model(
        report.out,
        dtype=config.model.dtype,
        device=config.model.device,
        fast=config.model.fast,
        trust_remote_code=config.model.trust_remote_code,
    )
    found = verify(
        run_by("base + adapter", base.model, stop_ids=compared.stop_ids),
        run_by("merged", merged.model, stop_ids=compared.stop_ids),
        compared.examples,
        compared.prompts,
    )
    tolerance = tolerance_of(report.dtypes, arithmetic=base.machine.dtype_name)
    if args.tolerance_kl is not None:
        tolerance = replace(tolerance, kl=args.tolerance_kl)
    return found, tolerance


def _summary(
    report: MergeReport, compared: tuple[Verification, Tolerance] | None, problems: list[str]
) -> dict[str, Any]:
    verified = None
    if compared:
        tolerance = asdict(compared[1])
        verified = {**compared[0].summary(), "tolerance": tolerance, "problems": problems}
    return {
        "out": str(report.out),
        "tensors": report.tensors,
        "merged": len(report.merged),
        "rows": report.rows,
        "seconds": report.seconds,
        "verify": verified,
    }


def _show(report: MergeReport, compared: tuple[Verification, Tolerance] | None) -> None:
    untied = "; embedding and head, which shared a weight, have one each now" * report.untied
    grown = f"; the vocabulary has {report.rows:,} rows now" if report.rows else ""
    console.out.print(
        f"merged {len(report.merged)} of {report.tensors} tensors in {report.seconds:.1f} s:"
        f" {report.out}{untied}{grown}",
        markup=False,
    )
    if compared is None:
        return
    found, tolerance = compared
    scores = zip(found.names, (found.reference, found.candidate), strict=True)
    rows = [
        [name, f"{s.nll:.6f}", _stderr(s.nll_stderr), f"{s.perplexity:.4f}"] for name, s in scores
    ]
    title = f"{found.reference.tokens:,} tokens of {len(found.reference.nats):,} documents"
    columns = ["", "nll", "std. error", "perplexity"]
    console.out.print(console.table(title, columns, rows))
    error = _stderr(found.difference.stderr, ".1e")
    for line in (
        f"difference  {found.difference.nll:+.1e} nats/token, std. error {error}"
        f" (at most {tolerance.nll:.0e})",
        f"KL          {found.kl_mean:.1e} nats/token on the mean (at most {tolerance.kl:.0e}),"
        f" 99th percentile {found.kl_p99:.1e}",
        f"greedy      {found.identical:.0%} of {found.prompts} continuations are identical,"
        f" {found.agreeing:.0%} of tokens agree",
    ):
        console.out.print(line, markup=False)


def _stderr(value: float | None, form: str = ".6f") -> str:
    return "n/a" if value is None else format(value, form)

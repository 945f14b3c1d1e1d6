"""`lorikeet adapter merge`: a model with an adapter folded into its weights, and proof of it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorikeet import console
from lorikeet.cli.options import add_adapter, add_json, add_options, given, read_config
from lorikeet.errors import AdapterError, CheckFailed, ConfigError, ModelError

if TYPE_CHECKING:
    from lorikeet.adapters import Adapter
    from lorikeet.adapters.merge import MergeReport
    from lorikeet.cli.subject import Subject
    from lorikeet.config import RunConfig
    from lorikeet.export import Tolerance, Verification

_PROMPTS = 16
_ROWS = 64  # of the bundled text, where no data are given
_SMALL_FILES = [
    *("*.json", "*.jinja", "*.txt", "*.model", "*.py", "*.tiktoken", "*.spm", "*.vocab"),
    *("LICEN[SC]E*", "NOTICE*"),
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add_adapter(parser)
    parser.add_argument("--out", metavar="DIR", required=True, help="the new model folder")
    parser.add_argument(
        "--shard-size", metavar="SIZE", default="5GB", help="largest weight file (default: 5GB)"
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="compare the merged model, loaded from disk, with base and adapter in memory: on"
        " --data, or on text that Lorikeet brings along; in float32 unless --model.dtype is given",
    )
    parser.add_argument(
        "--prompts",
        type=int,
        metavar="N",
        help=f"prompts whose greedy continuations --verify compares (default: {_PROMPTS})",
    )
    parser.add_argument(
        "--tolerance-kl",
        type=float,
        metavar="NATS",
        help="largest mean KL per token that --verify lets pass (default: by the weights' dtype)",
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
    base = _model_folder(config)
    if args.verify:  # base and adapter are compared as they are loaded
        subject = _subject(args, config, base, folder)
    else:
        subject = None
        _check_base(base, adapter, config, allow=args.allow_mismatch)
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

    problems = []
    shard_bytes = 0
    try:
        shard_bytes = TypeAdapter(Memory).validate_python(args.shard_size)
    except ValidationError:
        problems.append(f"--shard-size: expected a size such as 5GB, found {args.shard_size!r}")
    if args.prompts is not None and args.prompts < 0:
        problems.append(f"--prompts: expected a number from 0 on, found {args.prompts}")
    if args.tolerance_kl is not None and not args.tolerance_kl >= 0:
        problems.append(f"--tolerance-kl: expected a number from 0 on, found {args.tolerance_kl}")
    if not args.verify:
        idle = [f"--{name}" for name in given(args) if name.startswith("data.")]
        idle += ["--prompts"] * (args.prompts is not None)
        idle += ["--tolerance-kl"] * (args.tolerance_kl is not None)
        problems += [f"{flag} does nothing without --verify" for flag in idle]
    if problems:
        raise ConfigError("these flags do not hold:", problems)
    return shard_bytes


def _model_folder(config: RunConfig) -> Path:
    """The base's folder; of a hub id the one in the hub's cache, downloaded where needed.

    Raises:
        ModelError: there is no such folder, or the hub does not give it.
    """
    from huggingface_hub import snapshot_download

    path, revision = config.model.path, config.model.revision
    if Path(path).is_dir():
        return Path(path)
    if Path(path).exists() or path.count("/") != 1 or path.startswith((".", "/", "~")):
        raise ModelError(
            f"there is no model folder {path}; expected a folder with config.json and weights,"
            " or a hub id such as HuggingFaceTB/SmolLM2-135M-Instruct"
        )
    for weights in ("model*.safetensors", "pytorch_model*.bin"):
        try:
            patterns = [*_SMALL_FILES, weights]
            folder = Path(snapshot_download(path, revision=revision, allow_patterns=patterns))
        except (OSError, ValueError) as error:
            raise ModelError(
                f"cannot get {path}: there is no folder of that name, and the hub says: {error}"
            ) from error
        if any(folder.glob(weights)):
            break
    return folder


def _check_base(base: Path, adapter: Adapter, config: RunConfig, *, allow: bool) -> None:
    """Compare the base's weights with those that the adapter was trained on, if it says which.

    Raises:
        AdapterError: they are others, and that was not allowed.
    """
    from lorikeet.adapters import mismatches

    if not adapter.provenance.get("base_fingerprint"):
        return
    found = _fingerprint(base, trust_remote_code=config.model.trust_remote_code)
    if found is None:
        console.warn(
            "cannot tell whether the adapter was trained on this base: its file and the"
            " model have other names for the weights"
        )
        return
    differences = mismatches(adapter.provenance, base_fingerprint=found)
    if differences and not allow:
        raise AdapterError(
            f"the adapter does not belong to {base} (--allow-mismatch makes this a warning):",
            differences,
        )
    for difference in differences:
        console.warn(f"the adapter: {difference}")


def _fingerprint(base: Path, *, trust_remote_code: bool) -> str | None:
    """The fingerprint of a folder's weights, one tensor at a time; None if names do not fit."""
    from torch import nn

    from lorikeet.adapters.checkpoint import Checkpoint
    from lorikeet.model import empty_model, fingerprint

    checkpoint = Checkpoint.open(base)
    model = empty_model(base, trust_remote_code=trust_remote_code)
    sources = {name: checkpoint.find(name) for name, _ in model.named_parameters()}
    if any(len(found) != 1 or not checkpoint.entry(found[0]).shape for found in sources.values()):
        return None

    class Streamed(nn.Module):
        """Has the model's parameters, each read when it is its turn."""

        def named_parameters(self, *_: Any, **__: Any) -> Iterator[tuple[str, nn.Parameter]]:
            for name, (source,) in sources.items():
                yield name, nn.Parameter(checkpoint.whole(source), requires_grad=False)

    return fingerprint(Streamed())


def _subject(args: argparse.Namespace, config: RunConfig, base: Path, adapter: Path) -> Subject:
    """Base and adapter in memory, as every other verb loads them."""
    from lorikeet.cli.subject import load_subject

    config.model.path, config.model.revision = str(base), None
    config.model.fast = "off"  # both models take their own forward pass
    if config.model.dtype == "auto":  # half precision would hide what is to be seen
        config.model.dtype = "fp32"
    return load_subject(config, adapter, allow_mismatch=args.allow_mismatch)


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
    from lorikeet.data import prepare
    from lorikeet.evaluate import stop_ids
    from lorikeet.export import run_by, tolerance_of, verify
    from lorikeet.model import load_model
    from lorikeet.study.samples import questions

    config.data.validation = 0.0
    if not config.data.path:
        config.data.path = str(resources.files("lorikeet") / "starter" / "pirate-test.jsonl")
        config.data.limit = config.data.limit or _ROWS
    base = subject.base
    prepared = prepare(config.data, base.tokenizer, seed=config.train.seed)
    n = _PROMPTS if args.prompts is None else args.prompts
    prompts = [ids for _, _, ids in questions(prepared, subject.renderer, n=n)]
    merged = load_model(
        report.out,
        dtype=config.model.dtype,
        device=config.model.device,
        fast=config.model.fast,
        trust_remote_code=config.model.trust_remote_code,
    )
    ends = stop_ids(base.model, subject.renderer)
    found = verify(
        run_by("base + adapter", base.model, stop_ids=ends),
        run_by("merged", merged.model, stop_ids=ends),
        prepared.train,
        prompts,
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

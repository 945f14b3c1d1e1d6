"""A GGUF file from flags: what `export gguf` and `export ollama` share."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorikeet import console
from lorikeet.cli.base_folder import base_folder, check_base
from lorikeet.cli.chain_table import show_chain
from lorikeet.cli.options import add_adapter, add_json, add_options, given, read_config
from lorikeet.cli.verification import add_verify, exact_subject, material, verify_problems
from lorikeet.errors import CheckFailed, ConfigError

if TYPE_CHECKING:
    from lorikeet.adapters import Adapter
    from lorikeet.cli.subject import Subject
    from lorikeet.config import RunConfig
    from lorikeet.data import Renderer, Tokenizer
    from lorikeet.export.chain import Chain
    from lorikeet.export.chat import Chat
    from lorikeet.export.convert import Conversion, Exported
    from lorikeet.export.importance import Importance

_SHOWN = 4  # fall-backs
_CALIBRATION_ROWS = 128
_CALIBRATION_TOKENS = 512  # of a piece, as llama-imatrix has it


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """What is to be made.

    Attributes:
        config: the options.
        base: the base's folder.
        conversion: what goes into the file.
        renderer: how the model is spoken to.
        subject: base and adapter in memory, where something is to be measured.
    """

    config: RunConfig
    base: Path
    conversion: Conversion
    renderer: Renderer
    subject: Subject | None


@dataclass(frozen=True, slots=True)
class Made:
    """A file, and what was found out about it.

    Attributes:
        exported: the file.
        chain: what --verify found, or None.
        notes: what will run in another way than here, for the user to read.
    """

    exported: Exported
    chain: Chain | None
    notes: tuple[str, ...]

    def summary(self) -> dict[str, Any]:
        """The figures as a JSON-ready dict."""
        verified = self.chain.summary() if self.chain else None
        return {**self.exported.summary(), "notes": list(self.notes), "verify": verified}


def add_file_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of every verb that makes a GGUF file."""
    add_adapter(parser)
    parser.add_argument(
        "--type",
        metavar="T",
        help="f32, f16, bf16, q8_0, q6_k, q5_k_m, q5_k_s, q5_1, q5_0, q4_k_m, q4_k_s, q4_0, q3_k_m"
        " or q2_k (default: q4_k_m)",
    )
    parser.add_argument(
        "--calibrate",
        metavar="FILE",
        help="a text or data file; weights that matter more on it are stored more exactly"
        " (an importance matrix)",
    )
    parser.add_argument(
        "--calibrate-rows",
        type=int,
        metavar="N",
        help="pieces of at most 512 tokens of that file that are run (default: 128)",
    )
    add_verify(
        parser,
        "compare base, adapter, merged model, f16 and the file, read back by Lorikeet and by"
        " llama.cpp where one is installed: on --data, or on text that Lorikeet brings along",
    )
    add_json(parser)
    add_options(parser, ["model", "data"])


def check_file_arguments(args: argparse.Namespace) -> None:
    """Look at how the flags go together.

    Raises:
        ConfigError: they do not, with every finding.
    """
    from lorikeet.gguf.mixture import KINDS

    args.type = (args.type or "q4_k_m").lower()
    problems = verify_problems(args, used=["data.template"])
    if args.type not in KINDS:
        problems.append(f"--type: expected one of {', '.join(KINDS)}, found {args.type}")
    if args.calibrate_rows is not None and args.calibrate is None:
        problems.append("--calibrate-rows does nothing without --calibrate")
    if args.calibrate_rows is not None and args.calibrate_rows < 1:
        problems.append(f"--calibrate-rows: expected at least 1, found {args.calibrate_rows}")
    if args.calibrate and args.type in ("f32", "f16", "bf16", "q8_0"):
        problems.append(
            f"--calibrate does nothing for {args.type}, which rounds and searches nothing"
        )
    problems += _model_problems(args)
    if problems:
        raise ConfigError("these flags do not hold:", problems)


def _model_problems(args: argparse.Namespace) -> list[str]:
    """What does not hold about how a model is to run; to be converted it need not run at all."""
    options = given(args)
    runs = args.verify or args.calibrate
    problems = []
    if "model.fast" in options:
        problems.append("--model.fast does nothing here: a model takes its own forward pass")
    if not runs:
        idle = [name for name in ("model.dtype", "model.device") if name in options]
        problems += [f"--{name} does nothing without --verify or --calibrate" for name in idle]
    if args.verify and options.get("model.dtype", "auto") not in ("auto", "fp32"):
        problems.append(
            "--model.dtype: --verify compares in fp32, in which nothing but the weights' rounding"
            f" shows; found {options['model.dtype']}"
        )
    return problems


def require_sound(made: Made) -> None:
    """Fail if the file was verified and is beyond its tolerance.

    Raises:
        CheckFailed: it is.
    """
    problems = made.chain.problems() if made.chain else []
    if problems:
        lines = "".join(f"\n  - {problem}" for problem in problems)
        raise CheckFailed(f"from the model to {made.exported.out} not every link holds:{lines}")


def show(made: Made) -> None:
    """Print what was written, and what --verify found."""
    _show_file(made.exported)
    for note in made.notes:
        console.warn(note)
    if made.chain:
        show_chain(made.chain)
        if made.chain.spelling is None:
            console.note("no llama.cpp is installed (pip install xllamacpp): it was left out")


def _show_file(exported: Exported) -> None:
    types = ", ".join(f"{n} {name}" for name, n in exported.types.items())
    console.out.print(
        f"{exported.out}: {exported.size / 1e6:,.1f} MB, {exported.bits_per_weight:.2f} bits a"
        f" weight, {exported.kind}{' with an importance matrix' * exported.calibrated}"
        f" ({types}), in {exported.seconds:.1f} s",
        markup=False,
    )
    if exported.fallbacks:
        pairs = sorted(set(exported.fallbacks.values()))
        text = ", ".join(f"{has} in place of {meant}" for has, meant in pairs[:_SHOWN])
        console.note(
            f"{len(exported.fallbacks)} tensors have rows that are no multiple of 256; as in"
            f" llama.cpp they are stored as {text}"
        )


def plan(args: argparse.Namespace) -> Job:
    """Read what the flags name, calibrate, and look everything up; nothing is written."""
    config = read_config(args)
    from lorikeet.adapters import read_adapter
    from lorikeet.cli.subject import adapter_folder
    from lorikeet.export.convert import Conversion
    from lorikeet.model import choose, load_tokenizer

    folder = adapter_folder(args.adapter)
    adapter = read_adapter(folder) if folder else None
    config.model.path = config.model.path or (adapter.base_model if adapter else "")
    config.require("model.path")
    base, name = base_folder(config), Path(config.model.path).name
    runs = args.verify or args.calibrate
    if not runs:
        choose(threads=config.model.threads)
        if adapter:
            check_base(base, adapter, config, allow=args.allow_mismatch)
    grown = folder if adapter and adapter.vocabulary else None
    tokenizer = load_tokenizer(grown or base, trust_remote_code=config.model.trust_remote_code)
    # What cannot be exported is refused before a model is loaded and run.
    conversion = Conversion.plan(base, args.type, adapter=adapter, tokenizer=tokenizer, name=name)
    subject = None
    if runs:
        subject = exact_subject(config, base, folder, allow_mismatch=args.allow_mismatch)
    renderer = subject.renderer if subject else _renderer(config, tokenizer, folder)
    importance = _importance(args, config, subject) if subject and args.calibrate else None
    conversion = conversion.refined(importance=importance, chat=_chat(adapter, renderer, config))
    return Job(config, base, conversion, renderer, subject)


def make(args: argparse.Namespace, job: Job, out: Path) -> Made:
    """Write the file, and verify it if that was asked for."""
    exported = _write(job.conversion, out)
    chain = _verify(args, job, job.subject, out) if job.subject and args.verify else None
    return Made(exported, chain, job.conversion.notes)


def _renderer(config: RunConfig, tokenizer: Tokenizer, folder: Path | None) -> Renderer:
    """How the model is spoken to, without loading its weights."""
    from lorikeet.adapters import read_adapter_config
    from lorikeet.cli.subject import renderer_of, trained_template

    if folder and config.data.template == "auto":
        config.data.template = trained_template(read_adapter_config(folder))
    return renderer_of(tokenizer, config)


def _importance(args: argparse.Namespace, config: RunConfig, subject: Subject) -> Importance:
    from lorikeet.data import prepare
    from lorikeet.export.importance import measure_importance

    own = config.data.model_copy(
        update={
            "path": args.calibrate,
            "limit": None,
            "validation": 0.0,
            "max_length": _CALIBRATION_TOKENS,
        }
    )
    prepared = prepare(own, subject.base.tokenizer, seed=config.train.seed)
    wanted = args.calibrate_rows or _CALIBRATION_ROWS
    with console.progress_bar("calibrating", 0) as bar:
        task = bar.task_ids[0]

        def show_progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        return measure_importance(
            subject.base.model,
            prepared.train[:wanted],
            source=Path(args.calibrate).name,
            progress=show_progress,
        )


def _chat(adapter: Adapter | None, renderer: Renderer, config: RunConfig) -> Chat | None:
    """How the model is spoken to, if its tokenizer, an adapter's training or the user says so."""
    from lorikeet.export.chat import Chat

    known = adapter or renderer.template.own or config.data.template != "auto"
    return Chat.of(renderer) if known else None


def _write(conversion: Conversion, out: Path) -> Exported:
    from lorikeet.export.convert import export_gguf

    with console.progress_bar("writing", 0) as bar:
        task = bar.task_ids[0]

        def show_progress(done: int, total: int) -> None:
            millions = (max(1, round(weights / 1e6)) for weights in (done, total))
            bar.update(task, completed=next(millions), total=next(millions), status="M weights")

        return export_gguf(conversion, out, progress=show_progress)


def _verify(args: argparse.Namespace, job: Job, subject: Subject, out: Path) -> Chain:
    from lorikeet.export.chain import check_chain
    from lorikeet.export.llama_cpp import find

    return check_chain(
        job.conversion,
        out,
        subject.base.model,
        material(job.config, subject, prompts=args.prompts),
        adapted=subject.adapter is not None,
        llama_cpp=find() is not None,
        kl=args.tolerance_kl,
        starting=lambda name: console.note(f"verifying: {name}"),
    )

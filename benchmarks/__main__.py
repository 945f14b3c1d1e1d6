"""The command: `python -m benchmarks run`, `scaling` or `parity`."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.contestants import CONTESTANTS, DEFAULT, Contestant
from benchmarks.device import DEVICES, check_device, describe_machine, gpu_line
from benchmarks.memory import measure_memory
from benchmarks.parity import measure_parity
from benchmarks.process import ROOT, BenchmarkError, Places
from benchmarks.scaling import AXES, Plan, check_axes, measure_scaling
from benchmarks.speed import measure_speed
from benchmarks.subject import Subject, make_subject
from benchmarks.workload import Workload, dense, dolly
from lorikeet.errors import LorikeetError

SHARED = ROOT.parent / "shared"
MEMORY_EXAMPLES = 4
WORKLOADS = ["dolly", "dense"]
MICRO_EXAMPLES = {"cpu": 2, "cuda": 8}
"""Rows of a padded micro-batch of dolly. A CPU suffers from pads, a GPU from small products."""

Found = tuple[dict[str, Any], str]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what the arguments name; print tables, write JSON. Returns the exit code."""
    options = parser().parse_args(arguments)
    report: dict[str, Any] = {"command": options.command}
    report["options"] = {key: value for key, value in vars(options).items() if key != "run"}
    try:
        check_device(options.device)
        report["machine"] = describe_machine(options.device)
        with tempfile.TemporaryDirectory(prefix="lorikeet-bench-") as scratch:
            places = Places(
                python=Path(sys.executable),
                peers_python=options.peers_python.absolute(),
                unsloth_python=options.unsloth_python.absolute(),
                device=options.device,
                folder=Path(scratch),
                threads=options.threads,
                timeout=options.timeout,
            )
            found = options.run(options, places)
    except (BenchmarkError, LorikeetError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    report["results"] = [result for result, _ in found]
    if options.device == "cuda":
        print(gpu_line(report["machine"]), end="\n\n")
    print("\n\n".join(table for _, table in found))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=2, default=str) + "\n", encoding="utf-8")
    return 0


def run(options: argparse.Namespace, places: Places) -> list[Found]:
    """The workloads one after the other; or peak memory."""
    contestants = chosen(options.contestants or DEFAULT[places.device], places.device)
    subject = make_subject(options.model, places.folder, dtype=options.dtype, device=places.device)
    if options.memory:
        load = _dense(subject, options, examples=options.dense_examples or MEMORY_EXAMPLES)
        return [
            measure_memory(contestants, subject, load, places, dtype=options.dtype, r=options.r)
        ]
    return [
        measure_speed(
            contestants,
            subject,
            load,
            places,
            dtype=options.dtype,
            r=options.r,
            warmup=options.warmup,
        )
        for load in _workloads(options, subject)
    ]


def parity(options: argparse.Namespace, places: Places) -> list[Found]:
    """Curves of loss."""
    contestants = chosen(options.contestants, places.device)
    subject = make_subject(options.model, places.folder, dtype=options.dtype, device=places.device)
    load = dolly(options.data, subject.folder, steps=options.steps)
    return [measure_parity(contestants, subject, load, places, dtype=options.dtype, r=options.r)]


def scaling(options: argparse.Namespace, places: Places) -> list[Found]:
    """The cells of the axes."""
    check_axes(options.axes)
    plan = Plan(
        model=options.model,
        data=options.data,
        shared=SHARED,
        scratch=places.folder,
        device=places.device,
        dtype=options.dtype,
        steps=options.steps + 1,
        seconds=options.cell_seconds,
    )
    return [measure_scaling(options.axes, plan, places)]


def chosen(names: Sequence[str], device: str) -> list[Contestant]:
    """The contestants of these names.

    Raises:
        BenchmarkError: there is no such contestant, or it does not run on this device.
    """
    unknown = [name for name in names if name not in CONTESTANTS]
    if unknown:
        raise BenchmarkError(
            f"unknown contestants {', '.join(unknown)}; there are {', '.join(CONTESTANTS)}"
        )
    found = [CONTESTANTS[name] for name in names]
    elsewhere = [contestant.name for contestant in found if device not in contestant.devices]
    if elsewhere:
        raise BenchmarkError(f"{', '.join(elsewhere)} cannot take part with --device {device}")
    return found


def _workloads(options: argparse.Namespace, subject: Subject) -> list[Workload]:
    unknown = [name for name in options.workloads if name not in WORKLOADS]
    if unknown:
        raise BenchmarkError(f"unknown workloads {', '.join(unknown)}; there are dolly and dense")
    made: dict[str, Callable[[], Workload]] = {
        "dolly": lambda: dolly(
            options.data,
            subject.folder,
            steps=_steps(options),
            micro_examples=options.micro_examples or MICRO_EXAMPLES[options.device],
        ),
        "dense": lambda: _dense(subject, options, examples=options.dense_examples or 2),
    }
    return [made[name]() for name in options.workloads]


def _dense(subject: Subject, options: argparse.Namespace, *, examples: int) -> Workload:
    return dense(
        subject.shape.vocabulary,
        steps=options.memory_steps if options.memory else _steps(options),
        examples=examples,
        length=options.length,
    )


def _steps(options: argparse.Namespace) -> int:
    return int(options.warmup + options.rounds)


def parser() -> argparse.ArgumentParser:
    """All options, with their help."""
    made = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    verbs = made.add_subparsers(dest="command", required=True)
    _run_options(_verb(verbs, "run", run, "speed of all contestants, or with --memory their peak"))
    verb = _verb(verbs, "parity", parity, "losses of Lorikeet's settings beside each other")
    _contestants(verb, ["lorikeet", "lorikeet-off"])
    verb.add_argument("--steps", type=_positive, default=50, help="optimizer steps")
    verb.add_argument("--r", type=_positive, default=16, help="rank of LoRA")
    verb = _verb(verbs, "scaling", scaling, "Lorikeet against length, rank, model and rows")
    verb.add_argument("--axes", type=_names, default=AXES, help="of " + ",".join(AXES))
    verb.add_argument("--steps", type=_positive, default=3, help="timed steps of a cell")
    verb.add_argument("--cell-seconds", type=float, default=180.0, help="limit of a cell's time")
    return made


def _verb(
    verbs: Any, name: str, function: Callable[..., list[Found]], text: str
) -> argparse.ArgumentParser:
    verb: argparse.ArgumentParser = verbs.add_parser(
        name, help=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    verb.set_defaults(run=function)
    add = verb.add_argument
    add("--model", type=Path, default=SHARED / "shapes/smollm2-135m-instruct", help="model folder")
    add("--data", type=Path, default=SHARED / "data/dolly-15k.jsonl", help="rows to train on")
    add("--device", choices=DEVICES, default="cpu", help="where everybody runs")
    add("--dtype", choices=["bf16", "fp32"], default="bf16", help="of all but TRL's defaults")
    add("--threads", type=_positive, help="CPU threads of every worker; all cores if not given")
    add("--timeout", type=float, default=1800.0, help="seconds within which a step must be done")
    add("--out", type=Path, help="JSON file for everything")
    peers = ROOT / ".venv-peers/bin/python"
    add("--peers-python", type=Path, default=peers, help="interpreter with TRL and PEFT")
    unsloth = ROOT / ".venv-unsloth/bin/python"
    add("--unsloth-python", type=Path, default=unsloth, help="interpreter with Unsloth")
    return verb


def _run_options(verb: argparse.ArgumentParser) -> None:
    add = verb.add_argument
    _contestants(verb, None)
    add("--workloads", type=_names, default=WORKLOADS, help="of dolly,dense")
    add("--warmup", type=int, default=3, help="rounds that do not count")
    add("--rounds", type=_positive, default=10, help="rounds that count")
    add("--r", type=_positive, default=16, help="rank of LoRA; alpha is the same")
    add("--length", type=_positive, default=512, help="tokens of a row of dense")
    add("--dense-examples", type=_positive, help="rows of a step of dense; 2, for memory 4")
    text = "rows of a padded micro-batch of dolly; 2, on a GPU 8"
    add("--micro-examples", type=_positive, help=text)
    add("--memory", action="store_true", help="peak memory on dense instead of speed")
    add("--memory-steps", type=_positive, default=3, help="steps of --memory")


def _contestants(verb: argparse.ArgumentParser, default: list[str] | None) -> None:
    text = "separated by commas; the first is the reference. Of " + ",".join(CONTESTANTS)
    if default is None:
        text += "; if not given, " + "; ".join(
            f"on {device} {','.join(names)}" for device, names in DEFAULT.items()
        )
    verb.add_argument("--contestants", type=_names, default=default, help=text)


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 1 up, found {number}")
    return number


if __name__ == "__main__":
    sys.exit(main())

"""`lorikeet demo`: the whole job on the embedded model, in minutes and without a network."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorikeet import console, starter
from lorikeet.cli import export_gguf
from lorikeet.cli.gguf_file import check_file_arguments, make, plan, require_sound, show
from lorikeet.cli.options import add_json
from lorikeet.errors import ConfigError
from lorikeet.files import write_json

if TYPE_CHECKING:
    from lorikeet.cli.gguf_file import Made
    from lorikeet.config import RunConfig
    from lorikeet.data import Turns
    from lorikeet.evaluate import Sample
    from lorikeet.study import RunResult

STYLES = {"pirate": "answers as a pirate", "json": "answers in JSON"}
_MARKER = "demo.json"
_SHOWN = 3
_VERIFIED = 64  # held-out rows of each adapter


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument(
        "--out", default="lorikeet-demo", metavar="DIR", help="where the runs go (lorikeet-demo)"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Train both adapters, measure them, and show them beside the base."""
    out = Path(args.out)
    _make_room(out)
    from lorikeet.study import train_run

    console.note(f"The base is a small model that ships with Lorikeet: {starter.folder()}")
    runs = {}
    for style, meaning in STYLES.items():
        console.note(f"\n== {style}: {meaning}")
        runs[style] = train_run(_config(style, out), label=style)
    console.note("\nanswering held-out prompts with the base and with each adapter ...")
    exact, samples = _ask(out)
    console.note("\nwriting each adapter with its base as a GGUF file, and verifying it ...")
    made = {style: _export(style, out) for style in STYLES}
    found = {
        style: {**_figures(runs[style]), **exact[style], "export": made[style].summary()}
        for style in STYLES
    }
    write_json(out / _MARKER, {"runs": found, "samples": [s.summary() for s in samples]})
    if args.json:
        console.out.print_json((out / _MARKER).read_text(encoding="utf-8"))
    else:
        _show(found, made, samples, out)
    for own in made.values():
        require_sound(own)
    return 0


def _make_room(out: Path) -> None:
    """Replace an earlier demo; refuse anything else."""
    if not out.exists():
        return
    if not (out / _MARKER).is_file():
        raise ConfigError(f"{out} exists and is not an earlier demo; choose another --out")
    shutil.rmtree(out)


def _config(style: str, out: Path) -> RunConfig:
    from lorikeet.config import load_config

    return load_config(
        overrides={
            "model.path": str(starter.folder()),
            "data.path": str(starter.data(style)),
            # Not a share of the same file, whose rows come more than once.
            "data.validation": str(starter.data(f"{style}-test")),
            "lora.r": 16,
            "lora.alpha": 32,
            "train.learning_rate": 3e-3,
            "train.batch_size": 16,
            "train.max_steps": 450,
            "train.eval_every": 150,
            "out": str(out / style),
        }
    )


def _figures(result: RunResult) -> dict[str, Any]:
    """What the run measured on its own held-out rows."""
    receipt = json.loads(result.folder.receipt.read_text(encoding="utf-8"))
    return {"trainable": receipt["parameters"]["trainable"], **receipt["result"]}


def _ask(out: Path) -> tuple[dict[str, dict[str, float]], list[Sample]]:
    """Answer held-out rows: exact answers before and after, and some prompts side by side."""
    from lorikeet.adapters import load_adapter
    from lorikeet.data import Renderer
    from lorikeet.evaluate import Sample, answer
    from lorikeet.lora import remove
    from lorikeet.model import load_model

    base = load_model(starter.folder())
    renderer = Renderer(base.tokenizer)
    tests = {style: _rows(style) for style in STYLES}
    shown = tests["pirate"][:: len(tests["pirate"]) // _SHOWN][:_SHOWN]

    def ask(rows: list[Turns]) -> list[str]:
        prompts = [renderer.prompt(row.prompt) for row in rows]
        return answer(base.model, renderer, prompts)

    before = {style: _share_exact(ask(rows), rows) for style, rows in tests.items()}
    texts = {"base": ask(shown)}
    after = {}
    for style, rows in tests.items():
        load_adapter(base.model, out / style / "adapter")
        after[style] = _share_exact(ask(rows), rows)
        texts[style] = ask(shown)
        remove(base.model)
    exact = {s: {"exact_before": before[s], "exact_after": after[s]} for s in STYLES}
    samples = [
        Sample(row.prompt[-1]["content"], row.response, {name: t[i] for name, t in texts.items()})
        for i, row in enumerate(shown)
    ]
    return exact, samples


def _rows(style: str) -> list[Turns]:
    from lorikeet.data import Turns, detect, normalise, read_rows

    rows = read_rows(str(starter.data(f"{style}-test")))
    return [row for row in normalise(rows, detect(rows)) if isinstance(row, Turns)]


def _share_exact(answers: list[str], rows: list[Turns]) -> float:
    return sum(a == row.response for a, row in zip(answers, rows, strict=True)) / len(rows)


def _export(style: str, out: Path) -> Made:
    """`lorikeet export gguf --verify` on held-out rows."""
    parser = argparse.ArgumentParser()
    export_gguf.add_arguments(parser)
    flags = {
        "--adapter": out / style,
        "--type": "q4_k_m",
        "--out": out / f"{style}-q4_k_m.gguf",
        "--data": starter.data(f"{style}-test"),
        "--data.limit": _VERIFIED,
    }
    args = parser.parse_args(["--verify", *(str(word) for pair in flags.items() for word in pair)])
    check_file_arguments(args)
    return make(args, plan(args), Path(args.out))


def _show(
    found: dict[str, dict[str, Any]], made: dict[str, Made], samples: list[Sample], out: Path
) -> None:
    columns = ["adapter", "perplexity: base", "LoRA", "exact: base", "LoRA", "seconds"]
    console.out.print()
    console.out.print(
        console.table("held-out rows", columns, [_row(name, run) for name, run in found.items()])
    )
    for name, run in found.items():
        low, high = run["difference"]["interval95"]
        console.out.print(
            f"{name} - base: {run['difference']['nll']:+.3f} nats/token,"
            f" 95 % interval [{low:+.3f}, {high:+.3f}]",
            markup=False,
        )
    for sample in samples:
        console.show_sample(sample.prompt, sample.answers)
    for own in made.values():
        console.out.print()
        show(own)
    console.out.print(
        f"""
Both run folders are in {out}. Go on with them:
  lorikeet generate --adapter {out}/pirate --prompt "Count these: fig, drum, leaf."
  lorikeet export ollama --adapter {out}/pirate --type q4_k_m --out for-ollama
  lorikeet eval     --adapter {out}/json --data {starter.data("json-test")}
  lorikeet train    {out}/pirate/config.yaml --lora.r 4 --out another-run""",
        markup=False,
    )


def _row(name: str, run: dict[str, Any]) -> list[str]:
    return [
        name,
        _perplexity(run["base"]),
        _perplexity(run["tuned"]),
        f"{run['exact_before']:.0%}",
        f"{run['exact_after']:.0%}",
        f"{run['seconds']:.0f}",
    ]


def _perplexity(score: dict[str, Any]) -> str:
    """Perplexity with its standard error (delta method: perplexity * stderr of the nll)."""
    error = score["perplexity"] * score["nll_stderr"]
    digits = 0 if error > 1 else 3
    return f"{score['perplexity']:,.{digits}f} ± {error:,.{digits}f}"

"""What a run leaves behind for people and for other tools: receipt, report, samples."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from lorikeet.adapters import read_adapter
from lorikeet.adapters.anatomy import examine
from lorikeet.config import RunConfig
from lorikeet.data import Example, Prepared
from lorikeet.evaluate import Difference, Score, paired_difference
from lorikeet.evaluate.samples import Sample
from lorikeet.files import write_json, write_text
from lorikeet.lora import lora_layers
from lorikeet.model import Base, describe, peak_memory
from lorikeet.study.result import RunResult

_PACKAGES = ("lorikeet", "torch", "transformers", "tokenizers", "safetensors")


def provenance(base: Base, prepared: Prepared, config: RunConfig) -> dict[str, Any]:
    """What an adapter was made from: it travels inside `adapter_config.json`."""
    return {
        "versions": _versions(),
        **base.identity,
        "template": prepared.template_name,
        "template_hash": prepared.template_hash,
        "data_sha256": prepared.sha256,
        "held_out_sha256": documents_sha256(prepared.validation),
        "max_length": config.data.max_length,
        "seed": config.train.seed,
    }


def documents_sha256(examples: Sequence[Example]) -> str | None:
    """Hash of documents as the model sees them, in their order; None without any."""
    text = json.dumps([list(example.ids) for example in examples])
    return hashlib.sha256(text.encode()).hexdigest() if examples else None


def surroundings() -> dict[str, Any]:
    """Versions and machine, for a study's receipt."""
    return {"versions": _versions(), "machine": describe()}


def write_results(result: RunResult, base: Base, prepared: Prepared, config: RunConfig) -> None:
    """Write `samples.jsonl`, `report.md` and, last of all, `receipt.json`."""
    folder = result.folder
    lines = [json.dumps(sample.summary(), ensure_ascii=False) for sample in result.samples]
    write_text(folder.samples, "".join(line + "\n" for line in lines))
    receipt = _receipt(result, base, prepared, config)
    write_text(folder.report, _report(result, config, receipt))
    write_json(folder.receipt, receipt)


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from a source tree that was never installed
            found[package] = "unknown"
    return found


def _receipt(
    result: RunResult, base: Base, prepared: Prepared, config: RunConfig
) -> dict[str, Any]:
    difference = _difference(result.tuned, result.base)
    return {
        "method": config.train.method,
        "model": base.path,
        **provenance(base, prepared, config),
        "machine": {
            **describe(),
            "device": str(base.machine.device),
            "dtype": base.machine.dtype_name,
        },
        "parameters": {"base": result.parameters.base, "trainable": result.parameters.trainable},
        "data": asdict(prepared.report),
        "training": {
            "examples": len(prepared.train),
            "supervised_tokens": sum(example.supervised_tokens for example in prepared.train),
        },
        "result": {
            "steps": result.state.step,
            "best_step": result.state.best_step,
            "seconds": result.seconds,
            "peak_memory": peak_memory(base.machine.device),
            "base": result.base.summary() if result.base else None,
            "tuned": result.tuned.summary() if result.tuned else None,
            "difference": difference.summary() if difference else None,
            "seen": _seen(result),
            "moved": _moved(result, base),
        },
    }


def _seen(result: RunResult) -> dict[str, Any] | None:
    """What training did to rows that it showed, beside what it did to those held out."""
    base, tuned = result.seen_base, result.seen_tuned
    if base is None or tuned is None:
        return None
    return {
        "base": base.summary(),
        "tuned": tuned.summary(),
        "difference": paired_difference(tuned, base).summary(),
    }


def _moved(result: RunResult, base: Base) -> float | None:
    """Norm of the adapter's updates over that of the weights that they change.

    None after full fine-tuning, which leaves no weights to compare with, and where weights are
    packed or their modules are called otherwise in the file.
    """
    layers = lora_layers(base.model)
    if not layers:
        return None
    adapter = read_adapter(result.folder.adapter)
    weights: dict[str, Any] = {name: layer.base.weight for name, layer in layers.items()}
    fits = adapter.updates.keys() == weights.keys() and all(
        weights[name].is_floating_point() and tuple(weights[name].shape) == update.shape
        for name, update in adapter.updates.items()
    )
    return examine(adapter, weights.__getitem__).total.relative if fits else None


def _difference(tuned: Score | None, base: Score | None) -> Difference | None:
    return paired_difference(tuned, base) if tuned and base else None


def _report(result: RunResult, config: RunConfig, receipt: dict[str, Any]) -> str:
    parameters = result.parameters
    parts = [
        f"# {config.train.method} on {config.data.path}",
        f"Base model `{config.model.path}`: {parameters.base:,} parameters,"
        f" {parameters.trainable:,} trained ({parameters.percent:.2f} %),"
        f" {result.state.step} steps, {result.seconds:.1f} s in steps.",
        _scores(result, config.train.method),
        "## Samples",
        *[_side_by_side(sample) for sample in result.samples],
        "## Run it again",
        "```\nlorikeet train config.yaml --out ANOTHER_FOLDER\n```",
        f"Data sha256 `{receipt['data_sha256']}`, base fingerprint"
        f" `{receipt['base_fingerprint']}`; versions and machine are in `receipt.json`.",
    ]
    return "\n\n".join(parts) + "\n"


def _scores(result: RunResult, method: str) -> str:
    if result.base is None or result.tuned is None:
        return "No rows were held out, so nothing was measured."
    rows = [
        "| validation | nll (nats/token) | standard error | perplexity | bits per byte |",
        "|---|---|---|---|---|",
        *[_score_row(name, s) for name, s in (("base", result.base), (method, result.tuned))],
    ]
    return "\n".join(rows) + f"\n\nPaired difference: {_difference(result.tuned, result.base)}."


def _score_row(name: str, score: Score) -> str:
    error = "n/a" if score.nll_stderr is None else f"{score.nll_stderr:.4f}"
    bits = "n/a" if score.bits_per_byte is None else f"{score.bits_per_byte:.4f}"
    return f"| {name} | {score.nll:.4f} | {error} | {score.perplexity:.3f} | {bits} |"


def _side_by_side(sample: Sample) -> str:
    lines = [f"**{_inline(sample.prompt)}**", f"- data: {_inline(sample.reference)}"]
    lines += [f"- {name}: {_inline(text)}" for name, text in sample.answers.items()]
    return "\n".join([lines[0], "", *lines[1:]])


def _inline(text: str, *, longest: int = 300) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= longest else flat[:longest] + " ..."

"""What each type of GGUF file costs: `python -m benchmarks.export --model M --adapter A --data D`.

Every type is written, read back by Lorikeet and by llama.cpp, and compared with the model in
float32, as `lorikeet export gguf --verify` does.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from benchmarks.tables import markdown
from lorikeet.adapters import read_adapter
from lorikeet.cli.subject import adapter_folder
from lorikeet.cli.verification import exact_subject, material
from lorikeet.config import RunConfig
from lorikeet.export.chain import Link, check_chain
from lorikeet.export.convert import Conversion, export_gguf
from lorikeet.export.llama_cpp import find
from lorikeet.gguf.mixture import KINDS

COLUMNS = ["type", "bits a weight", "perplexity", "KL, mean", "KL, 99 %", "greedy"]
OTHER = ["in llama.cpp: perplexity", "KL, mean", "KL, 99 %", "greedy"]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapter")
    parser.add_argument("--data", default="")
    parser.add_argument("--limit", type=int, default=64)
    args = parser.parse_args()
    config = RunConfig()
    config.data.path, config.data.limit = args.data, args.limit
    model, folder = Path(args.model), adapter_folder(args.adapter)
    adapter = read_adapter(folder) if folder else None
    subject = exact_subject(config, model, folder, allow_mismatch=False)
    compared = material(config, subject, prompts=None)
    rows = []
    with tempfile.TemporaryDirectory(prefix="lorikeet-export-") as scratch:
        for kind in KINDS:
            conversion = Conversion.plan(
                model, kind, adapter=adapter, tokenizer=subject.base.tokenizer
            )
            exported = export_gguf(conversion, Path(scratch) / f"{kind}.gguf")
            chain = check_chain(
                conversion,
                exported.out,
                subject.base.model,
                compared,
                adapted=adapter is not None,
                llama_cpp=find() is not None,
            )
            own = next(link for link in chain.links if link.name == kind)
            row = [kind, f"{exported.bits_per_weight:.2f}", *_cells(own)]
            if chain.spelling:
                row += _cells(chain.links[-1])
            rows.append(row)
            exported.out.unlink()
    reference = chain.links[-1].found.reference
    print(markdown([*COLUMNS, *OTHER][: len(rows[0])], rows))
    print(f"\n{chain.reference} in float32: perplexity {reference.perplexity:.4f}, ", end="")
    print(f"{reference.tokens:,} tokens of {len(reference.nats):,} documents.")


def _cells(link: Link) -> list[str]:
    found = link.found
    return [
        f"{found.candidate.perplexity:.4f}",
        f"{found.kl_mean:.1e}",
        f"{found.kl_p99:.1e}",
        f"{found.agreeing:.0%}",
    ]


if __name__ == "__main__":
    main()

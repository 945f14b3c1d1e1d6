"""How long a change of adapter takes: `python -m benchmarks.swap`, on SmolLM2-135M's shape.

Two adapters of rank 16 on every linear layer lie beside one base; the time is that of
`AdapterSet.use`, from one to the other and to the base alone.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter

from benchmarks.process import ROOT
from benchmarks.tables import markdown
from lorikeet.adapters import AdapterSet, save_adapter
from lorikeet.config import LoraConfig
from lorikeet.lora import inject, remove
from lorikeet.model import init_model

MODEL = ROOT.parent / "shared" / "shapes" / "smollm2-135m-instruct"
ROUNDS = 50


def main() -> None:
    """Print the table."""
    model = init_model(str(MODEL), seed=0, dtype="bf16").model
    config = LoraConfig(r=16)
    with tempfile.TemporaryDirectory(prefix="lorikeet-swap-") as scratch:
        folder = Path(scratch) / "adapter"
        inject(model, config, seed=0)
        save_adapter(model, folder, config=config, base_model=str(MODEL), provenance={})
        remove(model)
        adapters = AdapterSet(model)
        started = perf_counter()
        for name in ("one", "two"):
            adapters.load(name, folder)
        loading = (perf_counter() - started) / 2
    seconds: list[list[float]] = [[], [], []]
    for _ in range(ROUNDS):
        for to, times in zip(("one", "two", None), seconds, strict=True):
            started = perf_counter()
            adapters.use(to)
            times.append(perf_counter() - started)
    rows = [
        [what, f"{median(times) * 1e3:.1f}", f"{max(times) * 1e3:.1f}"]
        for what, times in zip(
            ("base to adapter", "adapter to adapter", "adapter to base"), seconds, strict=True
        )
    ]
    print(markdown(["change", "ms, median", "ms, longest"], rows))
    print(f"\n{ROUNDS} rounds; an adapter loads in {loading:.2f} s.")


if __name__ == "__main__":
    main()

"""How fast weights become blocks and back: `python -m benchmarks.quantize [--threads N]`.

A matrix of normal numbers, 2048 wide, goes to every type with and without importance. GB/s are of
the float32 weights. The last column is llama.cpp on one thread, where xllamacpp is installed.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor

from benchmarks.tables import markdown
from lorikeet.gguf import TYPES, decode, encode

WIDTH = 2048
ROUNDS = 3

Encode = Callable[[str, Tensor, "Tensor | None"], Tensor]


def llama_cpp() -> Encode | None:
    """llama.cpp's quantiser, if there is one."""
    spec = importlib.util.find_spec("xllamacpp")
    folders = spec.submodule_search_locations if spec else None
    libraries = [path for folder in folders or () for path in Path(folder).glob("xllamacpp*.so")]
    if not libraries:
        return None
    quantise = ctypes.CDLL(str(libraries[0])).ggml_quantize_chunk
    number, pointer = ctypes.c_int64, ctypes.c_void_p
    quantise.argtypes = [ctypes.c_int, pointer, pointer, number, number, number, pointer]
    quantise.restype = ctypes.c_size_t

    def call(name: str, rows: Tensor, importance: Tensor | None) -> Tensor:
        kind = TYPES[name]
        out = torch.empty(rows.numel() // kind.weights * kind.bytes, dtype=torch.uint8)
        columns = None if importance is None else importance.data_ptr()
        quantise(kind.id, rows.data_ptr(), out.data_ptr(), 0, len(rows), WIDTH, columns)
        return out

    return call


def fastest(work: Callable[[], object]) -> float:
    """Seconds of the fastest of some rounds: what else ran can only have made it slower."""
    times = []
    for _ in range(ROUNDS):
        started = perf_counter()
        work()
        times.append(perf_counter() - started)
    return min(times)


def row(name: str, rows: Tensor, importance: Tensor | None, other: Encode | None) -> list[str]:
    """One line of the table."""
    data = encode(name, rows, importance)
    there = fastest(lambda: encode(name, rows, importance))
    back = fastest(lambda: decode(name, data))
    theirs = fastest(lambda: other(name, rows, importance)) if other else None
    return [
        name,
        "no" if importance is None else "yes",
        f"{there:.3f}",
        f"{rows.numel() / there / 1e6:.1f}",
        f"{4 * rows.numel() / there / 1e9:.2f}",
        f"{rows.numel() / back / 1e6:.0f}",
        f"{rows.numel() / theirs / 1e6:.1f}" if theirs else "",
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rows", type=int, default=2048)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    random = torch.Generator().manual_seed(0)
    rows = torch.randn(given.rows, WIDTH, generator=random) * 0.02
    importance = torch.rand(WIDTH, generator=random) + 0.01
    other = llama_cpp()
    lines = [
        row(name, rows, columns, other)
        for name in TYPES
        for columns in ((None,) if name in ("F32", "F16", "BF16", "Q8_0") else (None, importance))
    ]
    head = [
        "type",
        "importance",
        "seconds",
        "M weights/s",
        "GB/s",
        "decoded, M/s",
        "llama.cpp, M/s",
    ]
    print(markdown(head, lines))
    print(f"\n{rows.numel() / 1e6:.1f} M weights, {given.threads} threads (llama.cpp: one).")


if __name__ == "__main__":
    main()

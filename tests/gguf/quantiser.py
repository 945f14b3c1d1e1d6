"""llama.cpp's own quantiser, and the script that measured it.

    python tests/gguf/quantiser.py [SHARED_LIBRARY] > tests/gguf/quantiser.json

quantises every matrix of the starter model with llama.cpp (the library in an installed xllamacpp,
or a libggml-base.so) and with Lorikeet, without importance and with the importance of
`importance`. For each type the table has llama.cpp's squared error (weighted by importance), a
digest of its blocks, the share of blocks that Lorikeet makes the same, and Lorikeet's error over
llama.cpp's.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import json
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

import lorikeet
from lorikeet.gguf.blocks import TYPES, decode, encode, row_bytes

TABLE = Path(__file__).with_name("quantiser.json")
STARTER = Path(lorikeet.__file__).parent / "starter/model/model.safetensors"
QUANTISED = [name for name in TYPES if name not in ("F32", "F16", "BF16")]


class Quantiser:
    """The quantiser of a shared library that has ggml's C functions."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        self._quantise = library.ggml_quantize_chunk
        self._quantise.restype = ctypes.c_size_t
        self._quantise.argtypes = [
            ctypes.c_int,
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_int64,
            ctypes.c_int64,
            ctypes.c_int64,
            ctypes.c_void_p,
        ]
        self._valid = library.ggml_validate_row_data
        self._valid.restype = ctypes.c_bool
        self._valid.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]

    def encode(self, name: str, rows: Tensor, importance: Tensor | None = None) -> Tensor:
        """As `lorikeet.gguf.blocks.encode`."""
        rows = rows.contiguous()
        out = torch.zeros(len(rows), row_bytes(name, rows.shape[1]), dtype=torch.uint8)
        columns = None if importance is None else importance.contiguous().data_ptr()
        shape = (0, len(rows), rows.shape[1])
        size = self._quantise(TYPES[name].id, rows.data_ptr(), out.data_ptr(), *shape, columns)
        assert size == out.numel()
        return out

    def accepts(self, name: str, data: Tensor) -> bool:
        """Whether llama.cpp would read, and llama-quantize write, these blocks."""
        return bool(self._valid(TYPES[name].id, data.data_ptr(), data.numel()))


@cache
def installed() -> Quantiser | None:
    """The one in the xllamacpp package, if that is installed."""
    spec = importlib.util.find_spec("xllamacpp")
    folders = spec.submodule_search_locations if spec else None
    libraries = [path for folder in folders or () for path in Path(folder).glob("xllamacpp*.so")]
    return Quantiser(libraries[0]) if libraries else None


def starter(step: int = 1) -> Iterator[Tensor]:
    """Every matrix of the starter model, or each `step`-th of them, float32."""
    matrices = [weight for _, weight in sorted(load_file(STARTER).items()) if weight.dim() == 2]
    for weight in matrices[::step]:
        yield weight.float()


def importance(width: int) -> Tensor:
    """Numbers from 4e-15 to 1 that vary as those of a measured matrix do, by no generator."""
    uneven = (torch.arange(width) * 40503 % 65536 + 1).float() / 65536
    return uneven * uneven * uneven


def digest(name: str, *, weighted: bool, by: Quantiser | None = None) -> str:
    """SHA-256 of what llama.cpp, or Lorikeet, makes of every fourth matrix of the starter."""
    found = hashlib.sha256()
    for rows in starter(4):
        columns = importance(rows.shape[1]) if weighted else None
        found.update((by.encode if by else encode)(name, rows, columns).numpy().tobytes())
    return found.hexdigest()


def squares(found: Tensor, wanted: Tensor, columns: Tensor | None) -> float:
    """Σ importance · difference²."""
    difference = (found - wanted).square()
    if columns is not None:
        difference *= columns
    return float(difference.sum(dtype=torch.float64))


def identical(name: str, one: Tensor, other: Tensor) -> float:
    """The share of blocks that are the same."""
    size = TYPES[name].bytes
    return float((one.view(-1, size) == other.view(-1, size)).all(dim=1).float().mean())


def _compared(name: str, quantiser: Quantiser, *, weighted: bool) -> dict[str, object]:
    theirs = ours = same = weights = 0.0
    for rows in starter():
        columns = importance(rows.shape[1]) if weighted else None
        one, other = encode(name, rows, columns), quantiser.encode(name, rows, columns)
        ours += squares(decode(name, one), rows, columns)
        theirs += squares(decode(name, other), rows, columns)
        same += identical(name, one, other) * rows.numel()
        weights += rows.numel()
    return {
        "error": theirs,
        "digest": digest(name, weighted=weighted, by=quantiser),
        "identical": same / weights,
        "ratio": ours / theirs,
    }


def main() -> None:
    found = Quantiser(Path(sys.argv[1])) if sys.argv[1:] else installed()
    assert found, "install xllamacpp, or name a shared library"
    source = sys.argv[1] if sys.argv[1:] else f"xllamacpp {importlib.metadata.version('xllamacpp')}"
    table: dict[str, object] = {"source": Path(source).name}
    for name in QUANTISED:
        table[name] = {
            "plain": _compared(name, found, weighted=False),
            "importance": _compared(name, found, weighted=True),
        }
    print(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()

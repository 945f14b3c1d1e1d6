"""Damage to files, and what a reader may make of it: a sound file or our error.

As a program it does so for a while under a limit of memory: fuzzing.py READER SECONDS SEED
"""

from __future__ import annotations

import contextlib
import json
import resource
import signal
import struct
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import hypothesis
import numpy as np
import torch
from gguf_files import METADATA, tensors, write_official
from hypothesis import strategies as st
from safetensors.torch import save

from lorikeet.adapters.safe import TORCH, open_safe
from lorikeet.errors import ModelError
from lorikeet.gguf.blocks import TYPES, row_bytes
from lorikeet.gguf.metadata import Field
from lorikeet.gguf.read import open_gguf
from lorikeet.gguf.write import Stored, write_gguf

SECONDS = 2  # of processor time for one file
PER_BYTE = 27  # bytes of memory that a byte of file may take: `{},` in JSON takes 72
AT_LEAST = 64_000  # bytes that a small file may take: messages, buffers, arrays of one value


def read_gguf(path: Path) -> None:
    """Open a file and read everything in it."""
    file = open_gguf(path)
    for name, info in file.tensors.items():
        assert sum(map(len, file.raw(name))) == info.size
        if info.shape and info.type in TYPES:
            stop = min(info.shape[0], 3)
            assert file.rows(name, 0, stop).shape == (stop, *info.shape[1:])


def read_safe(path: Path) -> None:
    """Open a file and read everything in it."""
    file = open_safe(path)
    for name, entry in file.entries.items():
        assert sum(map(len, file.raw(name))) == entry.end - entry.begin
        if entry.shape and entry.dtype in TORCH:
            stop = min(entry.shape[0], 3)
            assert file.rows(name, 0, stop).shape == (stop, *entry.shape[1:])


READERS: dict[str, Callable[[Path], None]] = {"gguf": read_gguf, "safetensors": read_safe}


def sound(reader: str) -> list[bytes]:
    """Small files to damage."""
    return sound_gguf() if reader == "gguf" else sound_safe()


def sound_gguf() -> list[bytes]:
    weights = np.linspace(-1, 1, 2 * 256, dtype=np.float32).reshape(2, 256)
    quantised = {name: (name, weights) for name in ("Q8_0", "Q4_0", "Q5_1", "BF16")}
    vocabulary = {"tokenizer.ggml.tokens": Field("str", [f"word{i}" for i in range(40)])}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x"
        found = []
        for metadata, arrays, blocks in (
            (METADATA, tensors(), {}),
            (vocabulary, {}, quantised),
            ({"general.alignment": Field("u32", 64)}, tensors(), {}),
        ):
            write_official(path, metadata, arrays, quantised=blocks)
            found.append(path.read_bytes())
        blocks_of = {name: Stored(name, (2, 256), partial(_noise, name)) for name in TYPES}
        write_gguf(path, {}, blocks_of)
        found.append(path.read_bytes())
    return found


def _noise(name: str) -> list[bytes]:
    return [np.random.default_rng(0).bytes(2 * row_bytes(name, 256))]


def sound_safe() -> list[bytes]:
    small = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4).bfloat16()}
    every = {name: torch.ones(2, 2).to(dtype) for name, dtype in TORCH.items()}
    return [save(small, metadata={"format": "pt"}), save(every), save({})]


_EDGES = [0, 1, 2, 7, 31, 32, 255, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40]
_BEYOND = [2**48, 2**62, 2**63 - 1, 2**63, 2**64 - 32, 2**64 - 1]
_NUMBERS = st.sampled_from([*_EDGES, *_BEYOND]) | st.integers(0, 2**64 - 1)
_JSON = [b"{}", b"[]", b"[[[[", b'"a":', b"1e999", b"-1", b"9" * 30, b"null", b'"shape":[0]']
_KEYS = [b"GGUF", b"general.alignment", b"\xff\xfe", b'"dtype":"F4"', b'"__metadata__":{}']
_WORDS = st.sampled_from([*_JSON, *_KEYS])


@st.composite
def damaged(draw: st.DrawFn, files: list[bytes]) -> bytes:
    """A file with a few places changed, cut, moved or made up."""
    data = bytearray(draw(st.sampled_from(files)))
    if draw(st.integers(0, 20)) == 0:
        data[4:] = draw(st.binary(max_size=200))
    for _ in range(draw(st.integers(0, 5))):
        at = draw(st.integers(0, len(data)))
        kind = draw(st.integers(0, 6))
        if kind == 0 and at < len(data):
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == 1:
            data[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
        elif kind == 2:
            size = draw(st.sampled_from([4, 8]))
            data[at : at + size] = struct.pack("<Q", draw(_NUMBERS))[:size]
        elif kind == 3:
            del data[at : at + draw(st.sampled_from([1, 8, 40, 10_000]))]
        elif kind == 4:
            other = draw(st.sampled_from(files))
            start = draw(st.integers(0, len(other)))
            piece = other[start : start + draw(st.integers(0, 300))]
            data[at : at + draw(st.sampled_from([0, len(piece)]))] = piece
        elif kind == 5:
            data[at:at] = draw(_WORDS)
        else:
            data[at:at] = bytes(draw(st.sampled_from([1, 8, 32, 1000])))
    return bytes(data)


@dataclass
class Tally:
    """What came of the files.

    Attributes:
        read: files that were read.
        refused: files that were refused.
        seconds: the longest processor time of one.
        peak: the most bytes of memory for one file.
    """

    read: int = 0
    refused: int = 0
    seconds: float = 0.0
    peak: int = 0

    def judge(self, reader: str, path: Path, data: bytes) -> None:
        """Read a file with these bytes; anything but a sound file or our error comes through."""
        path.write_bytes(data)
        bound = AT_LEAST + PER_BYTE * len(data)
        started = time.process_time()
        with limited(), self.bounded(bound):
            try:
                READERS[reader](path)
                self.read += 1
            except ModelError as error:
                assert str(path) in str(error) or "in " in str(error)
                assert len(str(error)) < 10_000
                self.refused += 1
        self.seconds = max(self.seconds, time.process_time() - started)

    @contextlib.contextmanager
    def bounded(self, most: int) -> Iterator[None]:
        """Python and numpy must not take more bytes of memory within the block."""
        tracemalloc.start()
        try:
            yield
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            self.peak = max(self.peak, peak)
        assert peak <= most, f"{peak:,} bytes of memory, not {most:,}"


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """No file may take longer than `SECONDS` of processor time."""

    def late(*_: object) -> None:
        raise TimeoutError(f"took longer than {SECONDS} seconds")

    before = signal.signal(signal.SIGVTALRM, late)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def attack(reader: str, *, examples: int, seed: int, folder: Path) -> Tally:
    """Have so many damaged files read; one that is not answered well is made small, and raised."""
    tally = Tally()

    @hypothesis.settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.seed(seed)
    @hypothesis.given(damaged(sound(reader)))
    def check(data: bytes) -> None:
        tally.judge(reader, folder / "fuzzed", data)

    check()
    return tally


def main(reader: str, seconds: float, seed: int) -> None:
    """Attack for so long with half a gigabyte more than there is now, and print what came of it."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + (512 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    end, total = time.monotonic() + seconds, Tally()
    with tempfile.TemporaryDirectory() as folder:
        while time.monotonic() < end:
            found = attack(reader, examples=2000, seed=seed, folder=Path(folder))
            total.read += found.read
            total.refused += found.refused
            total.seconds = max(total.seconds, found.seconds)
            total.peak = max(total.peak, found.peak)
            seed += 1
    print(json.dumps(asdict(total)))


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]))

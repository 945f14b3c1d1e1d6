"""Buffers that a thread uses again for every chunk, and a pool that works through the chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from threading import Lock
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float32]
Bytes: TypeAlias = NDArray[np.uint8]


class Scratch:
    """Named buffers: memory that comes and goes would cost more than the sums done in it.

    A buffer holds what was left in it. Two uses of a name at the same time overwrite each other.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, NDArray[Any]] = {}

    def floats(self, name: str, *shape: int) -> Floats:
        """A float32 array of this shape."""
        return self._take(name, shape, np.float32)

    def bytes(self, name: str, *shape: int) -> Bytes:
        """A uint8 array of this shape."""
        return self._take(name, shape, np.uint8)

    def _take(self, name: str, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        size = int(np.prod(shape))
        held = self._buffers.get(name)
        if held is None or held.size < size:
            held = self._buffers[name] = np.empty(size, dtype)
        return held[:size].reshape(shape)


def in_chunks(
    count: int, size: int, work: Callable[[slice, Scratch], None], *, threads: int
) -> None:
    """Call `work` for slices of `size` that cover 0 .. count.

    Each slice is done by one thread from start to end, so the result does not depend on how many
    there are. numpy lets other threads run while it computes.
    """
    slices = (slice(begin, min(begin + size, count)) for begin in range(0, count, size))
    threads = min(threads, -(-count // size))
    if threads < 2:
        _take_all(slices, work)
        return
    shared = _Shared(slices)
    with ThreadPoolExecutor(threads - 1) as pool:
        others = [pool.submit(_take_all, shared, work) for _ in range(threads - 1)]
        try:
            _take_all(shared, work)
        finally:
            shared.close()
        for other in others:
            other.result()


def _take_all(slices: Iterator[slice], work: Callable[[slice, Scratch], None]) -> None:
    scratch = Scratch()
    with np.errstate(all="ignore"):  # empty blocks divide by zero, and the result is not used
        for chunk in slices:
            work(chunk, scratch)


class _Shared(Iterator[slice]):
    """An iterator that several threads may take from; closed, it has no more."""

    def __init__(self, slices: Iterator[slice]) -> None:
        self._slices = slices
        self._lock = Lock()

    def __next__(self) -> slice:
        with self._lock:
            return next(self._slices)

    def close(self) -> None:
        with self._lock:
            self._slices = islice(self._slices, 0)

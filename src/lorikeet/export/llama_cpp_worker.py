"""The process in which a stock llama.cpp runs: its C interface through ctypes, answers over a pipe.

`llama_cpp.py` starts this file by its path, so that nothing of ours is imported. A request is a
line of JSON, the first of which says what to load; the answer is frames of a letter, the number of
bytes (uint64, little-endian) and the bytes: `D` data, `J` JSON, which ends the answer, `E` what is
wrong, as text, which ends it too. What llama.cpp prints goes to stderr.

Structures that llama.cpp takes and gives by value change from version to version. Two things make
that harmless (System V x86-64 and AArch64, where such structures lie in memory and not in
registers): ours are larger than theirs, and only fields are written whose place is known, either
because they come first in every version or because the defaults around them show where they are.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import struct
import sys
from collections.abc import Iterator, Sequence
from typing import IO, Any

import numpy as np

_POINTER, _TEXT = ctypes.c_void_p, ctypes.c_char_p
_MOST_LOGITS = 1 << 24  # numbers that one decode may give: 64 MiB
_LARGEST_BATCH = 512
_F32, _TWO_F16 = 0, struct.pack("<ii", 1, 1)  # ggml's numbers of these types
_NO_FLASH = 0
_SEARCHED = 160  # bytes of the parameters of a context in which fields are looked for


class _Parameters(ctypes.Structure):
    """Parameters of a model or a context, with room for what versions may add."""

    _fields_ = (("words", ctypes.c_uint64 * 128),)


class _Batch(ctypes.Structure):
    """`llama_batch` (llama.h)."""

    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.POINTER(ctypes.c_float)),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "llama_backend_init": (None, []),
    "llama_model_default_params": (_Parameters, []),
    "llama_context_default_params": (_Parameters, []),
    "llama_model_load_from_file": (_POINTER, [_TEXT, _Parameters]),
    "llama_init_from_model": (_POINTER, [_POINTER, _Parameters]),
    "llama_model_get_vocab": (_POINTER, [_POINTER]),
    "llama_vocab_n_tokens": (ctypes.c_int32, [_POINTER]),
    "llama_vocab_is_eog": (ctypes.c_bool, [_POINTER, ctypes.c_int32]),
    "llama_set_n_threads": (None, [_POINTER, ctypes.c_int32, ctypes.c_int32]),
    "llama_adapter_lora_init": (_POINTER, [_POINTER, _TEXT]),
    "llama_get_memory": (_POINTER, [_POINTER]),
    "llama_memory_clear": (None, [_POINTER, ctypes.c_bool]),
    "llama_batch_init": (_Batch, [ctypes.c_int32] * 3),
    "llama_decode": (ctypes.c_int32, [_POINTER, _Batch]),
    "llama_get_logits": (ctypes.POINTER(ctypes.c_float), [_POINTER]),
    "llama_tokenize": (
        ctypes.c_int32,
        [_POINTER, _TEXT, ctypes.c_int32, _POINTER, ctypes.c_int32, ctypes.c_bool, ctypes.c_bool],
    ),
}


class Refused(Exception):
    """llama.cpp did not do what it was asked for."""


class Engine:
    """A loaded model with its context.

    Args:
        library: the shared library with llama.cpp's C interface.
        model: a GGUF file.
        adapter: a GGUF LoRA, or None.
        context: the most tokens at once.
        threads: how many to compute with.
    """

    def __init__(
        self, library: str, model: str, adapter: str | None, context: int, threads: int
    ) -> None:
        self.lib = _load_library(library)
        self.lib.llama_backend_init()
        self._devices = ctypes.c_void_p(None)  # the end of an empty list
        self.model = self.lib.llama_model_load_from_file(os.fsencode(model), self._on_the_cpu())
        if not self.model:
            raise Refused(f"cannot load {model}")
        self.vocabulary = self.lib.llama_model_get_vocab(self.model)
        self.width = self.lib.llama_vocab_n_tokens(self.vocabulary)
        self.longest = min(max(_MOST_LOGITS // max(self.width, 1), 1), _LARGEST_BATCH, context)
        loaded = self._load_adapter(adapter) if adapter else None
        self.context = self.lib.llama_init_from_model(self.model, self._for_context(context))
        if not self.context:
            raise Refused(f"cannot make a context of {context} tokens for {model}")
        self.lib.llama_set_n_threads(self.context, threads, threads)
        if loaded:
            self._apply(loaded)
        self.batch = self.lib.llama_batch_init(self.longest, 0, 1)

    def _on_the_cpu(self) -> _Parameters:
        """Default parameters of a model; their first field, where there is one, lists devices."""
        parameters: _Parameters = self.lib.llama_model_default_params()
        if parameters.words[0] == 0:  # in old versions numbers come first, and not all are 0
            parameters.words[0] = ctypes.addressof(self._devices)
        return parameters

    def _for_context(self, context: int) -> _Parameters:
        parameters: _Parameters = self.lib.llama_context_default_params()
        sizes = (ctypes.c_uint32 * 3).from_buffer(parameters)
        if tuple(sizes) != (512, 2048, 512):
            raise Refused("the parameters of a context are not as expected: another llama.cpp?")
        sizes[:] = [context, self.longest, self.longest]
        _attend_in_float32(parameters)
        return parameters

    def _load_adapter(self, path: str) -> Any:
        loaded = self.lib.llama_adapter_lora_init(self.model, os.fsencode(path))
        if not loaded:
            raise Refused(f"cannot load the adapter {path}")
        return loaded

    def _apply(self, adapter: Any) -> None:
        if hasattr(self.lib, "llama_set_adapters_lora"):
            one, scale = (ctypes.c_void_p * 1)(adapter), (ctypes.c_float * 1)(1.0)
            function = self.lib.llama_set_adapters_lora
            function.argtypes = [_POINTER, _POINTER, ctypes.c_size_t, _POINTER]
            refused = function(self.context, one, 1, scale)
        else:  # before 2026
            function = self.lib.llama_set_adapter_lora
            function.argtypes = [_POINTER, _POINTER, ctypes.c_float]
            refused = function(self.context, adapter, 1.0)
        if refused:
            raise Refused("cannot apply the adapter")

    def clear(self) -> None:
        """Forget every token."""
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)

    def decode(self, ids: Sequence[int], begin: int, *, every: bool) -> np.ndarray[Any, Any]:
        """Logits [T, V] after each of these tokens, which stand at positions from `begin` on.

        Only those after the last, [1, V], if not `every`. They are overwritten by the next call.
        """
        batch, count = self.batch, len(ids)
        batch.n_tokens = count
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i] = token, begin + i
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            batch.logits[i] = every or i == count - 1
        status = self.lib.llama_decode(self.context, batch)
        if status:
            raise Refused(f"cannot decode {count} tokens from position {begin} on ({status})")
        found = self.lib.llama_get_logits(self.context)
        return np.ctypeslib.as_array(found, (count if every else 1, self.width))

    def logits(self, ids: Sequence[int]) -> Iterator[np.ndarray[Any, Any]]:
        """Logits after each token of a document, in blocks."""
        self.clear()
        for begin in range(0, len(ids), self.longest):
            yield self.decode(ids[begin : begin + self.longest], begin, every=True)

    def continuation(self, prompt: Sequence[int], most: int, stops: set[int]) -> list[int]:
        """The likeliest token, the lowest of equals, again and again."""
        self.clear()
        for begin in range(0, len(prompt), self.longest):
            last = self.decode(prompt[begin : begin + self.longest], begin, every=False)
        found: list[int] = []
        while len(found) < most:
            best = int(np.argmax(last[0]))
            if not np.isfinite(last[0, best]):
                raise Refused(f"the logits after {len(prompt) + len(found)} tokens are not finite")
            if best in stops:
                break
            found.append(best)
            if len(found) < most:
                last = self.decode([best], len(prompt) + len(found) - 1, every=False)
        return found

    def tokenize(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        """Token ids of a text."""
        data = text.encode("utf-8")
        room = len(data) + 16
        while True:
            ids = (ctypes.c_int32 * room)()
            count = self.lib.llama_tokenize(
                self.vocabulary, data, len(data), ids, room, add_special, parse_special
            )
            if count >= 0:
                return ids[:count]
            if -count <= room:
                raise Refused(f"cannot tokenize {len(data)} bytes")
            room = -count

    def ending(self) -> list[int]:
        """The tokens that end an answer."""
        return [i for i in range(self.width) if self.lib.llama_vocab_is_eog(self.vocabulary, i)]


def _load_library(path: str) -> Any:
    try:
        lib = ctypes.CDLL(path)
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(lib, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise Refused(f"{path} is no llama.cpp that is known here: {error}") from None
    return lib


def _attend_in_float32(parameters: _Parameters) -> None:
    """Ask for attention and its cache in float32, where it is certain which fields say so.

    The types of keys and values are two neighbours, F16 by default, between two pairs of pointers
    that are null. Flash attention, which rounds to float16, is the last of four enumerations that
    are -1 (unspecified, automatic) and come before a base and a scale of 0.
    """
    _replace(parameters, bytes(16) + _TWO_F16 + bytes(16), at=16, values=[_F32, _F32])
    _replace(parameters, struct.pack("<6i", *[-1] * 4, 0, 0), at=12, values=[_NO_FLASH])


def _replace(parameters: _Parameters, pattern: bytes, *, at: int, values: list[int]) -> None:
    """Write int32 values `at` bytes into the only place that looks like the pattern, if any."""
    data = bytes(parameters)[:_SEARCHED]
    places = [i for i in range(0, len(data) - len(pattern), 4) if data.startswith(pattern, i)]
    if len(places) == 1:
        struct.pack_into(f"<{len(values)}i", parameters, places[0] + at, *values)


def _send(out: IO[bytes], letter: bytes, data: bytes | memoryview) -> None:
    out.write(letter + struct.pack("<Q", len(data)))
    out.write(data)


def _answer(engine: Engine, request: dict[str, Any], out: IO[bytes]) -> object:
    """Send the data of an answer; what is left of it is returned."""
    if "logits" in request:
        for block in engine.logits(request["logits"]):
            _send(out, b"D", block.data.cast("B"))
        return None
    if "prompt" in request:
        return engine.continuation(request["prompt"], request["most"], set(request["stops"]))
    if "ending" in request:
        return engine.ending()
    return engine.tokenize(request["text"], request["add_special"], request["parse_special"])


def serve(requests: IO[bytes], out: IO[bytes]) -> None:
    """Answer requests, the first of which says what to load, until there are no more."""
    engine: Engine | None = None
    for line in requests:
        request = json.loads(line)
        try:
            if engine is None:
                engine = Engine(**request)
                answer: object = {"width": engine.width}
            else:
                answer = _answer(engine, request, out)
            _send(out, b"J", json.dumps(answer).encode())
        except Refused as error:
            _send(out, b"E", str(error).encode("utf-8", "replace"))
        out.flush()


def main() -> None:
    """Serve over the standard streams; what is printed to stdout goes to stderr."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started us ends us
    with os.fdopen(os.dup(1), "wb", buffering=1 << 20) as out:
        os.dup2(2, 1)
        serve(sys.stdin.buffer, out)


if __name__ == "__main__":
    main()

"""A stock llama.cpp, to compare with: logits, greedy continuations and token ids of a GGUF file.

It is the shared library inside an installed `xllamacpp` or `llama-cpp-python`; neither package is
imported. It runs in a process of its own (`llama_cpp_worker.py`), because llama.cpp answers some
damaged files with abort().
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Collection, Sequence
from contextlib import suppress
from io import BufferedReader
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import torch
from torch import Tensor

from lorikeet.errors import ModelError

_WORKER = Path(__file__).with_name("llama_cpp_worker.py")
_LIBRARIES = {
    "xllamacpp": ("xllamacpp*.so", "xllamacpp*.dylib"),
    "llama_cpp": ("lib/libllama.so", "lib/libllama.dylib"),
}
_PROCESSORS = {"x86_64", "aarch64", "arm64"}  # whose calling conventions are known to suit
_ENVIRONMENT = {
    "GGML_NO_BACKTRACE": "1",  # so that its last lines say why it ended
    "PYTHONSAFEPATH": "1",  # so that the worker imports no neighbour by accident
}
_SHOWN = 6  # lines of llama.cpp's own in one message
_PATIENCE = 2  # seconds that it has to end by itself


def find() -> Path | None:
    """The shared library of an installed llama.cpp, or None."""
    for package, patterns in _LIBRARIES.items():
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            found = [path for pattern in patterns for path in sorted(Path(folder).glob(pattern))]
            if found:
                return found[0]
    return None


class LlamaCpp:
    """A GGUF file in llama.cpp, on the CPU. A context manager: leaving it ends the process.

    Attention computes, and keeps keys and values, in float32 where this can be asked for (`exact`
    says so). By default llama.cpp rounds there to float16, which moves logits by about a thousandth
    of their spread; in float32 it agrees with transformers to a millionth.

    Args:
        model: the GGUF file.
        adapter: a GGUF LoRA that is applied with scale 1.
        context: the most tokens of a document, or of a prompt with its continuation.
        threads: how many to compute with; as many as torch by default.

    Attributes:
        width: how many tokens the vocabulary has.
        exact: whether attention is in float32.

    Raises:
        ModelError: there is no llama.cpp, or it does not load the file, with its own last lines.
    """

    def __init__(
        self,
        model: Path,
        *,
        adapter: Path | None = None,
        context: int = 2048,
        threads: int | None = None,
    ) -> None:
        library = _library()
        self._model = model
        self._context = context
        self._log = tempfile.TemporaryFile("a+b")  # noqa: SIM115 - open as long as we are
        self._process = subprocess.Popen(
            [sys.executable, str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, **_ENVIRONMENT},
        )
        assert self._process.stdin and isinstance(self._process.stdout, BufferedReader)
        self._in, self._out = self._process.stdin, self._process.stdout
        try:
            loaded = self._ask(
                {
                    "library": str(library),
                    "model": str(model),
                    "adapter": str(adapter) if adapter else None,
                    "context": context,
                    "threads": threads or torch.get_num_threads(),
                }
            )
            self.width: int = loaded["width"]
            self.exact = self._in_float32()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        self._out.close()
        with suppress(BrokenPipeError):  # it is gone already
            self._in.close()
        try:
            self._process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def logits(self, ids: Sequence[int]) -> Tensor:
        """Float32 [T, V]: the logits after each of the T tokens of a document.

        Raises:
            ModelError: the tokens do not fit into the context, or llama.cpp failed.
        """
        self._check([ids], more=0)
        found = torch.empty(len(ids), self.width)
        buffer, at = found.view(-1).numpy().data.cast("B"), 0
        for size in self._answer({"logits": list(ids)}):
            if self._out.readinto(buffer[at : at + size]) < size:
                self._ended()
            at += size
        return found

    def continuations(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, stop_ids: Collection[int]
    ) -> list[list[int]]:
        """What follows each prompt: always the likeliest token, of equals the lowest.

        Args:
            prompts: token ids, at least one each.
            max_new_tokens: the longest continuation.
            stop_ids: tokens that end one; they are not part of it.

        Raises:
            ModelError: the tokens do not fit into the context, or llama.cpp failed.
        """
        self._check(prompts, more=max_new_tokens)
        asked = {"most": max_new_tokens, "stops": sorted(stop_ids)}
        return [self._ask({"prompt": list(prompt), **asked}) for prompt in prompts]

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Token ids of a text.

        Args:
            text: the text.
            add_special: add the tokens that begin and end a document, as the file says.
            parse_special: read the names of special tokens as these tokens, not as text.

        Raises:
            ModelError: llama.cpp failed.
        """
        options = {"add_special": add_special, "parse_special": parse_special}
        found: list[int] = self._ask({"text": text, **options})
        return found

    def ending(self) -> list[int]:
        """The tokens after which it writes nothing more: what the file names, and what it knows.

        Raises:
            ModelError: llama.cpp failed.
        """
        found: list[int] = self._ask({"ending": True})
        return found

    def _check(self, documents: Sequence[Sequence[int]], *, more: int) -> None:
        """llama.cpp itself is not asked for what it answers with abort()."""
        for ids in documents:
            if not ids:
                raise ValueError("a document without tokens has no logits")
            if not all(0 <= token < self.width for token in ids):
                wrong = next(token for token in ids if not 0 <= token < self.width)
                raise ValueError(f"{wrong} is no token of {self.width}")
            if len(ids) + more > self._context:
                raise ModelError(
                    f"{len(ids)} tokens and {more} more do not fit into a context of"
                    f" {self._context}; make the context larger"
                )

    def _ask(self, request: dict[str, Any]) -> Any:
        answer = self._answer(request)
        while True:
            try:
                next(answer)
            except StopIteration as end:
                return end.value

    def _answer(self, request: dict[str, Any]) -> Any:
        """Send a request; yields the sizes of data, which must be read, and returns the rest."""
        try:
            self._in.write(json.dumps(request).encode() + b"\n")
            self._in.flush()
        except BrokenPipeError:
            self._ended()
        while True:
            head = self._out.read(9)
            if len(head) < 9:
                self._ended()
            letter, size = head[:1], struct.unpack("<Q", head[1:])[0]
            if letter == b"D":
                yield size
                continue
            data = self._out.read(size)
            if len(data) < size:
                self._ended()
            if letter == b"E":
                self._failed(data.decode("utf-8", "replace"))
            return json.loads(data)

    def _ended(self) -> NoReturn:
        code = self._process.wait()
        reason = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        self._failed(f"it ended with {reason} while at work on {self._model}")

    def _failed(self, what: str) -> NoReturn:
        raise ModelError(f"llama.cpp: {what}; its last lines:", self._lines()[-_SHOWN:])

    def _in_float32(self) -> bool:
        """Whether llama.cpp itself reports that attention and its cache are in float32."""
        log = "\n".join(self._lines())
        return (
            "K (f32)" in log and re.search(r"flash_attn *= *(disabled|0)$", log, re.M) is not None
        )

    def _lines(self) -> list[str]:
        """What llama.cpp has printed."""
        self._log.seek(0)
        text = self._log.read().decode("utf-8", "replace")
        return [line.rstrip() for line in text.splitlines() if line.strip(" .")]


def _library() -> Path:
    if sys.platform == "win32" or platform.machine() not in _PROCESSORS:
        raise ModelError(
            f"llama.cpp cannot be called on {sys.platform} with {platform.machine()}; it can on"
            f" Linux and macOS with {', '.join(sorted(_PROCESSORS))}"
        )
    library = find()
    if library is None:
        raise ModelError("there is no llama.cpp; pip install xllamacpp")
    return library

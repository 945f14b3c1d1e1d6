"""A worker as the orchestrator sees it: a process that is told `go` and answers."""

from __future__ import annotations

import json
import os
import select
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.contestants import Contestant
from benchmarks.protocol import GO, READY, Answer, Job

ROOT = Path(__file__).resolve().parents[1]

_VARIABLES = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "UNSLOTH_DISABLE_STATISTICS": "1",  # it would fetch a file when it loads a model
}

_HOW_TO_BUILD = {
    "lorikeet": "make setup",
    "peers": "make peers",
    "unsloth": "python3 -m venv .venv-unsloth;"
    " .venv-unsloth/bin/python -m pip install --requirement benchmarks/unsloth.txt",
}


class BenchmarkError(Exception):
    """A measurement that cannot be made, or one that would not be comparable."""


class TimeUp(BenchmarkError):
    """A worker did not answer in time."""


@dataclass(frozen=True)
class Places:
    """Where workers run.

    Attributes:
        python: interpreter of Lorikeet's environment.
        peers_python: interpreter of the peers' environment.
        unsloth_python: interpreter of Unsloth's environment.
        folder: for job files and logs; must exist.
        device: cpu or cuda.
        threads: CPU threads of each worker; the libraries' own choice if None.
        timeout: seconds within which a worker must be ready, or have done a step.
    """

    python: Path
    peers_python: Path
    unsloth_python: Path
    folder: Path
    device: str = "cpu"
    threads: int | None = None
    timeout: float = 1800.0

    def interpreter(self, contestant: Contestant) -> Path:
        """The interpreter of a contestant.

        Raises:
            BenchmarkError: its environment has not been built.
        """
        name = contestant.environment
        found = {
            "lorikeet": self.python,
            "peers": self.peers_python,
            "unsloth": self.unsloth_python,
        }[name]
        if not found.exists():
            raise BenchmarkError(
                f"{contestant.name} needs the environment {name}, and there is no {found};"
                f" build it with: {_HOW_TO_BUILD[name]}"
            )
        return found

    def environment(self, contestant: Contestant) -> dict[str, str]:
        """The environment variables of a contestant's worker.

        On a CPU nobody sees a GPU: some contestants would take it, some not. On a GPU everybody
        sees one, the first: some would spread over several.
        """
        found = {**os.environ, **_VARIABLES}
        # Two that write their compiled code to one folder would get in each other's way.
        found["UNSLOTH_COMPILE_LOCATION"] = str(self.folder / f"{contestant.name}-compiled")
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        found["CUDA_VISIBLE_DEVICES"] = visible if self.device == "cuda" else ""
        if self.threads:
            found.update(OMP_NUM_THREADS=str(self.threads), MKL_NUM_THREADS=str(self.threads))
        return found


class Worker:
    """A running contestant. Leaving the `with` block ends its process.

    Attributes:
        contestant: who it is.
        facts: what it said of itself when it was ready: threads, versions, trainable parameters.
        timeout: seconds within which it must answer.
    """

    def __init__(self, contestant: Contestant, job: Job, places: Places) -> None:
        self.contestant = contestant
        self.facts: dict[str, Any] = {}
        self.timeout = places.timeout
        self._steps_left = job.steps
        self._buffer = b""
        interpreter = places.interpreter(contestant)
        file = places.folder / f"{contestant.name}.json"
        job.write(file)
        self._log = file.with_suffix(".log")
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [interpreter, "-m", f"benchmarks.workers.{contestant.worker}", file],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=ROOT,
                env=places.environment(contestant),
                bufsize=0,
            )

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def wait_ready(self) -> None:
        """Wait until everything is loaded.

        Raises:
            BenchmarkError: the worker ended instead.
            TimeUp: it took too long.
        """
        self.facts = json.loads(self._line())
        self._expect_ready()

    def step(self) -> Answer:
        """Let it do one optimizer step, and wait until it is idle again.

        Raises:
            BenchmarkError: the worker ended instead.
            TimeUp: it took too long.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(f"{GO}\n".encode())
        answer = Answer(**json.loads(self._line()))
        self._steps_left -= 1
        if self._steps_left:
            self._expect_ready()
        return answer

    def close(self) -> None:
        """End the process, if it has not ended by itself."""
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        if self._steps_left:
            self._process.kill()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _expect_ready(self) -> None:
        line = self._line()
        if line != READY:
            raise BenchmarkError(f"{self.contestant.name} said {line!r} instead of {READY!r}")

    def _line(self) -> str:
        """The next line. Read from the descriptor: `select` knows nothing of Python's buffers."""
        assert self._process.stdout is not None
        end = time.monotonic() + self.timeout
        while b"\n" not in self._buffer:
            left = max(0.0, end - time.monotonic())
            if not select.select([self._process.stdout], [], [], left)[0]:
                raise TimeUp(f"{self.contestant.name} did not answer in {self.timeout:.0f} s")
            read = os.read(self._process.stdout.fileno(), 65536)
            if not read:
                raise BenchmarkError(f"{self.contestant.name} ended:\n{self._last_words()}")
            self._buffer += read
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line.decode()

    def _last_words(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(f"    {line}" for line in lines[-25:])

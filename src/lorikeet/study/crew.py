"""Who does the trials of a study: this process, several of them, or (`on_ray.py`) many machines."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import platform
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Protocol as Interface
from typing import final

import torch

from lorikeet import console
from lorikeet.errors import InputError
from lorikeet.study.bench import BASE, Bench, about
from lorikeet.study.protocol import Planned, Protocol, StudyFolder
from lorikeet.study.record import Trial

Request = Planned | None
"""A trial to be done; None for the base as it is."""


class Crew(Interface):
    """Does trials and writes down what they find."""

    @property
    def loads(self) -> dict[str, int]:
        """How often a base model was loaded and data prepared, as far as this process knows."""

    def do(self, requests: Sequence[Request]) -> None:
        """Do all of these; trials that fail are written down with their error.

        Raises:
            InputError: none of them can be done: model or data cannot be loaded.
        """


Hire = Callable[[Protocol, StudyFolder], AbstractContextManager[Crew]]
"""Finds a crew for a study in its folder."""


def do_trials(crew: Crew, folder: StudyFolder, planned: Sequence[Planned]) -> list[Trial]:
    """The base and the trials, in this order; what is done already is not done again.

    Raises:
        InputError: model or data cannot be loaded.
    """
    if folder.done(BASE) is None:
        crew.do([None])
    missing = [one for one in planned if folder.done(one.name) is None]
    if missing and len(missing) < len(planned):
        console.note(f"{len(planned) - len(missing)} of {len(planned)} trials are done already")
    if missing:
        crew.do(missing)
    return [_found(folder, name) for name in [BASE, *(one.name for one in planned)]]


def _found(folder: StudyFolder, name: str) -> Trial:
    trial = folder.trial(name)
    if trial is None:
        raise RuntimeError(f"the trial {name} left nothing")
    return trial


@final
class Alone:
    """This process does everything. The model is loaded when the first trial needs it."""

    def __init__(self, protocol: Protocol, folder: StudyFolder) -> None:
        self.protocol = protocol
        self.folder = folder
        self._bench: Bench | None = None

    @property
    def loads(self) -> dict[str, int]:
        """How often the base was loaded and data prepared."""
        return self._bench.loads if self._bench else {"base": 0, "data": 0}

    def do(self, requests: Sequence[Request]) -> None:
        """Do them one after the other."""
        self._bench = self._bench or Bench(self.protocol, self.folder)
        for i, request in enumerate(requests, start=1):
            answer(self._bench, request, label=f"[{i}/{len(requests)}]")


def answer(bench: Bench, request: Request, *, label: str = "") -> Trial:
    """Do one trial, or measure the base."""
    if request is None:
        return bench.measure_base()
    trial = bench.do(request, label=f"{label} {request.name}".strip())
    if trial.error is not None:
        console.warn(f"{trial.name} failed: {trial.error}")
    return trial


@final
class Processes:
    """Several processes on this machine, each with a base of its own.

    What a process says while it works goes to `logs/worker-N.log`. One that dies (out of memory,
    say) costs the trial that it was at; another one takes its place.

    Args:
        protocol: what the trials share. Without `model.threads` each process takes its share of
            the machine's.
        folder: the study's folder.
        workers: how many.

    Raises:
        ValueError: nobody would do anything.
    """

    def __init__(self, protocol: Protocol, folder: StudyFolder, workers: int) -> None:
        if workers < 1:
            raise ValueError(f"at least one worker is needed, found {workers}")
        self.protocol = protocol
        self.folder = folder
        self.workers = workers
        self._idle: list[_Worker] = []
        self._busy: list[_Worker] = []
        self._started = 0

    @property
    def loads(self) -> dict[str, int]:
        """One of each for every process."""
        return {"base": self._started, "data": self._started}

    def do(self, requests: Sequence[Request]) -> None:
        """Hand them out in order."""
        waiting, busy = deque(requests), self._busy
        while waiting or busy:
            while waiting and len(busy) < self.workers:
                worker = self._idle.pop() if self._idle else self._start()
                worker.take(waiting.popleft())
                busy.append(worker)
            for worker in _ready(busy):
                busy.remove(worker)
                if self._collect(worker):
                    self._idle.append(worker)
                self._tell(worker, left=len(waiting) + len(busy), total=len(requests))

    def close(self) -> None:
        """Stop every process, also one that an error left at work."""
        for worker in self._busy:
            worker.process.kill()
        for worker in [*self._busy, *self._idle]:
            worker.stop()
        self._busy, self._idle = [], []

    def _start(self) -> _Worker:
        self._started += 1
        log = self.folder.logs / f"worker-{self._started}.log"
        threads = max(1, torch.get_num_threads() // self.workers)
        return _Worker(self.protocol, self.folder, log, threads)

    def _collect(self, worker: _Worker) -> bool:
        """Whether a worker that has something to say can take another trial.

        Raises:
            InputError: it could not even load the model and the data.
        """
        try:
            broken = worker.connection.recv()
        except EOFError:
            self._bury(worker)
            return False
        if broken is not None:
            raise InputError(*broken)
        return True

    def _bury(self, worker: _Worker) -> None:
        worker.process.join()
        code = worker.process.exitcode or 0
        reason = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        more = " (out of memory?)" if code == -signal.SIGKILL else ""
        error = f"its process ended with {reason}{more}; {worker.log} has its last words"
        if worker.request is None:
            raise InputError(f"the base model could not be measured: {error}")
        self.folder.keep(about(worker.request, error=error))

    def _tell(self, worker: _Worker, *, left: int, total: int) -> None:
        if worker.request is None:
            return
        trial = self.folder.trial(worker.request.name)
        if trial is None or trial.error is not None:
            console.warn(f"{worker.request.name} failed: {trial and trial.error}")
        elif trial.test is not None:
            found = f"perplexity {trial.test.perplexity:.3f}"
            console.note(f"[{total - left}/{total}] {trial.name}: {found}")


@final
class _Worker:
    """A process with a bench, at the other end of a pipe."""

    def __init__(self, protocol: Protocol, folder: StudyFolder, log: Path, threads: int) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would copy torch's threads, stopped
        self.connection, theirs = context.Pipe()
        self.log = log
        self.request: Request = None
        self.process: SpawnProcess = context.Process(
            target=_work, args=(protocol, folder, theirs, log, threads), daemon=True
        )
        self.process.start()
        theirs.close()

    def take(self, request: Request) -> None:
        """Give it a trial."""
        self.request = request
        self.connection.send(request)

    def stop(self) -> None:
        """End it; it is at nothing."""
        self.connection.close()
        self.process.join(timeout=10)
        self.process.kill()


def _ready(busy: Sequence[_Worker]) -> list[_Worker]:
    """Those that have answered, or died."""
    spoken = wait([worker.connection for worker in busy])
    return [worker for worker in busy if worker.connection in spoken]


def _work(
    protocol: Protocol, folder: StudyFolder, pipe: Connection, log: Path, threads: int
) -> None:
    """A worker's life: trial after trial until the pipe is closed.

    Sends None after each; arguments of an `InputError` if nothing can be done at all.
    """
    _die_with_parent()
    torch.set_num_threads(threads)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
    bench: Bench | None = None
    while True:
        try:
            request: Request = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            bench = bench or Bench(protocol, folder)
        except InputError as error:
            pipe.send((str(error), ()))
            return
        try:
            answer(bench, request)
        except KeyboardInterrupt:
            return
        pipe.send(None)


def _die_with_parent() -> None:
    """A study that is killed must not leave processes behind that go on writing (Linux)."""
    if platform.system() == "Linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG, linux/prctl.h
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


@contextmanager
def gather(protocol: Protocol, folder: StudyFolder, *, workers: int = 1) -> Iterator[Crew]:
    """A crew for the trials of a study.

    Args:
        protocol: what the trials share.
        folder: the study's folder.
        workers: processes; 1 is this one.
    """
    if workers == 1:
        yield Alone(protocol, folder)
        return
    crew = Processes(protocol, folder, workers)
    try:
        yield crew
    finally:
        crew.close()

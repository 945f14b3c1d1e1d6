"""The trials of a study on a Ray cluster: one machine or many.

Every worker loads a base of its own. Model, data and the study's folder must be reachable under the
same paths on every machine (a shared file system); what a trial measured comes back through Ray
in any case.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

import torch

from lorikeet import console
from lorikeet.errors import ConfigError, InputError
from lorikeet.study.bench import Bench, about
from lorikeet.study.crew import Crew, Request, answer
from lorikeet.study.protocol import Protocol, StudyFolder
from lorikeet.study.record import Trial

LOCAL = "local"
"""The address that stands for a cluster of this machine alone, which lives as long as the study."""


@contextmanager
def on_ray(
    protocol: Protocol, folder: StudyFolder, *, address: str = LOCAL, workers: int = 1
) -> Iterator[Crew]:
    """A crew of Ray actors.

    Args:
        protocol: what the trials share; its `model.threads` is the number of CPUs that a worker
            asks the cluster for. Without, it is this machine's, divided by the workers.
        folder: the study's folder.
        address: `local`, `auto` for the cluster that `ray start` began here, or its address.
        workers: how many trials at once.

    Raises:
        ConfigError: Ray is not installed, or no cluster answers.
    """
    ray = _ray()
    threads = protocol.config.model.threads or max(1, torch.get_num_threads() // workers)
    begun = not ray.is_initialized()
    if begun:
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # nothing here calls home
        own = {"num_cpus": workers * threads} if address == LOCAL else {"address": address}
        try:
            ray.init(include_dashboard=False, log_to_driver=False, logging_level="error", **own)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"no Ray cluster answers at {address!r}; begin one with `ray start --head` and give"
                f" --ray auto, or its address ({error})"
            ) from None
    crew = _Actors(ray, protocol, folder, workers, threads)
    try:
        yield crew
    finally:
        crew.close()
        if begun:
            ray.shutdown()


@final
class _Actors:
    """Hands trials to actors, each of which keeps a bench."""

    def __init__(
        self, ray: Any, protocol: Protocol, folder: StudyFolder, workers: int, threads: int
    ) -> None:
        self.ray = ray
        self.protocol = protocol
        self.folder = folder
        self.workers = workers
        self.threads = threads
        self._idle: list[Any] = []
        self._started = 0

    @property
    def loads(self) -> dict[str, int]:
        """One of each for every actor."""
        return {"base": self._started, "data": self._started}

    def do(self, requests: Sequence[Request]) -> None:
        """Hand them out in order.

        Raises:
            InputError: model or data cannot be loaded.
        """
        waiting = deque(requests)
        busy: dict[Any, tuple[Any, Request]] = {}
        while waiting or busy:
            while waiting and len(busy) < self.workers:
                actor = self._idle.pop() if self._idle else self._start()
                request = waiting.popleft()
                busy[actor.do.remote(request)] = actor, request
            (finished, *_), _ = self.ray.wait(list(busy), num_returns=1)
            actor, request = busy.pop(finished)
            if self._collect(finished, request):
                self._idle.append(actor)

    def close(self) -> None:
        """End every actor."""
        for actor in self._idle:
            self.ray.kill(actor)
        self._idle = []

    def _start(self) -> Any:
        self._started += 1
        actor = self.ray.remote(num_cpus=self.threads)(_Actor)
        where = StudyFolder(self.folder.path.resolve())
        return actor.remote(self.protocol, where, self.threads, str(Path.cwd()))

    def _collect(self, finished: Any, request: Request) -> bool:
        """Whether the actor can go on; what it found is written down."""
        exceptions = self.ray.exceptions
        try:
            found = self.ray.get(finished)
        except exceptions.RayTaskError as error:
            if isinstance(error.cause, InputError):
                raise error.cause from None
            raise
        except exceptions.RayActorError as error:
            if request is None:
                raise InputError(f"the base model could not be measured: {error}") from None
            found = about(request, error=f"its Ray worker died: {error}").to_json()
            self.folder.keep(Trial.from_json(found))
            console.warn(f"{request.name} failed: its Ray worker died")
            return False
        trial = Trial.from_json(found)
        self.folder.keep(trial)  # once more, where the actor's disk is not this one
        if trial.error is not None:
            console.warn(f"{trial.name} failed: {trial.error}")
        elif trial.test is not None and request is not None:
            console.note(f"{trial.name}: perplexity {trial.test.perplexity:.3f}")
        return True


class _Actor:
    """A worker, in a process that Ray begins."""

    def __init__(self, protocol: Protocol, folder: StudyFolder, threads: int, place: str) -> None:
        os.chdir(place)  # what is named by relative paths is found from here
        torch.set_num_threads(threads)
        self.protocol = protocol
        self.folder = folder
        self.bench: Bench | None = None

    def do(self, request: Request) -> dict[str, Any]:
        """Do a trial."""
        self.bench = self.bench or Bench(self.protocol, self.folder)
        return answer(self.bench, request).to_json()


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise ConfigError(
            "--ray needs Ray, which is not installed: pip install 'lorikeet[ray]'"
        ) from None
    return ray

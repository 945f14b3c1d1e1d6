"""Where a run stands, and the checkpoints that hold it."""

from __future__ import annotations

import math
import pickle
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from lorikeet.errors import TrainingError
from lorikeet.files import atomic_folder, remove_drafts
from lorikeet.train.optimizer import Optimizer


@dataclass
class TrainState:
    """All that changes during a run beside the weights and the optimizer.

    The position in the data follows from `step`: the order of examples is a pure function of the
    seed. The random generators (dropout) are read when a checkpoint is written.

    Attributes:
        step: optimizer steps done.
        best_nll: lowest validation loss so far, nats per token.
        best_step: the step that reached it.
        worse: evaluations since then.
        stopped: whether early stopping has ended the run.
    """

    step: int = 0
    best_nll: float = math.inf
    best_step: int = 0
    worse: int = 0
    stopped: bool = False


class Checkpoints:
    """The checkpoints of one run: `step-00000010/state.pt`, ..., each written atomically.

    Args:
        folder: where they lie.
        keep_last: how many to keep.
    """

    def __init__(self, folder: Path, *, keep_last: int = 2) -> None:
        self.folder = folder
        self.keep_last = keep_last

    def save(self, state: TrainState, optimizer: Optimizer) -> None:
        """Write a checkpoint of this moment and remove the oldest ones.

        Raises:
            StorageError: the disk refused; earlier checkpoints are untouched.
        """
        content = {
            "state": asdict(state),
            "optimizer": optimizer.state_dict(),
            "random": _random_states(),
        }
        with atomic_folder(self.folder / f"step-{state.step:08d}") as draft:
            _write(content, draft / "state.pt")
        self._prune()

    def restore(self, optimizer: Optimizer) -> TrainState | None:
        """Load the newest checkpoint into the optimizer and the generators; None without one.

        Raises:
            TrainingError: the checkpoint is damaged, or not of this run's parameters.
        """
        self._tidy()
        found = self._all()
        if not found:
            return None
        content = _read(found[-1] / "state.pt")
        saved = content["optimizer"]["masters"]
        if {n: m.shape for n, m in saved.items()} != {
            n: m.shape for n, m in optimizer.masters.items()
        }:
            raise TrainingError(
                f"the checkpoint {found[-1]} holds other trainable parameters than this run;"
                " resume with the model and options that started it"
            )
        optimizer.load_state_dict(content["optimizer"])
        _restore_random(content["random"])
        return TrainState(**content["state"])

    def save_best(self, optimizer: Optimizer) -> None:
        """Keep these weights aside as the best so far."""
        with atomic_folder(self.folder / "best") as draft:
            _write(optimizer.state_dict()["masters"], draft / "masters.pt")

    @torch.no_grad()
    def restore_best(self, optimizer: Optimizer) -> None:
        """Put the best weights back into the model."""
        optimizer.load_masters(_read(self.folder / "best" / "masters.pt"))

    def _prune(self) -> None:
        for old in self._all()[: -self.keep_last]:
            (old / "state.pt").unlink(missing_ok=True)
            old.rmdir()

    def _tidy(self) -> None:
        """Remove what a kill left: drafts, and checkpoints removed by half or not yet."""
        if self.folder.is_dir():
            remove_drafts(self.folder)
        for emptied in self.folder.glob("step-*"):
            if emptied.is_dir() and not any(emptied.iterdir()):
                emptied.rmdir()
        self._prune()

    def _all(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return sorted(file.parent for file in self.folder.glob("step-*/state.pt"))


SPARE_SECONDS = 2.0
"""Least time between two checkpoints that nobody asked for."""

SPARE_SHARE = 0.02
"""Most of a run's time that goes into them."""


class Sparing:
    """Called after every step, saves when that is cheap beside what went on since the last time.

    Args:
        save: writes a checkpoint.
        total_steps: of the run; the last one is always saved.
    """

    def __init__(self, save: Callable[[TrainState], None], total_steps: int) -> None:
        self._save = save
        self._total = total_steps
        self._next = perf_counter() + SPARE_SECONDS

    def __call__(self, state: TrainState) -> None:
        """Save, or leave it for now."""
        started = perf_counter()
        last = state.step == self._total or state.stopped
        if last or started >= self._next:
            self._save(state)
            ended = perf_counter()
            self._next = ended + max(SPARE_SECONDS, (ended - started) / SPARE_SHARE)


def _write(content: dict[str, Any], path: Path) -> None:
    """`torch.save` through a plain file, so that a full disk is an OSError like any other."""
    with path.open("wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # torch wraps the failed write of its own archive writer
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise


def _read(path: Path) -> dict[str, Any]:
    """The tensors arrive on the CPU, whatever device wrote them."""
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise TrainingError(
            f"{path} is damaged; remove the folder {path.parent} to go on from what is before it"
        ) from error
    return content


def _random_states() -> dict[str, Any]:
    version, internal, gauss = random.getstate()
    states: dict[str, Any] = {
        "python": [version, list(internal), gauss],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def _restore_random(states: dict[str, Any]) -> None:
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])

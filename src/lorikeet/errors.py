"""The exception tree. A message says what was found, what was expected and what to do.

LorikeetError                 exit code 1 if nothing more precise fits
├── InputError (ValueError)   exit code 2: something the user gave or asked for
│   ├── ConfigError           an option, a flag, a run.yaml
│   ├── DataError             a data file, its columns, its rows
│   ├── ModelError            a model folder, its weights, its tokenizer
│   ├── AdapterError          an adapter folder, its tensors, its targets
│   ├── TrainingError         a run that cannot go on: nothing to learn, a non-finite loss
│   └── StorageError (OSError) the disk refused a write
└── CheckFailed               exit code 3: a check that the user asked for did not hold
"""

from __future__ import annotations

from collections.abc import Sequence


class LorikeetError(Exception):
    """Base of every error that Lorikeet raises on purpose."""

    exit_code = 1


class InputError(LorikeetError, ValueError):
    """Something in the user's input is wrong; every problem of one input is reported at once.

    Args:
        message: one sentence: what is wrong, or the heading over `problems`.
        problems: the single findings, each a line of its own.
    """

    exit_code = 2

    def __init__(self, message: str, problems: Sequence[str] = ()) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join([message, *(f"  - {problem}" for problem in self.problems)]))


class ConfigError(InputError):
    """An option, a flag or a key of a run file."""


class DataError(InputError):
    """A data file, its columns or its rows."""


class ModelError(InputError):
    """A model folder, its weights or its tokenizer."""


class AdapterError(InputError):
    """An adapter folder, its tensors or the layers that it targets."""


class TrainingError(InputError):
    """A run that must not start or must not go on."""


class StorageError(InputError, OSError):
    """The disk refused a write; what was there before is untouched."""


class CheckFailed(LorikeetError):
    """A check that the user asked for did not hold."""

    exit_code = 3

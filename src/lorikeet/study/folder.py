"""The run folder: what lies where, who may write into it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lorikeet.config import RunConfig, load_config
from lorikeet.errors import ConfigError
from lorikeet.files import remove_drafts, write_json, write_text

_FREE_ON_RESUME = {
    "out",
    "model.threads",
    "train.keep_last",
    "train.save_every",
    "train.max_tokens",
    "train.tensorboard",
}
"""Options that change nothing about what is trained, so a resume may give others."""


class RunFolder:
    """Paths of a run folder.

    Args:
        path: the folder; it need not exist yet.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.inputs = self.path / "inputs.json"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.adapter = self.path / "adapter"
        self.model = self.path / "model"
        self.tensorboard = self.path / "tensorboard"
        self.samples = self.path / "samples.jsonl"
        self.report = self.path / "report.md"
        self.receipt = self.path / "receipt.json"

    @property
    def finished(self) -> bool:
        """Whether the run has come to its end; the receipt is written last."""
        return self.receipt.is_file()

    def check(self, config: RunConfig, *, resume: bool) -> None:
        """Refuse before anything is loaded if this run must not write here.

        Raises:
            ConfigError: the folder holds another run or other files, or a resume with other
                options than those that the run was started with.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"--out {self.path} is a file; give a folder")
        if self.config.is_file():
            if not resume:
                raise ConfigError(
                    f"{self.path} already holds a run; add --resume to go on with it,"
                    " or choose another --out"
                )
            _same_experiment(load_config(self.config), config, self.path)
        elif self.path.is_dir() and any(not p.name.startswith(".") for p in self.path.iterdir()):
            raise ConfigError(
                f"{self.path} is not empty and holds no run of Lorikeet; choose another --out"
            )

    def check_inputs(self, inputs: dict[str, str | None]) -> None:
        """Refuse a resume on other data or weights than the run was started with.

        Args:
            inputs: what the options cannot tell: hashes of the data and of the base's weights.

        Raises:
            ConfigError: they differ from those of the folder.
        """
        if self.inputs.is_file():
            _same_inputs(_read_inputs(self.inputs), inputs, self.path)

    def claim(self, config: RunConfig, inputs: dict[str, str | None]) -> None:
        """Make the folder and write the configuration; drop what a killed run left half-written.

        Args:
            config: the options of the run.
            inputs: as in `check_inputs`.

        Raises:
            StorageError: the disk refused.
        """
        if self.path.is_dir():
            remove_drafts(self.path)
        write_text(self.config, config.to_yaml())  # first: it is what marks the folder as a run
        write_json(self.inputs, inputs)


def _same_experiment(before: RunConfig, now: RunConfig, folder: Path) -> None:
    old, new = _flat(before), _flat(now)
    differing = [
        f"{name}: started with {old[name]!r}, now {new[name]!r}"
        for name in old
        if old[name] != new[name] and name not in _FREE_ON_RESUME
    ]
    if differing:
        raise ConfigError(
            f"the run in {folder} was started with other options; leave them out to resume it:",
            differing,
        )


def _read_inputs(path: Path) -> dict[str, str | None]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise ConfigError(
            f"{path} is damaged, so that nothing tells whether data and model are still those of"
            " the run; start anew in another --out"
        )
    return found


def _same_inputs(before: dict[str, str | None], now: dict[str, str | None], folder: Path) -> None:
    changed = [name for name in now if before.get(name) != now[name]]
    if changed:
        raise ConfigError(
            f"the run in {folder} was started on something else under the same names; put it back"
            " to resume, or start anew in another --out. Changed:",
            changed,
        )


def _flat(config: RunConfig) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for section, values in config.model_dump().items():
        if isinstance(values, dict):
            flat |= {f"{section}.{key}": value for key, value in values.items()}
        else:
            flat[section] = values
    return flat

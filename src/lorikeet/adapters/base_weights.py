"""Single weights of a base model, read from its files when they are asked for."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from lorikeet.adapters.checkpoint import Checkpoint
from lorikeet.errors import AdapterError


class BaseWeights:
    """The weights in a model folder, by the name of their module.

    Raises:
        ModelError: the folder holds no weights, or damaged ones.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._checkpoint = Checkpoint.open(folder)

    def __call__(self, module: str) -> Tensor:
        """The weight of a module, as it is stored; a tied head's is the embedding's.

        Raises:
            AdapterError: there is no such weight, or it is quantised.
            ModelError: its file cannot be read.
        """
        name, problem = self._checkpoint.source(f"{module}.weight", may_tie=True)
        if name is None:
            raise AdapterError(f"{self._folder}: {problem}: {module}.weight")
        weight = self._checkpoint.whole(name)
        if not weight.is_floating_point() or weight.itemsize < 2:
            raise AdapterError(
                f"{name} in {self._folder} is {str(weight.dtype).removeprefix('torch.')};"
                " needed are weights that are not quantised"
            )
        return weight

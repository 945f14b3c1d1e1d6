"""Single weights of a base model, read from its files when they are asked for."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lorikeet.errors import AdapterError

_FILE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


class BaseWeights:
    """The weights in a model folder, by the name of their module.

    Raises:
        AdapterError: the folder holds no readable safetensors files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not folder.is_dir():
            raise AdapterError(f"there is no model folder {folder}")
        self._files = self._indexed() if (folder / _INDEX).is_file() else self._single()

    def __call__(self, module: str) -> Tensor:
        """The weight of a module, as it is stored.

        Checkpoints may leave out the beginning of a name (`transformer.`, `model.`) or have more
        of it: a tensor whose name ends alike is taken if it is the only one.

        Raises:
            AdapterError: there is no such weight, or it is quantised.
        """
        name = self._find(f"{module}.weight")
        weight = self._read(name)
        if not weight.is_floating_point() or weight.itemsize < 2:
            raise AdapterError(
                f"{name} in {self.folder} is {str(weight.dtype).removeprefix('torch.')}; needed are"
                " weights that are not quantised"
            )
        return weight

    def _find(self, wanted: str) -> str:
        if wanted in self._files:
            return wanted
        near = [
            name
            for name in self._files
            if wanted.endswith(f".{name}") or name.endswith(f".{wanted}")
        ]
        if len(near) == 1:
            return near[0]
        found = f"several that end alike: {', '.join(sorted(near))}" if near else "none like it"
        raise AdapterError(f"the model in {self.folder} has no tensor {wanted}, and {found}")

    def _read(self, name: str) -> Tensor:
        path = self.folder / self._files[name]
        try:
            with safe_open(path, "pt") as file:
                tensor: Tensor = file.get_tensor(name)
                return tensor
        except (SafetensorError, OSError) as error:
            raise AdapterError(f"cannot read {name} from {path}: {error}") from None

    def _single(self) -> dict[str, str]:
        path = self.folder / _FILE
        if not path.is_file():
            raise AdapterError(
                f"the model folder {self.folder} has neither {_FILE} nor {_INDEX}; weights of other"
                " formats are not read here"
            )
        try:
            with safe_open(path, "pt") as file:
                return dict.fromkeys(file.keys(), _FILE)
        except (SafetensorError, OSError) as error:
            raise AdapterError(f"{path} is damaged or not a safetensors file: {error}") from None

    def _indexed(self) -> dict[str, str]:
        path = self.folder / _INDEX
        try:
            files = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
            found = {str(name): str(file) for name, file in files.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise AdapterError(f"cannot read the index {path}: {error!r}") from None
        outside = sorted({file for file in found.values() if Path(file).name != file})
        if outside:
            raise AdapterError(f"{path} names files outside its folder: {', '.join(outside)}")
        return found

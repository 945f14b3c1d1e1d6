"""The files of an adapter folder, which may come from anywhere."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from lorikeet.errors import AdapterError

TENSORS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"


def inside(folder: Path, name: str) -> Path:
    """The path of a file in an adapter folder.

    Raises:
        AdapterError: the folder or the file is missing, or the file is a link to somewhere else.
    """
    path = folder / name
    if not folder.is_dir():
        raise AdapterError(f"there is no adapter folder {folder}")
    if not path.is_file():
        nested = folder / "adapter" / name
        hint = f"; did you mean {nested.parent}?" if nested.is_file() else ""
        raise AdapterError(f"the adapter folder {folder} has no file {name}{hint}")
    home = folder.resolve()
    allowed = [home]
    if home.parent.name == "snapshots":  # the hub's cache links to its own store
        allowed.append(home.parent.parent / "blobs")
    if not any(path.resolve().is_relative_to(place) for place in allowed):
        raise AdapterError(f"{path} is a link out of the adapter folder; copy the file there")
    return path


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Read an adapter's tensors, on the CPU: safetensors, or a pickle of tensors and nothing else.

    Raises:
        AdapterError: no file, or a broken one.
    """
    pickled = not (folder / TENSORS_FILE).exists() and (folder / PICKLE_FILE).exists()
    path = inside(folder, PICKLE_FILE if pickled else TENSORS_FILE)
    return _without_doubles(_unpickle(path) if pickled else _load(path))


def _without_doubles(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors, each under one name.

    With trained biases, or with a vocabulary that has grown, PEFT writes those of a module to save
    three times: under its name, under its wrapper's, and as they were before, which nothing reads.
    """
    kept = {}
    for key, tensor in tensors.items():
        name = key.replace(".modules_to_save.", ".").replace(".original_module.", ".")
        double = name != key and name in tensors and key.endswith((".bias", ".weight"))
        if not double or (".modules_to_save." in key and not torch.equal(tensor, tensors[name])):
            kept[key] = tensor
    return kept


def _load(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path, device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(f"{path} is damaged or not a safetensors file: {error}") from None


def _unpickle(path: Path) -> dict[str, torch.Tensor]:
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise AdapterError(f"{path} is damaged or holds more than tensors: {error}") from None
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor)
        for name, tensor in tensors.items()
    ):
        raise AdapterError(f"{path} must hold a mapping from names to tensors")
    return tensors

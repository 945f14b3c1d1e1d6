"""The folder of a base model, for verbs that read its files without running it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorikeet import console
from lorikeet.errors import AdapterError, ModelError

if TYPE_CHECKING:
    from lorikeet.adapters import Adapter
    from lorikeet.config import RunConfig

_SMALL_FILES = [
    *("*.json", "*.jinja", "*.txt", "*.model", "*.py", "*.tiktoken", "*.spm", "*.vocab"),
    *("LICEN[SC]E*", "NOTICE*"),
]


def base_folder(config: RunConfig) -> Path:
    """The base's folder; of a hub id the one in the hub's cache, downloaded where needed.

    Raises:
        ModelError: there is no such folder, or the hub does not give it.
    """
    from huggingface_hub import snapshot_download

    path, revision = config.model.path, config.model.revision
    if Path(path).is_dir():
        return Path(path)
    if (
        Path(path).exists()
        or path.count("/") != 1
        or path.startswith((".", "/", "~"))
        or path.endswith("/")
    ):
        raise ModelError(
            f"there is no model folder {path}; expected a folder with config.json and weights,"
            " or a hub id such as HuggingFaceTB/SmolLM2-135M-Instruct"
        )
    for weights in ("model*.safetensors", "pytorch_model*.bin"):
        try:
            patterns = [*_SMALL_FILES, weights]
            folder = Path(snapshot_download(path, revision=revision, allow_patterns=patterns))
        except (OSError, ValueError) as error:
            raise ModelError(
                f"cannot get {path}: there is no folder of that name, and the hub says: {error}"
            ) from error
        if any(folder.glob(weights)):
            break
    return folder


def check_base(base: Path, adapter: Adapter, config: RunConfig, *, allow: bool) -> None:
    """Compare the base's weights with those that the adapter was trained on, if it says which.

    Raises:
        AdapterError: they are others, and that was not allowed; or the adapter changes nothing,
            which where a model is loaded its logits tell.
    """
    if _changes_nothing(adapter):
        raise AdapterError(
            "the adapter changes nothing: every update of it is zero (was it trained at all? is its"
            " scale zero?)"
        )
    from lorikeet.adapters import mismatches

    if not adapter.provenance.get("base_fingerprint"):
        return
    found = _fingerprint(base, trust_remote_code=config.model.trust_remote_code)
    if found is None:
        console.warn(
            "cannot tell whether the adapter was trained on this base: its file and the"
            " model have other names for the weights"
        )
        return
    differences = mismatches(adapter.provenance, base_fingerprint=found)
    if differences and not allow:
        raise AdapterError(
            f"the adapter does not belong to {base} (--allow-mismatch makes this a warning):",
            differences,
        )
    for difference in differences:
        console.warn(f"the adapter: {difference}")


def _changes_nothing(adapter: Adapter) -> bool:
    if adapter.whole or adapter.tokens or adapter.vocabulary:
        return False
    return all(
        own.magnitude is None and not (own.scale and own.A.any() and own.B.any())
        for own in adapter.updates.values()
    )


def _fingerprint(base: Path, *, trust_remote_code: bool) -> str | None:
    """The fingerprint of a folder's weights, one tensor at a time; None if names do not fit."""
    from torch import nn

    from lorikeet.adapters.checkpoint import Checkpoint
    from lorikeet.model import empty_model, fingerprint

    checkpoint = Checkpoint.open(base)
    model = empty_model(base, trust_remote_code=trust_remote_code)
    sources = {name: checkpoint.find(name) for name, _ in model.named_parameters()}
    if any(len(found) != 1 or not checkpoint.entry(found[0]).shape for found in sources.values()):
        return None

    class Streamed(nn.Module):
        """Has the model's parameters, each read when it is its turn."""

        def named_parameters(self, *_: Any, **__: Any) -> Iterator[tuple[str, nn.Parameter]]:
            for name, (source,) in sources.items():
                yield name, nn.Parameter(checkpoint.whole(source), requires_grad=False)

    return fingerprint(Streamed())

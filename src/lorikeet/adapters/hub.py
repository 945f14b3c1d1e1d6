"""Adapter folders to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from lorikeet import console
from lorikeet.adapters.card import CARD_FILE, is_hub_id
from lorikeet.adapters.exchange import read_adapter
from lorikeet.adapters.files import PICKLE_FILE, TENSORS_FILE, inside
from lorikeet.adapters.schema import CONFIG_FILE
from lorikeet.adapters.vocabulary import TOKENIZER_FILES
from lorikeet.errors import AdapterError, ConfigError, LorikeetError


def push_to_hub(
    folder: Path, repo_id: str, *, private: bool = False, token: str | None = None
) -> str:
    """Upload an adapter in one commit, making its repository where there is none.

    Only files of an adapter are sent: configuration, tensors, card, license, tokenizer.

    Args:
        folder: the adapter folder; it is read and checked before anything is sent.
        repo_id: `owner/name`, or `name` for the repository of whoever is logged in.
        private: make a new repository private, whatever the account's default is; one that is
            there stays what it is.
        token: a hub token with write access; that of `hf auth login` or HF_TOKEN if not given.

    Returns:
        The repository's address.

    Raises:
        AdapterError: the adapter is broken, or the hub cannot be reached or refuses.
        ConfigError: `repo_id` cannot be a name on the hub.
    """
    # Slow to import, and needed here alone.
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, HTTPError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ConfigError(f"{repo_id!r} cannot be a repository's name: {error}") from None
    adapter = read_adapter(folder)
    names = own_files(folder)
    _advise(folder, names, adapter.base_model)
    api = HfApi(token=token)
    try:
        made = api.create_repo(repo_id, private=private or None, exist_ok=True)
        api.upload_folder(
            repo_id=made.repo_id,
            folder_path=folder,
            allow_patterns=names,
            commit_message="Upload adapter",
        )
    except (HTTPError, OSError, ValueError) as error:  # ValueError: front matter that is refused
        raise _refusal(error, repo_id, api.endpoint) from error
    return str(made)


def own_files(folder: Path) -> list[str]:
    """The names of the files in an adapter folder that belong to the adapter.

    Raises:
        AdapterError: the configuration is missing, or a file is a link out of the folder.
    """
    tensors = TENSORS_FILE if (folder / TENSORS_FILE).exists() else PICKLE_FILE
    beside = [
        name for name in (CARD_FILE, "LICENSE", *TOKENIZER_FILES) if (folder / name).is_file()
    ]
    names = [CONFIG_FILE, tensors, *beside]
    for name in names:
        inside(folder, name)
    return names


def _advise(folder: Path, names: list[str], base_model: str) -> None:
    if CARD_FILE not in names:
        console.warn(f"{folder} has no {CARD_FILE}: the hub will show nothing about the adapter")
    if not is_hub_id(base_model):
        console.warn(
            f"the adapter's base model is {base_model or 'not named'}, which is no hub id:"
            f" others cannot find it; set base_model_name_or_path in {folder / CONFIG_FILE}"
        )


def _refusal(error: Exception, repo_id: str, endpoint: str) -> LorikeetError:
    """What went wrong, and what to do."""
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
    )

    what = f"the adapter is not uploaded to {repo_id}: "
    if isinstance(error, OfflineModeIsEnabled):
        return AdapterError(f"{what}HF_HUB_OFFLINE is set; unset it to upload")
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status == 401 or isinstance(error, LocalTokenNotFoundError):
        return AdapterError(
            f"{what}{endpoint} knows no login; run `hf auth login` (once `huggingface-cli login`),"
            " or set HF_TOKEN to a token with write access"
        )
    if status == 403:
        return AdapterError(
            f"{what}this login may not write there; take a token with write access (HF_TOKEN), or a"
            " name under your own account"
        )
    if isinstance(error, HfHubHTTPError):
        return AdapterError(f"{what}{endpoint} answers {status}: {error.server_message or error}")
    if isinstance(error, ValueError):
        return AdapterError(f"{what}{error}")
    return AdapterError(f"{what}cannot reach {endpoint} ({error}); check the connection")

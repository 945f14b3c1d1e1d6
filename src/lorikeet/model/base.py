"""Load a base model and its tokenizer from a folder or the hub."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lorikeet import console, hub
from lorikeet.errors import ModelError
from lorikeet.model.agreement import choose_nll
from lorikeet.model.fingerprint import fingerprint, tokenizer_fingerprint
from lorikeet.model.loss import TokenNll
from lorikeet.model.machine import DTYPES, Machine, choose
from lorikeet.model.packing import enable_packing

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


@dataclass
class Base:
    """A loaded base model and what belongs to it.

    Attributes:
        model: the causal language model, in eval mode, on `machine.device`.
        tokenizer: its tokenizer.
        path: the folder or hub id it came from.
        machine: device and dtype it runs with.
        fingerprint: identifies the weights as they were loaded, whatever their dtype.
        tokenizer_hash: identifies the tokenizer as it was loaded.
        packing: whether several documents may share a row (probed at load).
        nll: the model's loss function: the fast path where it agrees with the model (probed at
            load), else `token_nll`.
        path_taken: which of the two `nll` is, and why.
    """

    model: nn.Module
    tokenizer: Any
    path: str
    machine: Machine
    fingerprint: str
    tokenizer_hash: str
    packing: bool
    nll: TokenNll
    path_taken: str

    @property
    def identity(self) -> dict[str, str]:
        """What an adapter remembers of the model that it belongs to: hashes by name.

        They are those of the model as it was loaded: a vocabulary that grows does not change them.
        """
        return {"base_fingerprint": self.fingerprint, "tokenizer_hash": self.tokenizer_hash}


def load_model(
    path: str | Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    threads: int | None = None,
    fast: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Base:
    """Load a base model with its weights.

    Nothing is fetched over the network unless `path` is a hub id with no folder of that name.

    Args:
        path: a Hugging Face model folder, or a hub id (`HuggingFaceTB/SmolLM2-135M-Instruct`).
        dtype: auto, bf16, fp32 or fp16.
        device: auto, cpu, cuda or cuda:N.
        threads: CPU threads; torch's own choice if None.
        fast: auto, or off for the model's own forward pass.
        revision: branch, tag or commit of a hub repository.
        trust_remote_code: run Python code that the repository ships.

    Raises:
        ModelError: no such folder, no weights, weights that do not fit or are not finite, no
            tokenizer.
        ConfigError: the device or dtype is not to be had here.
    """
    source = str(path)
    machine = choose(device=device, dtype=dtype, threads=threads)
    local = _is_local(source)
    if local:
        _check_weights(Path(source))
    options = {
        "revision": revision,
        "trust_remote_code": trust_remote_code,
        "local_files_only": local or _without_hub(),
    }
    config = _load_config(source, options)
    tokenizer = _load_tokenizer(source, options)
    with _loading(f"cannot load {source}"):
        model, report = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            dtype=machine.dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, all of them
            adapter_kwargs={
                "local_files_only": options["local_files_only"]
            },  # else the hub is asked
            **options,
        )
    _check_loading(source, report)
    _check_finite(source, model, machine)
    return _ready(model, tokenizer, source, machine, fast)


def load_tokenizer(
    path: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> Any:
    """Load a model's tokenizer without its weights.

    The folder may hold no more than a tokenizer, as an adapter's with new tokens does.

    Raises:
        ModelError: there is no such folder, or it holds no tokenizer.
    """
    source = str(path)
    alone = (Path(source) / "tokenizer.json").is_file()
    return _load_tokenizer(
        source,
        {
            "revision": revision,
            "trust_remote_code": trust_remote_code,
            "local_files_only": alone or _is_local(source) or _without_hub(),
        },
    )


def init_model(
    folder: str | Path,
    *,
    seed: int,
    dtype: str = "fp32",
    device: str = "auto",
    fast: str = "auto",
) -> Base:
    """Make a model with seeded random weights from a folder's `config.json` and tokenizer."""
    source = str(folder)
    machine = choose(device=device, dtype=dtype)
    options = {"local_files_only": _is_local(source) or _without_hub()}
    config = _load_config(source, options)
    tokenizer = _load_tokenizer(source, options)
    with torch.random.fork_rng(), _loading(f"cannot make a model of {source}"):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=machine.dtype)
    return _ready(model, tokenizer, source, machine, fast)


def model_of(
    folder: str | Path,
    weights: Iterable[tuple[str, Tensor]],
    *,
    changes: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """A model of a folder's architecture that has other weights, in float32 on the CPU.

    Args:
        folder: where its `config.json` is; the tokenizer and the weights there are not read.
        weights: every tensor, by the name that it has in a checkpoint.
        changes: values of the configuration that differ from the folder's.
        trust_remote_code: whether code that comes with the model may run.

    Raises:
        ModelError: tensors are missing or of the wrong shape.
    """
    source = str(folder)
    options = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    config = _load_config(source, {**options, **(changes or {})})
    with _loading(f"cannot make a model of {source}"):
        with torch.device("meta"):
            kind: Any = type(
                AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
            )
        model, report = kind.from_pretrained(
            None,
            config=config,
            state_dict=dict(weights),
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, all of them
        )
    _check_loading(source, report)
    return model.eval()


def empty_model(
    path: str | Path,
    *,
    dtype: str = "bf16",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """Make the model's structure on the meta device: every shape, no memory, no weights."""
    source = str(path)
    config = _load_config(
        source,
        {
            "revision": revision,
            "trust_remote_code": trust_remote_code,
            "local_files_only": _is_local(source) or _without_hub(),
        },
    )
    with torch.device("meta"), _loading(f"cannot make a model of {source}"):
        return AutoModelForCausalLM.from_config(
            config, dtype=DTYPES[dtype], trust_remote_code=trust_remote_code
        )


def _ready(model: Any, tokenizer: Any, source: str, machine: Machine, fast: str) -> Base:
    model.to(machine.device).eval()
    packing = enable_packing(model, device=machine.device)
    nll, path_taken = choose_nll(model, asked=fast, packing=packing)
    return Base(
        model=model,
        tokenizer=tokenizer,
        path=source,
        machine=machine,
        fingerprint=fingerprint(model),
        tokenizer_hash=tokenizer_fingerprint(tokenizer),
        packing=packing,
        nll=nll,
        path_taken=path_taken,
    )


def _is_local(source: str) -> bool:
    """Whether `source` is a folder; a name that is neither a folder nor a hub id is an error."""
    if Path(source).is_dir():
        if not (Path(source) / "config.json").is_file():
            inner = Path(source) / "model"
            hint = f"; is {inner} meant?" if (inner / "config.json").is_file() else ""
            raise ModelError(
                f"{source} is not a model folder: it has no config.json"
                f" (it holds {_listing(Path(source))}){hint}"
            )
        return True
    if Path(source).exists():
        raise ModelError(
            f"{source} is a file; expected a model folder or a hub id such as org/name"
        )
    if not _HUB_ID.fullmatch(source):
        raise ModelError(
            f"there is no model folder {source}; expected a folder with config.json and weights,"
            " or a hub id such as HuggingFaceTB/SmolLM2-135M-Instruct"
        )
    return False


def _without_hub() -> bool:
    """Whether the hub cannot be reached, so that nothing but its cache can help; says so."""
    reason = hub.unreachable()
    if reason:
        console.warn(f"{reason}: only models in its cache can be used")
    return reason is not None


def _listing(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "nothing"


def _check_weights(folder: Path) -> None:
    """Every weight file must be there before anything is read."""
    for name in _WEIGHTS:  # the first that is there is read
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return
        if index.is_file():
            missing = sorted(shard for shard in _shards(index) if not (folder / shard).is_file())
            if missing:
                raise ModelError(f"{folder} lacks weight files that {index.name} names:", missing)
            return
    raise ModelError(
        f"{folder} has no weights: expected model.safetensors (or its index and shards),"
        f" found {_listing(folder)}"
    )


def _shards(index: Path) -> set[str]:
    try:
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ModelError(f"{index} is damaged: expected an object with a weight_map") from None


def _load_config(source: str, options: dict[str, Any]) -> Any:
    with _loading(f"cannot load {source}"):
        return AutoConfig.from_pretrained(source, **options)


def _load_tokenizer(source: str, options: dict[str, Any]) -> Any:
    folder = Path(source)
    if folder.is_dir() and not any((folder / name).is_file() for name in _TOKENIZERS):
        raise ModelError(
            f"{source} has no tokenizer: expected {' or '.join(_TOKENIZERS[:2])}, found"
            f" {_listing(folder)}"
        )
    with _loading(f"no tokenizer could be loaded from {source}"):
        return AutoTokenizer.from_pretrained(source, **options)


@contextmanager
def _loading(failure: str) -> Iterator[None]:
    """Within the block whatever transformers raises is a `ModelError` that begins with `failure`.

    What a broken file raises there is anyone's guess.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{failure}: its weights are a pickle that is damaged or holds more than tensors, which"
            " is not read because it could run any program; ask for safetensors"
        ) from error
    except Exception as error:
        reason = str(error).strip() if isinstance(error, OSError | ValueError) else repr(error)
        raise ModelError(f"{failure}: {reason}") from error


def _check_loading(source: str, report: dict[str, Any]) -> None:
    """Missing weights would be random numbers: refuse them. Say which ones are left over."""
    unused = sorted(report["unexpected_keys"])
    if unused:
        names = ", ".join(unused[:5]) + (", ..." if len(unused) > 5 else "")
        console.warn(f"{len(unused)} tensors in {source} are no part of the model: {names}")
    problems = [f"missing: {name}" for name in sorted(report["missing_keys"])]
    problems += [
        f"wrong shape: {name} is {list(found)}, expected {list(expected)}"
        for name, found, expected in sorted(report["mismatched_keys"])
    ]
    if problems:
        raise ModelError(f"the weights in {source} do not fit its config.json:", problems)


def _check_finite(source: str, model: nn.Module, machine: Machine) -> None:
    """Weights that are no numbers would make every loss one of them: refuse them.

    A sum reads a tensor at the speed of memory, and only one that is not finite is looked through:
    in fp16 that of finite weights may be infinite.
    """
    broken = [
        name
        for name, weight in model.named_parameters()
        if not weight.detach().sum().isfinite() and not weight.isfinite().all()
    ]
    if broken:
        raise ModelError(
            f"weights in {source} are not finite: damaged, so get the file anew, or too large for"
            f" --model.dtype {machine.dtype_name}:",
            [*broken[:10], *(["..."] if len(broken) > 10 else [])],
        )

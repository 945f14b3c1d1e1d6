"""Folders of models with random weights, exports of folders, and what their weights compute."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from random_models import random_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    GemmaConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from lorikeet.adapters import Adapter, Update
from lorikeet.export.convert import Conversion, export_gguf
from lorikeet.export.layout import restored
from lorikeet.gguf.read import GGUFFile, open_gguf
from lorikeet.model import model_of

SIZES: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
FAMILIES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=False),
    "llama tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "gemma": GemmaConfig(**SIZES, head_dim=32),
}
"""Of the embedded model's vocabulary."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def random_folder(
    folder: Path, config: PretrainedConfig, tokenizer: Path, *, decisive: bool = True
) -> Path:
    """A model with random weights in float32, with another folder's tokenizer."""
    model = random_model(config)
    if config.tie_word_embeddings and decisive:
        make_decisive(model)
    model.save_pretrained(str(folder))
    for name in TOKENIZER_FILES:
        if (tokenizer / name).exists():
            shutil.copy(tokenizer / name, folder / name)
    return folder


def make_decisive(model: PreTrainedModel) -> None:
    """Let the layers decide, not the token that went in, whose logit a tied head raises."""
    with torch.no_grad():
        model.get_input_embeddings().weight.normal_(std=0.2 * model.config.hidden_size**-0.5)
        model.model.norm.weight.fill_(20.0)  # so that logits have a standard deviation of about 4


def exported(folder: Path, kind: str, out: Path, **plan: Any) -> Conversion:
    """Plan and write."""
    conversion = Conversion.plan(folder, kind, **plan)
    export_gguf(conversion, out)
    return conversion


def weights_in(conversion: Conversion, file: GGUFFile) -> Iterator[tuple[str, Tensor]]:
    """A file's weights by the checkpoint's names, its rows where the checkpoint has them."""
    for placed in conversion.layout.placed:
        yield placed.source, restored(placed, file.rows(placed.name, 0, placed.shape[0]))


def reread(conversion: Conversion, out: Path) -> Any:
    """A transformers model of what our own reader finds in a file."""
    fold = conversion.fold
    return model_of(fold.base, weights_in(conversion, open_gguf(out)), changes=fold.changes)


def texts_of(file: Path) -> Mapping[str, Any]:
    """A file's metadata as plain values."""
    return {name: field.value for name, field in open_gguf(file).metadata.items()}


def divergence(p: Tensor, q: Tensor) -> float:
    """KL(p || q) of logits [T, V] in nats, mean over T."""
    log_p, log_q = (z.double().log_softmax(-1) for z in (p, q))
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def spread(found: Tensor, expected: Tensor) -> float:
    """The difference of logits beside their own spread, both as root mean squares."""
    return float((found - expected).square().mean().sqrt() / expected.std())


def random_ids(count: int, *, below: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, below, (count,), generator=generator).tolist()


def edit(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    path = folder / "model.safetensors"
    state = change({name: t.clone() for name, t in load_file(path).items()})
    path.unlink()
    save_file(state, path, metadata={"format": "pt"})


def copied(folder: Path, to: Path) -> Path:
    to.mkdir()
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: t.float() for name, t in load_file(folder / "model.safetensors").items()}


def random_adapter(*, scale: float = 2.0) -> Adapter:
    """Of q_proj, whose rows move, and down_proj."""
    torch.manual_seed(4)
    sizes = {"self_attn.q_proj": (64, 64), "mlp.down_proj": (64, 96)}
    return Adapter(
        {
            f"model.layers.{layer}.{leaf}": Update(
                torch.randn(4, fan_in) * 0.1, torch.randn(out, 4) * 0.1, scale
            )
            for layer in range(2)
            for leaf, (out, fan_in) in sizes.items()
        }
    )

"""Small models with random weights, and their GGUF files in float32 with a vocabulary of bytes."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel

from lorikeet.export.layout import arranged, lay_out
from lorikeet.gguf.metadata import Field
from lorikeet.gguf.write import Stored, write_gguf

SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def random_model(config: PretrainedConfig | None = None) -> PreTrainedModel:
    """A model in float32 whose logits spread by several nats."""
    torch.manual_seed(1)
    config = config or LlamaConfig(**SIZES, tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3 if "embed" in name else parameter.shape[1] ** -0.5)
                parameter.mul_(3 if "lm_head" in name else 1)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def tensors_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """The checkpoint's tensors; a tied head is left out."""
    found = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        found.pop("lm_head.weight", None)
    return found


def byte_letters() -> list[str]:
    """The letters by which byte-level vocabularies write the bytes 0 to 255 (GPT-2, encoder.py)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]


def vocabulary(rows: int) -> dict[str, Field]:
    """Bytes, two merges, two control tokens, and unused tokens up to `rows`."""
    tokens = [*byte_letters(), "he", "ll", "<|end|>", "<|start|>"]
    kinds = [1] * 258 + [3] * 2
    unused = rows - len(tokens)
    return {
        "tokenizer.ggml.model": Field("str", "gpt2"),
        "tokenizer.ggml.pre": Field("str", "gpt-2"),
        "tokenizer.ggml.tokens": Field("str", tokens + [f"<unused{i}>" for i in range(unused)]),
        "tokenizer.ggml.token_type": Field("i32", kinds + [5] * unused),
        "tokenizer.ggml.merges": Field("str", ["h e", "l l"]),
        "tokenizer.ggml.bos_token_id": Field("u32", 259),
        "tokenizer.ggml.eos_token_id": Field("u32", 258),
        "tokenizer.ggml.add_bos_token": Field("bool", True),
    }


def write_model(path: Path, model: PreTrainedModel) -> None:
    """The model as a GGUF file in float32."""
    tensors = tensors_of(model)
    layout = lay_out(model.config.to_dict(), {k: tuple(t.shape) for k, t in tensors.items()})
    stored = {
        placed.name: as_stored(arranged(placed, tensors[placed.source])) for placed in layout.placed
    }
    stored |= {name: as_stored(tensor) for name, tensor in layout.made.items()}
    metadata = {**layout.metadata, **vocabulary(layout.rows)}
    write_gguf(path, metadata, stored)


def as_stored(tensor: Tensor) -> Stored:
    return Stored("F32", tuple(tensor.shape), partial(list, [tensor]))


def logits_of(model: PreTrainedModel, ids: list[int]) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]

"""Tiny models of several families with random weights, and their logits."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    PhiConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

# What several test files of PEFT's folders share is imported by its name.
sys.path.insert(0, str(Path(__file__).parent))

_SIZES: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
_LLAMA: dict[str, Any] = {**_SIZES, "intermediate_size": 24, "num_key_value_heads": 1}
_GEMMA: dict[str, Any] = {**_LLAMA, "head_dim": 8}
_FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_LLAMA),
    "llama-tied": lambda: LlamaConfig(**_LLAMA, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**_LLAMA),
    "opt": lambda: OPTConfig(**_SIZES, ffn_dim=24, word_embed_proj_dim=16),
    "gpt2": lambda: GPT2Config(
        vocab_size=48,
        n_embd=16,
        n_layer=3,
        n_head=2,
        n_positions=32,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "phi": lambda: PhiConfig(**_SIZES, intermediate_size=24, partial_rotary_factor=0.5),
    "gpt-neox": lambda: GPTNeoXConfig(**_SIZES, intermediate_size=24),
    "gpt-neox-tied": lambda: GPTNeoXConfig(
        **_SIZES, intermediate_size=24, tie_word_embeddings=True
    ),
    "gemma": lambda: GemmaConfig(**_GEMMA),
    "gemma3": lambda: Gemma3TextConfig(**_GEMMA),
}


@pytest.fixture(scope="session")
def tiny() -> Callable[[str], PreTrainedModel]:
    """Build a model of a family; the same weights every time."""

    def build(family: str = "llama") -> PreTrainedModel:
        torch.manual_seed(5)
        return AutoModelForCausalLM.from_config(_FAMILIES[family]()).eval()

    return build


@pytest.fixture(scope="session")
def logits() -> Callable[[torch.nn.Module], torch.Tensor]:
    """Logits of one fixed batch, float32 [2, 9, 48]."""

    def run(model: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=torch.arange(18).reshape(2, 9) % 17 + 1).logits

    return run

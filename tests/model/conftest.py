"""Tiny models of many architectures, with random weights large enough to matter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

VOCABULARY = 61
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
_LLAMA: dict[str, Any] = {
    **_COMMON,
    "intermediate_size": 24,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
}
_GPT2: dict[str, Any] = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
_EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
_GEMMA2: dict[str, Any] = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 5}
_LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0, 3.0, 4.0, 8.0],
}
ARCHITECTURES: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_LLAMA),
    "mistral": lambda: MistralConfig(**_LLAMA, sliding_window=5),
    "qwen2": lambda: Qwen2Config(**_LLAMA),
    "gpt2": lambda: GPT2Config(vocab_size=VOCABULARY, **_GPT2, bos_token_id=1, eos_token_id=2),
    "opt": lambda: OPTConfig(**_COMMON, ffn_dim=24, word_embed_proj_dim=16, pad_token_id=0),
    "gemma": lambda: GemmaConfig(**_LLAMA, head_dim=8),
    "gemma3": lambda: Gemma3TextConfig(**_LLAMA, head_dim=8, sliding_window=5),
    "phi": lambda: PhiConfig(**{**_LLAMA, "num_key_value_heads": 2}),
    "gpt-neox": lambda: GPTNeoXConfig(**_COMMON, intermediate_size=24),
    "llama-dynamic": lambda: LlamaConfig(
        **{**_LLAMA, "max_position_embeddings": 16},
        rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
    ),
    "phi3-longrope": lambda: Phi3Config(
        **_LLAMA,
        original_max_position_embeddings=16,
        eos_token_id=2,
        rope_parameters=dict(_LONGROPE),  # transformers adds to it
    ),
    "bloom": lambda: BloomConfig(vocab_size=VOCABULARY, hidden_size=16, n_layer=2, n_head=2),
    "gemma2": lambda: Gemma2Config(**_LLAMA, **_GEMMA2),
    "mamba": lambda: MambaConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, state_size=4
    ),
    "falcon": lambda: FalconConfig(**_COMMON),
    "gpt-oss": lambda: GptOssConfig(**_LLAMA, **_EXPERTS, head_dim=8, sliding_window=5),
}


@pytest.fixture(scope="session")
def architecture() -> Callable[[str], Any]:
    """Build a model of an architecture, as transformers itself would run it."""

    def build(name: str) -> Any:
        torch.manual_seed(4)
        model = AutoModelForCausalLM.from_config(ARCHITECTURES[name]()).eval()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.3)
        return model

    return build


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of as many tokens as the models have."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[: VOCABULARY - 3]
    tokens = ["<s>", "</s>", "<unk>", *alphabet]
    backend = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )

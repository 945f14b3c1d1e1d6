"""A single block stands for its model: same attention, same packing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lorikeet.errors import ModelError
from lorikeet.model.footprint import block_model, seconds_per_block
from lorikeet.model.loss import token_nll
from lorikeet.model.packing import enable_packing

CPU = torch.device("cpu")
NAMES = ["llama", "gpt2", "gemma3", "mistral", "bloom", "gemma2", "mamba", "falcon", "gpt-oss"]


@pytest.mark.parametrize("name", NAMES)
def test_a_block_packs_as_its_model_does(architecture: Callable[[str], Any], name: str) -> None:
    model = architecture(name)
    block = block_model(model, dtype=torch.float32, device=CPU)
    assert enable_packing(block, device=CPU) == enable_packing(model, device=CPU)
    assert block.config._attn_implementation == model.config._attn_implementation
    assert seconds_per_block(block, token_nll, tokens=32, repeats=1) > 0


def test_an_architecture_without_a_single_block() -> None:
    """RWKV divides by the number of blocks less one."""
    from transformers import AutoModelForCausalLM, RwkvConfig

    sizes = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 2}
    model = AutoModelForCausalLM.from_config(RwkvConfig(**sizes))
    with pytest.raises(ModelError, match=r"cannot plan for rwkv.*--train\.max_steps"):
        block_model(model, dtype=torch.float32, device=CPU)

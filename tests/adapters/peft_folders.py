"""Adapters saved by Lorikeet and by PEFT, with factors that are at work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import PreTrainedModel

from lorikeet.adapters import save_adapter
from lorikeet.config import LoraConfig
from lorikeet.lora import inject, lora_parameters

Tiny = Callable[[str], PreTrainedModel]
Logits = Callable[[torch.nn.Module], torch.Tensor]

# PEFT 0.21 asks a transformers model for a property that transformers 5.23 has renamed.
renamed = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is dep:FutureWarning")
unknown_key = pytest.mark.filterwarnings(
    r"ignore:Unexpected keyword arguments \['lorikeet'\] for class LoraConfig:UserWarning"
)
tied_target = pytest.mark.filterwarnings(
    "ignore:Model has `tie_word_embeddings=True`:UserWarning",
    "ignore:Model with `tie_word_embeddings=True`:UserWarning",
)
saves_embedding = pytest.mark.filterwarnings(
    "ignore:Setting `save_embedding_layers` to `True`:UserWarning"
)


def randomise(parameters: dict[str, torch.nn.Parameter]) -> None:
    generator = torch.Generator().manual_seed(11)
    for parameter in parameters.values():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)


def save_ours(model: PreTrainedModel, folder: Path, **options: Any) -> LoraConfig:
    config = LoraConfig(**{"r": 4, "alpha": 8.0, **options})
    inject(model, config, seed=0)
    randomise(lora_parameters(model))
    provenance = {"version": "0.1.0", "base": {"fingerprint": "abc"}}
    save_adapter(model, folder, config=config, base_model="tiny", provenance=provenance)
    return config


def save_theirs(model: PreTrainedModel, folder: Path, **options: Any) -> torch.nn.Module:
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **options})
    adapted = peft.get_peft_model(model, config)
    randomise({n: p for n, p in adapted.named_parameters() if "lora_" in n})
    adapted.save_pretrained(str(folder))
    return adapted.eval()

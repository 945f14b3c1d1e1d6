"""Adapters with new tokens: made by ours and by PEFT, and the logits of what carries them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from peft_folders import Tiny, randomise
from transformers import AutoModelForCausalLM

from lorikeet.adapters import save_adapter
from lorikeet.config import LoraConfig
from lorikeet.lora import grow_vocabulary, inject

Letters = Callable[[int], Any]

TEXTS = ["<ab>", "<c,d>"]


def targets(family: str) -> list[str]:
    return ["c_attn"] if family == "gpt2" else ["q_proj"]


def every_trained(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def grown_logits(model: torch.nn.Module, ids: tuple[int, ...] = (48, 49)) -> torch.Tensor:
    """Logits of a batch with the new tokens in it."""
    batch = torch.arange(18).reshape(2, 9) % 17 + 1
    batch[0, 3], batch[1, 5] = ids
    with torch.no_grad():
        return model(input_ids=batch).logits


def train_ours(tiny: Tiny, letters: Letters, folder: Path, family: str, **options: Any) -> Any:
    """An adapter of ours with new tokens, saved with its tokenizer; the model that carries it."""
    model, tokenizer = tiny(family), letters(options.pop("size", 48))
    grow_vocabulary(model, tokenizer, TEXTS)
    given = {"r": 4, "alpha": 8, "target_modules": targets(family), "new_tokens": TEXTS, **options}
    config = LoraConfig(**given)
    inject(model, config, seed=0)
    randomise(every_trained(model))
    save_adapter(
        model, folder, config=config, base_model="tiny", provenance={}, tokenizer=tokenizer
    )
    return model


def train_theirs(
    tiny: Tiny, letters: Letters, base: Path, family: str, *, rows: int = 50, **options: Any
) -> Any:
    """PEFT on a resized model, as its users do it; the base lies in `base`."""
    tiny(family).save_pretrained(str(base))
    letters(48).save_pretrained(str(base))
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(rows, mean_resizing=False)
    given = {"r": 4, "lora_alpha": 8, "target_modules": targets(family), **options}
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **given)).eval()
    randomise(every_trained(adapted))
    return adapted


def save_theirs(adapted: Any, letters: Letters, folder: Path, **options: Any) -> None:
    """With the tokenizer that knows the new tokens beside it."""
    adapted.save_pretrained(str(folder), **options)
    tokenizer = letters(48)
    tokenizer.add_tokens(TEXTS)
    tokenizer.save_pretrained(str(folder))


def load_whole(folder: Path) -> Any:
    """The model as anybody loads it, every weight from the file."""
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    return model.eval()

"""Counts that anyone can check by hand from a model's configuration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from lorikeet.config import LoraConfig
from lorikeet.lora import inject, parameter_report


def on_meta(folder: Path) -> LlamaForCausalLM:
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    ("shape", "r", "targets", "base", "trainable"),
    [
        ("smollm-135m", 4, ["q_proj", "k_proj", "v_proj"], 134_515_008, 322_560),
        ("smollm2-135m-instruct", 16, "all-linear", 134_515_008, 4_884_480),
        ("tinyllama-1.1b-chat", 8, ["q_proj", "v_proj"], 1_100_048_384, 1_126_400),
        ("llama-3.1-8b", 16, "q_proj,k_proj,v_proj,o_proj", 8_030_261_248, 13_631_488),
    ],
)
def test_published_models(
    shared: Callable[[str], Path],
    shape: str,
    r: int,
    targets: str | list[str],
    base: int,
    trainable: int,
) -> None:
    model = on_meta(shared(f"shapes/{shape}"))
    inject(model, LoraConfig.model_validate({"r": r, "target_modules": targets}), seed=0)
    report = parameter_report(model)
    assert (report.base, report.trainable) == (base, trainable)
    assert sum(report.by_target.values()) == trainable
    assert all(p.is_meta for p in model.parameters())


def test_counts_of_a_tiny_model(llama: Callable[..., LlamaForCausalLM]) -> None:
    full = parameter_report(llama(tied=True))
    assert (full.trainable, full.percent, full.by_target) == (full.base, 100.0, {})
    assert parameter_report(llama(tied=False)).base == full.base + 40 * 16
    model = llama(tied=True)
    inject(model, LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"]), seed=0)
    report = parameter_report(model)
    assert report.base == full.base
    assert report.by_target == {"embed_tokens": 2 * (40 + 16), "q_proj": 2 * 2 * (16 + 16)}
    assert report.percent == pytest.approx(100 * 240 / full.base)

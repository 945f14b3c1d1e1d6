"""Twenty steps against PEFT in a plain loop of its own: the same losses, the same adapter."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from lorikeet.adapters import load_adapter, save_adapter
from lorikeet.config import LoraConfig, TrainConfig
from lorikeet.data import Example
from lorikeet.lora import inject
from lorikeet.model import TokenNll
from lorikeet.model.packing import enable_packing
from lorikeet.train import Hooks, fit, set_up

# PEFT 0.21 asks a transformers model for a property that transformers 5.23 has renamed.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is dep:FutureWarning"),
    pytest.mark.filterwarnings(
        r"ignore:Unexpected keyword arguments \['lorikeet'\] for class LoraConfig:UserWarning"
    ),
]

STEPS = 20
LORA = LoraConfig(r=4, alpha=8.0)
SEED = 3  # where AdamW divides a gradient that is all but zero by itself, rounding decides the sign
TRAIN = TrainConfig(
    batch_size=4,
    max_steps=STEPS,
    learning_rate=5e-3,
    schedule="cosine",
    warmup=3,
    weight_decay=0.01,
    max_grad_norm=0.5,
    max_tokens=40,  # several micro-batches a step
)


@pytest.fixture(params=["stories260k", "random"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder with a model: a real one, and one for machines that lack it."""
    if request.param == "stories260k":
        return request.getfixturevalue("shared")("models/stories260k")
    request.getfixturevalue("tiny")(tied=True).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def load(folder: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert enable_packing(model, device=torch.device("cpu"))
    return model


def train_ours(
    model: nn.Module, nll: TokenNll, examples: Sequence[Example]
) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    setup = set_up(model, examples, TRAIN, nll=nll)
    fit(
        model,
        setup.optimizer,
        setup.steps,
        learning_rate=setup.schedule,
        total_steps=setup.total_steps,
        loss=setup.loss,
        hooks=Hooks(record=lines.append),
    )
    return lines


def cosine(step: int) -> float:
    """Peak 5e-3, three steps of warm-up that start above zero, then a half cosine to zero."""
    if step < 3:
        return 5e-3 * (step + 1) / 4
    return 5e-3 * 0.5 * (1 + math.cos(math.pi * (step - 3) / (STEPS - 3)))


def train_theirs(model: nn.Module, batches: Sequence[Sequence[Example]]) -> list[float]:
    """One document at a time, labels of -100, torch's own AdamW."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.01)
    losses = []
    model.train()
    for step, examples in enumerate(batches):
        count = sum(example.supervised_tokens for example in examples)
        nats = 0.0
        for example in examples:
            ids = torch.tensor([example.ids])
            labels = torch.where(torch.tensor([example.supervised]), ids, -100)
            loss = model(input_ids=ids, labels=labels).loss * example.supervised_tokens
            (loss / count).backward()
            nats += loss.item()
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.param_groups[0]["lr"] = cosine(step)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(nats / count)
    model.eval()
    return losses


def test_training_is_pefts(
    folder: Path, tmp_path: Path, ragged: Callable[..., list[Example]], nll: TokenNll
) -> None:
    examples = ragged(30, longest=30, vocabulary=load(folder).config.vocab_size)
    ours = load(folder)
    inject(ours, LORA, seed=SEED)
    save_adapter(ours, tmp_path / "start", config=LORA, base_model=str(folder), provenance={})
    theirs = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        str(tmp_path / "start"),
        is_trainable=True,
    )
    order = set_up(ours, examples, TRAIN).steps.order

    lines = train_ours(ours, nll, examples)
    expected = train_theirs(theirs, [[examples[i] for i in order.indices(s)] for s in range(STEPS)])

    losses = [line["loss"] for line in lines]
    assert max(losses) - min(losses) > 0.05  # something was learnt
    assert losses == pytest.approx(expected, abs=1e-5)
    assert [line["learning_rate"] for line in lines] == pytest.approx(
        [cosine(step) for step in range(STEPS)]
    )
    assert max(line["grad_norm"] for line in lines) > 0.5  # clipping was at work

    save_adapter(ours, tmp_path / "ours", config=LORA, base_model=str(folder), provenance={})
    theirs.save_pretrained(str(tmp_path / "theirs"))
    tensors = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    reference = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    assert tensors.keys() == reference.keys()
    for name, tensor in tensors.items():
        distance = (tensor - reference[name]).norm() / reference[name].norm()
        assert distance < 1e-4, name


def test_the_trained_adapter_goes_both_ways(
    folder: Path, tmp_path: Path, ragged: Callable[..., list[Example]], nll: TokenNll
) -> None:
    ours = load(folder)
    examples = ragged(8, vocabulary=ours.config.vocab_size)
    inject(ours, LORA, seed=SEED)
    train_ours(ours, nll, examples)
    save_adapter(ours, tmp_path / "a", config=LORA, base_model=str(folder), provenance={})
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(plain, str(tmp_path / "a")).eval()
    ids = torch.tensor([examples[0].ids])
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits
        assert_close(ours(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)
        theirs.save_pretrained(str(tmp_path / "b"))
        shutil.rmtree(tmp_path / "a")
        again = load(folder)
        assert not torch.allclose(again(input_ids=ids).logits, expected, atol=1e-2)
        load_adapter(again, tmp_path / "b")
        assert_close(again(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)

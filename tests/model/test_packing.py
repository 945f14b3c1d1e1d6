"""Which architectures share rows, and that both ways give transformers' own loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from lorikeet.config import TrainConfig
from lorikeet.data import Example, pack
from lorikeet.evaluate import evaluate
from lorikeet.generate import generate
from lorikeet.model import empty_model, load_model, token_nll
from lorikeet.model.attention import IMPLEMENTATION
from lorikeet.model.packing import can_pack, enable_packing
from lorikeet.model.rope import longest_unscaled
from lorikeet.train import Hooks, fit, set_up

CPU = torch.device("cpu")
PACK = ["llama", "mistral", "qwen2", "gpt2", "opt", "gemma", "gemma3", "phi", "gpt-neox"]
ALONE = ["bloom", "gemma2", "mamba", "falcon", "gpt-oss"]

Build = Callable[[str], Any]


def document(length: int, seed: int, *, masked: bool = True) -> Example:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 61, (length,), generator=generator)
    counted = torch.rand(length, generator=generator) < (0.7 if masked else 2.0)
    counted[0], counted[-1] = False, True
    return Example(tuple(ids.tolist()), tuple(counted.tolist()), 10, "test")


DOCUMENTS = [document(length, seed) for seed, length in enumerate((17, 2, 9, 23))]


def hf_nats(model: Any, example: Example) -> Tensor:
    """transformers' own loss of one document, as a sum."""
    ids = torch.tensor([example.ids])
    labels = torch.where(torch.tensor([example.supervised]), ids, -100)
    return model(input_ids=ids, labels=labels, use_cache=False).loss * example.supervised_tokens


@pytest.mark.parametrize("name", PACK)
def test_packed_documents_are_what_they_are_alone(architecture: Build, name: str) -> None:
    model = architecture(name)
    expected = torch.stack([hf_nats(model, example) for example in DOCUMENTS])
    gradient = torch.autograd.grad(expected.sum(), model.get_input_embeddings().weight)[0]

    assert enable_packing(model, device=CPU)
    batch = pack(DOCUMENTS)
    losses = token_nll(model, batch)
    nats = torch.zeros(len(DOCUMENTS)).index_add(0, batch.documents, losses)
    assert_close(nats, expected, rtol=1e-5, atol=1e-5)
    packed = torch.autograd.grad(nats.sum(), model.get_input_embeddings().weight)[0]
    assert (packed - gradient).norm() < 1e-5 * gradient.norm()


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "gemma3"])
def test_packed_documents_in_bf16(architecture: Build, name: str) -> None:
    """Short documents share products in bf16: exact up to bf16's rounding, gradients too."""
    reference, model = architecture(name), architecture(name).bfloat16()
    for parameter in reference.parameters():  # the same rounded weights
        parameter.data = parameter.bfloat16().float()
    documents = [*DOCUMENTS, document(40, 9)]
    expected = torch.stack([hf_nats(reference, example) for example in documents]).sum()
    assert enable_packing(model, device=CPU)
    losses, _ = losses_of(model, documents)
    assert losses.dtype == torch.float32
    assert losses.sum().item() == pytest.approx(expected.item(), rel=0.01)
    weights = [m.get_input_embeddings().weight for m in (model, reference)]
    gradient = torch.autograd.grad(losses.sum(), weights[0])[0].float()
    exact = torch.autograd.grad(expected, weights[1])[0]
    assert (gradient - exact).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PACK)
def test_documents_never_see_each_other(architecture: Build, name: str, dtype: torch.dtype) -> None:
    model = architecture(name).to(dtype)
    enable_packing(model, device=CPU)
    with torch.no_grad():
        before, batch = losses_of(model, DOCUMENTS)
        for changed in range(len(DOCUMENTS)):
            others = list(DOCUMENTS)
            others[changed] = document(len(DOCUMENTS[changed].ids), 77, masked=False)
            after, changed_batch = losses_of(model, others)
            for index in range(len(DOCUMENTS)):
                if index != changed:
                    was = before[batch.documents == index]
                    assert torch.equal(after[changed_batch.documents == index], was)


def losses_of(model: nn.Module, examples: list[Example]) -> tuple[Tensor, Any]:
    batch = pack(examples)
    return token_nll(model, batch), batch


@pytest.mark.parametrize("name", ["llama-dynamic", "phi3-longrope"])
def test_angles_follow_each_document_alone(architecture: Build, name: str) -> None:
    """Scaled by the longest position of a row: a long document must not turn the short ones."""
    model = architecture(name)
    long = max(DOCUMENTS, key=lambda example: len(example.ids))
    assert len(long.ids) > longest_unscaled(model.config) == 16
    with torch.no_grad():
        expected = [hf_nats(architecture(name), example).item() for example in DOCUMENTS]
        assert enable_packing(model, device=CPU)
        for order in ([0, 1, 2, 3], [3, 2, 1, 0]):  # what came before must not matter either
            documents = [DOCUMENTS[i] for i in order]
            for packing in (True, False):
                nats = evaluate(model, documents, packing=packing).nats
                assert nats == pytest.approx([expected[i] for i in order], rel=1e-5)


def test_angles_of_other_embeddings_ignore_lengths(architecture: Build) -> None:
    for name in ("llama", "gemma3", "gpt2"):
        assert longest_unscaled(architecture(name).config) == math.inf


@pytest.mark.parametrize("fast", ["auto", "off"])
def test_the_fast_path_leaves_scaled_angles_alone(
    architecture: Build, tokenizer: Any, tmp_path: Path, fast: str
) -> None:
    architecture("llama-dynamic").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    base = load_model(tmp_path, dtype="fp32", fast=fast)
    assert base.packing
    assert base.nll is token_nll


def test_the_window_matters(architecture: Build) -> None:
    """The documents above are longer than Mistral's window: without it the losses differ."""
    model = architecture("mistral")
    enable_packing(model, device=CPU)
    windowed, _ = losses_of(model, DOCUMENTS)
    model.config.sliding_window = None
    assert not torch.allclose(losses_of(model, DOCUMENTS)[0], windowed, rtol=1e-3)


@pytest.mark.parametrize("name", ALONE)
def test_other_architectures_keep_their_own_attention(architecture: Build, name: str) -> None:
    model = architecture(name)
    own = model.config._attn_implementation
    assert not enable_packing(model, device=CPU)
    assert model.config._attn_implementation == own != IMPLEMENTATION
    with torch.no_grad():
        expected = [hf_nats(model, example).item() for example in DOCUMENTS]
    assert evaluate(model, DOCUMENTS, packing=False).nats == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ALONE)
def test_other_architectures_train_one_document_a_row(architecture: Build, name: str) -> None:
    model = architecture(name)
    packing = enable_packing(model, device=CPU)
    count = sum(example.supervised_tokens for example in DOCUMENTS)
    with torch.no_grad():
        expected = sum(hf_nats(model, example).item() for example in DOCUMENTS) / count
    setup = set_up(
        model,
        DOCUMENTS,
        TrainConfig(batch_size=4, max_steps=6, learning_rate=1e-3, warmup=0),
        packing=packing,
    )
    lines: list[dict[str, Any]] = []
    fit(
        model,
        setup.optimizer,
        setup.steps,
        learning_rate=setup.schedule,
        total_steps=6,
        loss=token_nll,
        hooks=Hooks(record=lines.append),
    )
    assert lines[0]["loss"] == pytest.approx(expected, rel=1e-5)
    assert lines[-1]["loss"] < lines[0]["loss"]


@pytest.mark.parametrize("name", [*PACK, *ALONE])
def test_every_architecture_generates(architecture: Build, name: str) -> None:
    """A batch with ragged left padding against transformers on each prompt alone."""
    model = architecture(name)
    prompts = [[3, 4, 5, 6, 7], [9], [4, 40, 13, 9, 8, 7, 20]]
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=8,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        expected.append(out[0, len(prompt) :].tolist())
    enable_packing(model, device=CPU)
    assert generate(model, prompts, max_new_tokens=8, stop_ids=()) == expected


def test_a_model_without_memory_is_not_probed(shared: Callable[[str], Any]) -> None:
    model = empty_model(shared("shapes/smollm-135m"))
    assert not can_pack(model, device=torch.device("meta"))

"""Rows of an embedding trained alone: beside the whole weight trained, on either path."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPT2Config, LlamaConfig, PhiConfig

from lorikeet.config import LoraConfig
from lorikeet.data import Example, pack
from lorikeet.data.batch import Batch
from lorikeet.errors import AdapterError
from lorikeet.lora import (
    TokenEmbedding,
    TokenHead,
    disabled,
    inject,
    lora_parameters,
    parameter_report,
    remove,
    token_layers,
)
from lorikeet.model import token_nll
from lorikeet.model.fast import FastNll
from lorikeet.model.packing import enable_packing

TOKENS = [7, 3, 33]  # unsorted; the last is never read
IDS = torch.tensor([[3, 7, 1, 7, 0, 12], [5, 3, 3, 2, 39, 7]])
_SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**_SIZES),
    "llama tied": lambda: LlamaConfig(**_SIZES, tie_word_embeddings=True),
    "gemma 3": lambda: Gemma3TextConfig(**_SIZES, head_dim=8),
    "a tied head with biases": lambda: PhiConfig(**_SIZES, tie_word_embeddings=True),
    "gpt2": lambda: GPT2Config(
        vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=16, bos_token_id=1
    ),
}


def build(name: str) -> Any:
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(MODELS[name]()).eval()
    for key, parameter in model.named_parameters():
        if key.endswith("bias"):
            nn.init.normal_(parameter)
    return model


def adapt(model: Any, **options: Any) -> Any:
    """Inject an adapter whose low-rank part does nothing yet, with rows that are not the base's."""
    targets = ["c_attn" if model.config.model_type == "gpt2" else "q_proj"]
    tokens = {"target_modules": targets, "trainable_tokens": TOKENS}
    inject(model, LoraConfig(**{**tokens, **options}), seed=0)
    rows = model.get_input_embeddings().rows
    nn.init.normal_(rows, std=0.5, generator=torch.Generator().manual_seed(1))
    return model


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def weighted(model: nn.Module) -> torch.Tensor:
    """A scalar in which every logit has a say of its own."""
    found = model(input_ids=IDS).logits
    generator = torch.Generator().manual_seed(9)
    return (found * torch.randn(found.shape, generator=generator, dtype=found.dtype)).sum()


@pytest.mark.parametrize("tokens", [TOKENS, [0, 7]])  # 0 is the padding
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_the_whole_weight(name: str, tokens: list[int]) -> None:
    oracle = build(name).double()
    model = adapt(build(name), trainable_tokens=tokens).double()
    rows, weight = model.get_input_embeddings().rows, oracle.get_input_embeddings().weight
    with torch.no_grad():
        weight[tokens] = rows
    assert_close(logits(model), logits(oracle), atol=1e-12, rtol=1e-12)
    oracle.requires_grad_(False)
    weight.requires_grad_(True)
    weighted(oracle).backward()
    weighted(model).backward()
    assert_close(rows.grad, weight.grad[tokens], atol=1e-12, rtol=1e-12)
    tied = oracle.get_output_embeddings().weight is weight
    padding = oracle.get_input_embeddings().padding_idx
    for row, token in zip(rows.grad, tokens, strict=True):
        assert bool(row.any()) == (tied or (token in IDS and token != padding)), token
    learning = {n for n, p in model.named_parameters() if p.grad is not None}
    assert learning == {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(n.endswith((".lora_A", ".lora_B", ".rows")) for n in learning)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_the_base_is_never_written(name: str, dtype: torch.dtype) -> None:
    model = build(name).to(dtype)
    plain, own = logits(model), model.get_input_embeddings().weight
    before, modules = own.detach().clone(), dict(model.named_modules())
    embedded = model.get_input_embeddings()(IDS)
    tied = model.get_output_embeddings().weight is own
    targets = "c_attn" if name == "gpt2" else "q_proj"
    inject(model, LoraConfig(target_modules=[targets], trainable_tokens=TOKENS), seed=0)
    wrapper = model.get_input_embeddings()
    assert wrapper.rows.dtype == torch.float32
    assert torch.equal(wrapper.rows, before[TOKENS].float())
    assert torch.equal(wrapper(IDS), embedded)
    assert wrapper(IDS).dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    assert_close(logits(model), plain, atol=tolerance, rtol=tolerance)
    assert {type(layer) for layer in token_layers(model).values()} == (
        {TokenEmbedding, TokenHead} if tied else {TokenEmbedding}
    )
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    weighted(model).backward()
    optimizer.step()
    moved = logits(model)
    assert not torch.allclose(moved, plain, atol=0.1)
    with disabled(model):
        assert torch.equal(logits(model), plain)
    assert torch.equal(logits(model), moved)
    remove(model)
    after = dict(model.named_modules())
    assert after.keys() == modules.keys()
    assert all(after[name] is module for name, module in modules.items())
    assert torch.equal(own, before)
    assert (model.get_output_embeddings().weight is own) == tied


def some_batch() -> Batch:
    generator = torch.Generator().manual_seed(5)
    examples = []
    for length in (17, 5, 23):
        ids = torch.randint(40, (length,), generator=generator).tolist()
        ids[1:3] = TOKENS[:2]
        examples.append(Example(tuple(ids), (False,) + (True,) * (length - 1), 0, "test"))
    return pack(examples)


def gradients(loss: Any, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, list[torch.Tensor]]:
    trained = [p for p in model.parameters() if p.requires_grad]
    losses = loss(model, batch)
    return losses.detach(), list(torch.autograd.grad(losses.sum(), trained))


@pytest.mark.parametrize("name", ["llama", "llama tied"])
@pytest.mark.parametrize("recompute", [0, 2])
def test_the_fast_path_computes_the_same(name: str, recompute: int) -> None:
    model, batch = build(name), some_batch()
    assert enable_packing(model, device=torch.device("cpu"))
    plain = FastNll()(model, batch).detach()
    adapt(model)
    (expected, slopes), (found, ours) = (
        gradients(loss, model, batch) for loss in (token_nll, FastNll(recompute=recompute))
    )
    assert not torch.allclose(found, plain, atol=1e-2)
    assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert len(ours) == len(slopes) == 5
    for own, other in zip(ours, slopes, strict=True):
        assert_close(own, other, atol=1e-4, rtol=1e-4)
    with disabled(model):
        assert_close(FastNll()(model, batch).detach(), plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "llama tied"])
def test_counts_and_names(name: str) -> None:
    model = build(name)
    size = sum(p.numel() for p in model.parameters())
    adapt(model, r=2)
    report = parameter_report(model)
    rows = len(TOKENS) * 16
    assert report.base == size
    assert report.by_target == {"q_proj": 2 * 2 * (16 + 16), "embed_tokens, single tokens": rows}
    assert report.trainable == sum(report.by_target.values())
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert lora_parameters(model) == trained
    assert trained["model.embed_tokens.rows"].shape == (len(TOKENS), 16)
    with pytest.raises(AdapterError, match="already carries"):
        inject(model, LoraConfig(), seed=0)


def test_a_copy_has_rows_of_its_own() -> None:
    model = adapt(build("llama tied"))
    before = logits(model)
    other = copy.deepcopy(model)
    other.model.embed_tokens.rows.data.zero_()
    assert torch.equal(logits(model), before)
    assert not logits(other)[..., TOKENS].any()  # the copy's head reads the copy's rows


def test_a_trained_bias_of_a_tied_head() -> None:
    model = build("a tied head with biases")
    plain = logits(model)
    adapt(model, bias="all")
    model.lm_head.base.bias.data += 1000.0
    assert bool((logits(model) > 900).all())
    with disabled(model):
        assert torch.equal(logits(model), plain)
    remove(model)
    assert torch.equal(logits(model), plain)


@pytest.mark.parametrize(
    ("name", "options", "named"),
    [
        ("llama", {"trainable_tokens": [3, 40, 41]}, "of 40 rows lacks: 40, 41"),
        ("llama", {"trainable_tokens": list(range(38, 60))}, "46, 47 and 12 more"),
        ("llama", {"target_modules": ["embed_tokens"]}, "model.embed_tokens is adapted;"),
        ("llama", {"modules_to_save": ["embed_tokens"]}, "model.embed_tokens is trained whole;"),
        ("llama tied", {"target_modules": ["lm_head"]}, "lm_head is adapted and shares the weight"),
        ("llama tied", {"modules_to_save": ["lm_head"]}, "lm_head is trained whole and shares"),
    ],
)
def test_what_does_not_go_together(name: str, options: dict[str, Any], named: str) -> None:
    model = build(name)
    modules = dict(model.named_modules())
    config = LoraConfig(
        **{"target_modules": ["q_proj"], "trainable_tokens": TOKENS, "r": 2, **options}
    )
    with pytest.raises(AdapterError) as caught:
        inject(model, config, seed=0)
    assert named in str(caught.value)
    assert dict(model.named_modules()) == modules
    assert all(p.requires_grad for p in model.parameters())


def test_a_head_of_its_own_may_be_adapted_or_whole() -> None:
    for options in ({"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}):
        model = adapt(build("llama"), **options)
        assert list(token_layers(model)) == ["model.embed_tokens"]


def test_all_findings_at_once() -> None:
    with pytest.raises(AdapterError) as caught:
        config = LoraConfig(target_modules=["embed_tokens"], modules_to_save=["lm_head"])
        config = config.model_copy(update={"trainable_tokens": [5, 5, 99]})
        inject(build("llama tied"), config, seed=0)
    assert len(caught.value.problems) == 4


def test_a_model_that_names_no_embedding() -> None:
    config = LoraConfig(target_modules=["0"], trainable_tokens=[1])
    with pytest.raises(AdapterError, match="names none"):
        inject(nn.Sequential(nn.Linear(4, 4)), config, seed=0)

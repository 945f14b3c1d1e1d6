"""A tiny Llama with packed attention, ragged examples, and what `fit` needs."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lorikeet.config import LoraConfig
from lorikeet.data import Example
from lorikeet.lora import inject, lora_parameters
from lorikeet.model import FastNll, TokenNll, token_nll
from lorikeet.model.packing import enable_packing

# The harness of whole runs is imported by its name, here and in the processes that it starts.
sys.path.insert(0, str(Path(__file__).parent))

from whole_runs import Straight, Task, result, run

VOCABULARY = 61


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["fast", "generic"])
def nll(request: pytest.FixtureRequest) -> TokenNll:
    """Both ways to the loss: what holds for one holds for the other."""
    return FastNll() if request.param == "fast" else token_nll


@pytest.fixture(scope="session")
def tiny() -> Callable[..., LlamaForCausalLM]:
    """Build a random Llama; weights large enough that what it reads matters."""

    def build(*, tied: bool = True, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
            tie_word_embeddings=tied,
        )
        model = LlamaForCausalLM(config).eval()
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.3, generator=generator)
        assert enable_packing(model, device=torch.device("cpu"))
        return model.to(dtype)

    return build


@pytest.fixture(scope="session")
def adapted() -> Callable[..., nn.Module]:
    """Inject LoRA; with `moved` neither A nor B is zero."""

    def build(model: nn.Module, *, moved: bool = True, **options: Any) -> nn.Module:
        inject(model, LoraConfig(**{"r": 4, "alpha": 8.0, **options}), seed=3)
        if moved:
            generator = torch.Generator().manual_seed(2)
            for parameter in lora_parameters(model).values():
                nn.init.normal_(parameter, std=0.2, generator=generator)
        return model

    return build


@pytest.fixture(scope="session")
def ragged() -> Callable[..., list[Example]]:
    """Random documents of different lengths, each with its own irregular mask."""

    def make(
        n: int, *, seed: int = 0, longest: int = 14, vocabulary: int = VOCABULARY
    ) -> list[Example]:
        draw = random.Random(seed)
        examples = []
        for index in range(n):
            length = draw.randint(3, longest)
            mask = [False] + [draw.random() < 0.6 for _ in range(length - 1)]
            mask[draw.randrange(1, length)] = True
            ids = tuple(draw.randrange(1, vocabulary) for _ in range(length))
            examples.append(Example(ids, tuple(mask), 3 * sum(mask), f"row {index}"))
        return examples

    return make


@pytest.fixture(scope="session")
def task(tiny: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Task:
    folder = tmp_path_factory.mktemp("task")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:57]
    tokens = ["<s>", "</s>", "<unk>", *alphabet]
    bpe = models.BPE({token: i for i, token in enumerate(tokens)}, [], unk_token="<unk>")
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(folder / "model")
    tiny(tied=True).save_pretrained(folder / "model")
    draw = random.Random(0)
    rows = [
        {"prompt": f"{a} PLUS {b}", "completion": str(a + b)}
        for a, b in ((draw.randrange(50), draw.randrange(50)) for _ in range(25))
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Task(folder / "model", folder / "rows.jsonl")


@pytest.fixture(scope="session")
def straight(task: Task, tmp_path_factory: pytest.TempPathFactory) -> Straight:
    """What a run that nobody kills ends in."""

    @cache
    def found(method: str) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp("straight")
        assert run(task.arguments(folder / "run", method), folder / "log") == 0
        return result(folder / "run")

    return found

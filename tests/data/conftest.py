"""A small byte-level tokenizer that needs no files, and the real ones where they are there."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

CORPUS = ["Instruction: What is the capital of France?\nResponse: Paris is the capital.\n\n\n"] * 8
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def _tokenizer(
    *, bos: bool = False, chat_template: str | None = None, eos: str | None = "</s>"
) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 400 tokens; `bos`: begins every text with <s>, as Llama's does."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token=eos,
        pad_token=eos,
        chat_template=chat_template,
    )


@pytest.fixture(scope="session")
def chatml() -> str:
    """A chat template in the manner of ChatML."""
    return CHATML


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """Make tokenizers with another BOS, EOS or template."""
    return cache(_tokenizer)


@pytest.fixture(scope="session")
def tiny() -> PreTrainedTokenizerFast:
    return _tokenizer()


@pytest.fixture(scope="session")
def tiny_bos() -> PreTrainedTokenizerFast:
    return _tokenizer(bos=True)


@pytest.fixture(scope="session")
def tiny_chat() -> PreTrainedTokenizerFast:
    return _tokenizer(chat_template=CHATML, eos="<|im_end|>")


@pytest.fixture(scope="session")
def real(shared: Callable[[str], Path]) -> Callable[[str], Any]:
    loaded: dict[str, Any] = {}

    def load(name: str) -> Any:
        if name not in loaded:
            loaded[name] = AutoTokenizer.from_pretrained(shared(name))
        return loaded[name]

    return load

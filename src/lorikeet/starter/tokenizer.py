"""The starter's tokenizer: byte-level BPE over the world's own text, written as a folder's files.

Digits stand alone and words are split as GPT-2 splits them, the arrangement that GGUF readers know
as `smollm`. Every text comes back exactly: the 256 bytes are all in the vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from lorikeet.starter import words
from lorikeet.starter.world import stream

VOCABULARY = 1024
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
PAD_ID, START_ID, END_ID = 0, 1, 2
MAX_LENGTH = 512

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def _texts(seed: int, n: int) -> Iterator[str]:
    """Turns of the world, each with its role as the template puts it."""
    for instance in stream(seed, n):
        for message in instance.conversation:
            yield f"{message['role']}\n{message['content']}"
    for word in words.LEXICON:  # so that a word of lists is one token, as a word of facts is
        yield f" {word}" * (n // 20)
    for word in words.NAMES:  # an answer begins with a name, without the space before it
        yield f"{word}\n" * (n // 20)


def train(seed: int, *, n: int = 20_000) -> Tokenizer:
    """Train the tokenizer on `n` instances of the world; the same seed gives the same tokenizer."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(token, special=True) for token in (PAD, START, END)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(seed, n), trainer)
    return tokenizer


def build(folder: Path, seed: int) -> Tokenizer:
    """Train the tokenizer and write it to `folder`, with its config and the chat template.

    Args:
        folder: is made if it is missing; gets `tokenizer.json`, `tokenizer_config.json` and
            `chat_template.jinja`.
        seed: of the text to train on.

    Returns:
        The tokenizer itself.
    """
    tokenizer = train(seed)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": MAX_LENGTH,
        "bos_token": START,
        "eos_token": END,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
    }
    text = json.dumps(config, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    return tokenizer

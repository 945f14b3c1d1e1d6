"""Strings that try tokenizers, small tokenizers of known structures, and llama.cpp with them."""

# ruff: noqa: RUF001 - look-alikes are what it is about

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    normalizers,
    pre_tokenizers,
    processors,
)
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from lorikeet.export.llama_cpp import LlamaCpp
from lorikeet.gguf.metadata import Field
from lorikeet.gguf.write import Stored, write_gguf

SPACE = "\u2581"

NASTY = [
    "",
    *(" ", "  ", "   ", "\t", "\n", "\r\n", "\n\n", "\n\n\n", " \n \n", "\u00a0", "\u3000"),
    *("a\tb\t\tc", "line\r\nline\r\n\r\nline", " leading", "  two leading", "trailing ", "end  "),
    "a  b   c    d     e" + " " * 40 + "f",
    *("  \t mixed \t ", "word\n", "word \n", "\nword", "a\n b", "   both   "),
    *(
        "👩‍👩‍👧‍👦 family",
        "🏳️‍🌈🇩🇪👍🏽",
        "emoji😀mid😀dle",
        "日本語のテキスト、です。",
        "中文字符测试123",
    ),
    *("한국어 문장", "שלום עולם", "مرحبا بالعالم", "नमस्ते दुनिया", "ไทยภาษา", "Привет, МИР!"),
    *("e\u0301 cafe\u0301 A\u030a", "a\u0300\u0301\u0302b", "é café Å", "Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍A̴̵̜̰͔ͫ͗͢L̠ͨͧͩ͘G̴̻͈͍͔̹̑͗̎̅͛́Ǫ̵̹̻̝̳͂̌̌͘!"),
    *("1234567890" * 5, "3.14159 1,000,000 2024-01-02", "١٢٣٤ ৪৫৬ Ⅷ ½ ² ①", "a1b22c333", "0" * 17),
    *("<|im_end|>", "<s>", "</s>", "<unk>", "< |im_end|>", "<|im_end|", "<|endoftext|>", "<0x0A>"),
    "text<|im_start|>user\nhi<|im_end|>\n<s>x</s> y",
    "<|begin_of_text|>a<|eot_id|> b",
    *("\x00", "a\x00b", "\x01\x02\x7f", "\x85\x0b\x0c\u2028\u2029", "\u200bzero\u200dwidth\ufeff"),
    *("a" * 5000, "ab" * 3000, "supercalifragilistic" * 50, "x" * 17 + " " * 17 + "y"),
    "don't I'm you'll we've they'd he's DON'T I'M IT'S 'tis 's 'S ſ's",
    *(
        "!!!???...;;;",
        "#include <stdio.h>\nint main(){\n\treturn 0;\n}",
        "https://e.com/a?b=c&d=e#f",
    ),
    *("“quotes” ‘single’ — dash… ﬁ", "ÀÉÎÕÜ ñ ß ẞ İı ǅ ʰ ª º 𝒳𝔘 𐍈 𠀀", "\ud7ff\ue000\ufffd"),
    *("CamelCaseWordsHTTPServer", "École ÉCOLE ПриветМир", "$100 €50 ¥", "new\u2003em\u2009thin"),
]
"""Emoji, scripts, spaces, digits, look-alikes of special tokens, control characters."""


def strange(count: int, *, seed: int = 0) -> list[str]:
    """Random strings of pieces that try tokenizers, all of them old characters."""
    draw = random.Random(seed)
    pieces = (
        "don't IT'S Привет École 日本語 नमस्ते á x² ½ 1234 ١٢٣ ǅun ʰa - -- ... // ß € ™ 😀".split()
    )
    pieces += ["\n", "\r\n", "\n\n", " ", "  ", "   ", "\t", "\u00a0", "\u3000", "\u200b", "\x00"]
    return ["".join(draw.choices(pieces, k=draw.randrange(1, 10))) for _ in range(count)]


def dolly(path: Path, count: int) -> list[str]:
    """The first rows of the Dolly file, their fields one below the other."""
    with path.open(encoding="utf-8") as file:
        rows = [json.loads(line) for _, line in zip(range(count), file, strict=False)]
    return ["\n".join(value for value in row.values() if isinstance(value, str)) for row in rows]


def byte_level(
    texts: Iterable[str], steps: Sequence[Any], *, normalizer: Any = None, whole_words: bool = False
) -> PreTrainedTokenizerFast:
    """A trained BPE on bytes that splits text by these steps."""
    made = Tokenizer(BPE(ignore_merges=whole_words))
    made.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
    if normalizer:
        made.normalizer = normalizer
    made.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=2000,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<|im_start|>", eos_token="<|im_end|>"
    )


def at(regex: str) -> list[Any]:
    """The steps of tokenizers that split at a pattern and then take bytes."""
    return [
        pre_tokenizers.Split(Regex(regex), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]


def pieces(texts: Iterable[str]) -> list[str]:
    """Words and parts of words with U+2581 for spaces, the most frequent merges first."""
    made = Tokenizer(BPE())
    made.normalizer = normalizers.Replace(" ", SPACE)
    made.pre_tokenizer = pre_tokenizers.Split(Regex(f"{SPACE}+[^{SPACE}]*|[^{SPACE}]+"), "isolated")
    clean = (" " + text.replace("\0", "") for text in texts)
    made.train_from_iterator(clean, BpeTrainer(vocab_size=1200, show_progress=False))
    vocab = json.loads(made.to_str())["model"]["vocab"]
    return sorted(vocab, key=vocab.__getitem__)


def like_sentencepiece(
    words: Sequence[str], *, normalizer: Any = None, pre_tokenizer: Any = None
) -> PreTrainedTokenizerFast:
    """BPE on characters with byte fallback and every merge, as transformers makes it from
    sentencepiece's models; with Gemma's kinds of added tokens."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    spaces = [SPACE * n for n in (2, 3, 4)]
    plain = ["\n\n", "\n\n\n", "<table>"]
    tokens = [*special, *plain, *(f"<0x{byte:02X}>" for byte in range(256)), *words, *spaces]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    made = Tokenizer(
        BPE(
            vocab,
            merges_of(vocab, skipped={*special, *plain}),
            byte_fallback=True,
            fuse_unk=True,
            unk_token="<unk>",
        )
    )
    made.normalizer, made.pre_tokenizer = normalizer, pre_tokenizer
    made.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    made.add_tokens([AddedToken(t, normalized=False) for t in plain + spaces])
    made.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", vocab["<bos>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        pad_token="<pad>",
    )


def merges_of(vocab: dict[str, int], *, skipped: set[str]) -> list[tuple[str, str]]:
    """Every pair of tokens that makes a token, those that make earlier tokens first."""
    found = []
    for token in vocab:
        cuts = [] if token in skipped or token.startswith("<0x") else range(1, len(token))
        pairs = [(token[:i], token[i:]) for i in cuts]
        pairs = [(left, right) for left, right in pairs if left in vocab and right in vocab]
        found += sorted(pairs, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    return found


@contextmanager
def in_llama_cpp(path: Path, vocabulary: dict[str, Field]) -> Iterator[LlamaCpp]:
    """llama.cpp with a model of zeros that has this vocabulary."""
    rows, width = len(vocabulary["tokenizer.ggml.tokens"].value), 32
    sizes = {
        "context_length": 512,
        "embedding_length": width,
        "block_count": 1,
        "feed_forward_length": width,
        "attention.head_count": 1,
        "vocab_size": rows,
    }
    metadata = {
        "general.architecture": Field("str", "llama"),
        **{f"llama.{key}": Field("u32", value) for key, value in sizes.items()},
        "llama.attention.layer_norm_rms_epsilon": Field("f32", 1e-5),
        **vocabulary,
    }
    parts = "attn_q attn_k attn_v attn_output ffn_gate ffn_up ffn_down"
    shapes = {f"blk.0.{part}.weight": (width, width) for part in parts.split()}
    shapes |= {f"{norm}.weight": (width,) for norm in ("output_norm", "blk.0.attn_norm")}
    shapes |= {"blk.0.ffn_norm.weight": (width,), "token_embd.weight": (rows, width)}
    tensors = {
        name: Stored("F32", shape, partial(list, [torch.zeros(shape)]))
        for name, shape in shapes.items()
    }
    write_gguf(path, metadata, tensors)
    with LlamaCpp(path, context=256, threads=1) as llama:
        yield llama


def differing(tokenizer: Any, llama: LlamaCpp, texts: Sequence[str]) -> list[str]:
    """The texts that get other ids from llama.cpp; every tenth is tried without BOS, too."""
    found = []
    for special, some in ((True, texts), (False, texts[::10])):
        ids = tokenizer(list(some), add_special_tokens=special)["input_ids"]
        for text, expected in zip(some, ids, strict=True):
            if llama.tokenize(text, add_special=special, parse_special=True) != expected:
                found.append(text)
    return list(dict.fromkeys(found))

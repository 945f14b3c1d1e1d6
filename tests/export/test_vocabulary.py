"""Vocabularies beside llama.cpp: the same ids, or the class of strings is named."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_tokenizers import (
    NASTY,
    SPACE,
    at,
    byte_level,
    differing,
    dolly,
    in_llama_cpp,
    like_sentencepiece,
    pieces,
    strange,
)
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, Unigram, WordLevel
from tokenizers.trainers import UnigramTrainer
from transformers import PreTrainedTokenizerFast

import lorikeet.starter
from lorikeet.errors import ModelError
from lorikeet.export import pretokenizer
from lorikeet.export.llama_cpp import find
from lorikeet.export.vocabulary import describe
from lorikeet.model.base import load_tokenizer

needs_llama_cpp = pytest.mark.skipif(find() is None, reason="needs xllamacpp or llama-cpp-python")
Found = Callable[[str], Path]

FOLDERS = {
    "starter": ("", 1024, "smollm"),
    "stories260k": ("models/stories260k", 512, "default"),
    "smollm": ("shapes/smollm-135m", 49152, "smollm"),
    "smollm2": ("shapes/smollm2-135m-instruct", 49152, "smollm"),
    "tinyllama": ("shapes/tinyllama-1.1b-chat", 32000, "default"),
    "llama 3": ("shapes/llama-3.1-8b", 128256, "llama-bpe"),
}


@pytest.fixture(scope="module")
def texts(shared: Found) -> list[str]:
    return dolly(shared("data/dolly-15k.jsonl"), 100) + strange(200)


@pytest.fixture(scope="module")
def words(texts: list[str]) -> list[str]:
    return pieces(texts + NASTY)


def folder_of(name: str, shared: Found) -> tuple[Path, int, str]:
    path, rows, pre = FOLDERS[name]
    starter = Path(lorikeet.starter.__file__).parent / "model"
    return shared(path) if path else starter, rows, pre


@needs_llama_cpp
@pytest.mark.parametrize("rows", [100, pytest.param(2000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", FOLDERS)
def test_ids_of_known_tokenizers(name: str, rows: int, shared: Found, tmp_path: Path) -> None:
    folder, size, pre = folder_of(name, shared)
    tokenizer = load_tokenizer(folder)
    found = describe(tokenizer, rows=size)
    assert found.metadata["tokenizer.ggml.pre"].value == pre
    texts = dolly(shared("data/dolly-15k.jsonl"), rows) + NASTY + strange(100)
    with in_llama_cpp(tmp_path / "v.gguf", found.metadata) as llama:
        others = differing(tokenizer, llama, texts)
    if name == "stories260k":  # its normalizer makes one space of several
        assert [limit.partition(":")[0] for limit in found.limits] == ["runs of spaces"]
        assert set(others) == {text for text in texts if "  " in text}
    else:
        assert (others, found.limits) == ([], ())


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
STEPS: dict[str, tuple[list[Any], Any, bool]] = {
    "gpt-2": ([BYTES], None, False),
    "smollm": ([pre_tokenizers.Digits(True), BYTES], None, False),
    "llama-bpe": (at(pretokenizer.LLAMA3), None, True),
    "smaug-bpe": (at(pretokenizer.LLAMA3), None, False),
    "qwen2": (at(pretokenizer.QWEN2), normalizers.NFC(), False),
    "qwen35": (at(pretokenizer.QWEN35), normalizers.NFC(), False),
    "tekken": (at(pretokenizer.TEKKEN), None, True),
    "gpt-4o": (at(pretokenizer.GPT4O), None, False),
}


def test_every_way_to_split_is_tried() -> None:
    assert set(STEPS) == set(pretokenizer.SPLITS)


@needs_llama_cpp
@pytest.mark.parametrize("pre", STEPS)
def test_ids_of_byte_level_tokenizers(pre: str, texts: list[str], tmp_path: Path) -> None:
    steps, normalizer, whole_words = STEPS[pre]
    made = byte_level(texts + NASTY, steps, normalizer=normalizer, whole_words=whole_words)
    found = describe(made, rows=len(made) + 5)
    assert found.metadata["tokenizer.ggml.pre"].value == pre
    with in_llama_cpp(tmp_path / "v.gguf", found.metadata) as llama:
        others = differing(made, llama, texts + NASTY)
    if pre in ("qwen2", "qwen35"):
        assert "NFC" in found.limits[0]
        assert others
        assert all(unicodedata.normalize("NFC", text) != text for text in others)
    elif pre in ("tekken", "gpt-4o"):
        assert found.limits[0].startswith("words with letters outside ASCII")
        assert others
        assert not any(text.isascii() for text in others)
    else:
        assert (others, found.limits) == ([], ())


SPELLINGS: dict[str, tuple[Any, Any, bool, str]] = {
    "gemma": (
        normalizers.Replace(" ", SPACE),
        pre_tokenizers.Split(" ", "merged_with_previous"),
        False,
        "",
    ),
    "llama 2": (
        normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]),
        None,
        True,
        "",
    ),
    "never": (None, pre_tokenizers.Metaspace(SPACE, "never", split=False), False, ""),
    "always": (
        None,
        pre_tokenizers.Metaspace(SPACE, "always", split=False),
        True,
        "text that begins with a space",
    ),
    "first": (
        None,
        pre_tokenizers.Metaspace(SPACE, "first", split=False),
        True,
        "text after a special token",
    ),
}
ADDED = ("<pad>", "<eos>", "<bos>", "<unk>", "_of_turn>", "\n\n", "<table>")


@needs_llama_cpp
@pytest.mark.parametrize("name", SPELLINGS)
def test_ids_of_tokenizers_like_sentencepiece(
    name: str, texts: list[str], words: list[str], tmp_path: Path
) -> None:
    normalizer, splitter, prefix, limit = SPELLINGS[name]
    made = like_sentencepiece(words, normalizer=normalizer, pre_tokenizer=splitter)
    found = describe(made, rows=len(made) + 5)
    assert found.metadata["tokenizer.ggml.model"].value == "llama"
    assert found.metadata["tokenizer.ggml.add_space_prefix"].value is prefix
    tried = [*texts, *NASTY, "<start_of_turn>user\nhi  there<end_of_turn>\n", "a <table> b"]
    with in_llama_cpp(tmp_path / "v.gguf", found.metadata) as llama:
        others = differing(made, llama, tried)
    if not limit:
        assert others == []
        return
    assert any(own.startswith(limit) for own in found.limits)
    assert others
    # A text that begins with a space, or that follows an added token.
    assert all(text.startswith(" ") or any(t in text for t in ADDED) for text in others)


def test_the_space_before_a_chat(words: list[str]) -> None:
    """A tokenizer with a space before the very first text only, which llama.cpp has not."""
    splitter = pre_tokenizers.Metaspace(SPACE, "first", split=False)
    made = like_sentencepiece(words, pre_tokenizer=splitter)
    for template, prefix in (
        ("{{ '<bos>' }}{% for m in messages %}{{ m['content'] }}{% endfor %}", False),
        ("{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}", True),
        ("{{ raise_exception('no') }}", True),
    ):
        made.chat_template = template
        found = describe(made, rows=len(made))
        assert found.metadata["tokenizer.ggml.add_space_prefix"].value is prefix


@needs_llama_cpp
@pytest.mark.parametrize("collapses", [True, False])
def test_ids_of_unigrams(collapses: bool, texts: list[str], tmp_path: Path) -> None:
    made = Tokenizer(Unigram())
    steps = [normalizers.Replace(Regex(" {2,}"), " ")] if collapses else []
    made.normalizer = normalizers.Sequence(steps)
    made.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, "always", split=True)
    trainer = UnigramTrainer(
        vocab_size=1000,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        show_progress=False,
    )
    made.train_from_iterator((text.replace("\0", "") for text in texts), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )
    found = describe(tokenizer, rows=len(tokenizer) + 5)
    assert found.metadata["tokenizer.ggml.model"].value == "t5"
    plain = [text for text in texts[:100] if text == text.strip() and "\n\n\n" not in text]
    with in_llama_cpp(tmp_path / "v.gguf", found.metadata) as llama:
        others = differing(tokenizer, llama, plain)
    assert len(plain) > 70
    assert len(others) <= 1  # where two ways to split are equally likely
    assert any("equally likely" in limit for limit in found.limits)


@pytest.fixture
def small() -> Any:
    return byte_level(["some words and some more words"], [BYTES])


def test_types_ids_and_rows_without_a_token(small: Any) -> None:
    small.add_tokens([AddedToken("<plain>"), AddedToken("<unused>", special=True)])
    found = describe(small, rows=len(small) + 2).metadata
    tokens = found["tokenizer.ggml.tokens"].value
    types = dict(zip(tokens, found["tokenizer.ggml.token_type"].value, strict=True))
    size = len(small)
    assert tokens[-2:] == [f"[PAD{size}]", f"[PAD{size + 1}]"]
    assert [types[t] for t in ("a", "<|im_end|>", "<plain>", "<unused>", tokens[-1])] == [
        1,
        3,
        4,
        3,
        5,
    ]
    assert found["tokenizer.ggml.bos_token_id"].value == 1
    assert found["tokenizer.ggml.eos_token_id"].value == 2
    assert "tokenizer.ggml.unknown_token_id" not in found
    assert found["tokenizer.ggml.add_bos_token"].value is False


def test_what_the_tokenizer_puts_around_a_text_is_what_counts(words: list[str]) -> None:
    made = like_sentencepiece(words, normalizer=normalizers.Replace(" ", SPACE))
    found = describe(made, rows=len(made)).metadata
    assert found["tokenizer.ggml.add_bos_token"].value is True
    assert found["tokenizer.ggml.add_eos_token"].value is False
    types = found["tokenizer.ggml.token_type"].value
    tokens = found["tokenizer.ggml.tokens"].value
    kinds = dict(zip(tokens, types, strict=True))
    expected = {"<unk>": 2, "<bos>": 3, "<table>": 4, "<0x0A>": 6, SPACE * 2: 1}
    assert {token: kinds[token] for token in expected} == expected


def test_no_eos_after_a_prompt(small: Any) -> None:
    """llama.cpp would put it after prompts, too; in training it is after whole texts alone."""
    plain = describe(small, rows=len(small))
    small.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A <|im_end|>",
        special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)],
    )
    found = describe(small, rows=len(small))
    assert found.metadata["tokenizer.ggml.add_bos_token"].value is True
    assert found.metadata["tokenizer.ggml.add_eos_token"].value is False
    assert [limit for limit in found.limits if "EOS" in limit and "prompts" in limit]
    assert not [limit for limit in plain.limits if "EOS" in limit]


def test_the_token_that_ends_a_turn(small: Any) -> None:
    assert "tokenizer.ggml.eot_token_id" not in describe(small, rows=len(small)).metadata
    small.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|endoftext|>\n{% endfor %}"
    )
    found = describe(small, rows=len(small)).metadata
    assert found["tokenizer.ggml.eot_token_id"].value == 0
    assert found["tokenizer.chat_template"].value == small.chat_template


def test_named_chat_templates(small: Any) -> None:
    small.chat_template = {"default": "a", "tool_use": "b"}
    found = describe(small, rows=len(small)).metadata
    assert found["tokenizer.chat_template"].value == "a"
    assert found["tokenizer.chat_template.tool_use"].value == "b"
    assert found["tokenizer.chat_templates"].value == ["tool_use"]


def test_added_tokens_that_swallow_spaces_are_named(small: Any) -> None:
    small.add_tokens([AddedToken("<|end|>", rstrip=True), AddedToken("<w>", single_word=True)])
    assert describe(small, rows=len(small)).limits == (
        "text around <|end|>: here they swallow spaces after them, in llama.cpp not",
        "text around <w>: here they are found only as whole words, in llama.cpp not",
    )


def refusal(tokenizer: Any, *, rows: int = 5000) -> str:
    with pytest.raises(ModelError) as caught:
        describe(tokenizer, rows=rows)
    return str(caught.value)


@pytest.mark.skipif(find() is None, reason="needs xllamacpp or llama-cpp-python")
def test_added_tokens_that_overlap_are_named(small: Any, tmp_path: Path) -> None:
    """What is told is what llama.cpp does; runs of one character, as Gemma has them, are fine."""
    small.add_tokens([AddedToken(text) for text in ("\n\n", "\n\n\n", "<t>", "<t>1", "some wo")])
    assert describe(small, rows=len(small)).limits == ()
    small.add_tokens([AddedToken("words and")])
    small.add_tokens([AddedToken("<t>12 and", special=True)], special_tokens=True)
    found = describe(small, rows=len(small))
    assert [limit for limit in found.limits if "'some wo' and 'words and' overlap:" in limit]
    assert len(found.limits) == 1
    text = ["\n\n\n\n\n", "<t>1<t>12 and<t>", "some wo", "words and", "some words and"]
    with in_llama_cpp(tmp_path / "v.gguf", found.metadata) as llama:
        assert differing(small, llama, text) == ["some words and"]


def test_a_way_to_split_that_is_not_known_is_refused_and_shown() -> None:
    near = at(pretokenizer.QWEN2.replace(r"\p{N}|", r"\p{N}{1,2}|"))
    text = refusal(byte_level(["a b c"], near))
    assert r"\\p{N}{1,2}|" in text  # as JSON
    assert "known are: gpt-2, smollm, llama-bpe" in text
    assert "known are" in refusal(byte_level(["a b"], at(pretokenizer.QWEN2), whole_words=True))
    prefixed = [pre_tokenizers.ByteLevel(add_prefix_space=True)]
    assert "known are" in refusal(byte_level(["a b"], prefixed))
    lower = byte_level(["a b"], [BYTES], normalizer=normalizers.Lowercase())
    assert "Lowercase" in refusal(lower)


def test_merges_that_are_not_sentencepieces_are_refused(words: list[str]) -> None:
    made = like_sentencepiece(words, normalizer=normalizers.Replace(" ", SPACE))
    spec = json.loads(made.backend_tokenizer.to_str())
    merges = spec["model"]["merges"]
    twice = next(i for i in range(len(merges)) if "".join(merges[i]) == "".join(merges[i + 1]))
    for changed, expected in (
        (merges[:-40], "are not joined, though"),
        ([*merges[:twice], *merges[twice + 1 :], merges[twice]], "early by one pair and late by"),
    ):
        spec["model"]["merges"] = changed
        rules = Tokenizer.from_str(json.dumps(spec))
        other = PreTrainedTokenizerFast(tokenizer_object=rules, eos_token="<eos>")
        assert expected in refusal(other)


def test_spellings_that_llama_cpp_does_not_have_are_refused(words: list[str]) -> None:
    for normalizer, splitter in (
        (normalizers.NFKC(), None),
        (None, None),
        (None, pre_tokenizers.Metaspace("_", "never")),
        (None, pre_tokenizers.Metaspace(SPACE, "never", split=True)),  # with tokens of two spaces
        (normalizers.Replace(" ", SPACE), pre_tokenizers.Digits()),
    ):
        made = like_sentencepiece(words, normalizer=normalizer, pre_tokenizer=splitter)
        assert "known are" in refusal(made)


def test_what_else_is_refused(small: Any, words: list[str]) -> None:
    assert f"beyond the embedding's {len(small) - 1:,} rows" in refusal(small, rows=len(small) - 1)
    word_level = Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a"))
    assert "is a WordLevel" in refusal(PreTrainedTokenizerFast(tokenizer_object=word_level))
    suffixed = Tokenizer(BPE(end_of_word_suffix="</w>"))
    suffixed.pre_tokenizer = BYTES
    text = refusal(PreTrainedTokenizerFast(tokenizer_object=suffixed))
    assert "end_of_word_suffix" in text
    no_eos = PreTrainedTokenizerFast(tokenizer_object=small.backend_tokenizer)
    assert "no EOS token" in refusal(no_eos)
    few = [word for word in words if not word.startswith("<0x")]
    vocab = {token: i for i, token in enumerate(["<unk>", "<eos>", "<0x0A>", *few[:50]])}
    lacking = Tokenizer(BPE(vocab, [], byte_fallback=True, unk_token="<unk>"))
    lacking.normalizer = normalizers.Replace(" ", SPACE)
    text = refusal(PreTrainedTokenizerFast(tokenizer_object=lacking, eos_token="<eos>"))
    assert "lacks 255 of the 256 byte tokens" in text


def test_the_keys_of_a_folder(shared: Found) -> None:
    folder, rows, _ = folder_of("starter", shared)
    found = describe(load_tokenizer(folder), rows=rows).metadata
    assert found == describe(load_tokenizer(folder), rows=rows).metadata
    template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    assert found["tokenizer.chat_template"].value == template
    assert len(found["tokenizer.ggml.tokens"].value) == rows

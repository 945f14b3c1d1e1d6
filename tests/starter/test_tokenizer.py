"""The tokenizer: any text comes back, the template renders, and turns end with the end token."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lorikeet.starter import tokenizer, words
from lorikeet.starter.world import stream

N = 3000
TRAINED = tokenizer.train(0, n=N)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """What transformers makes of a model folder with our files."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer.build(folder, 0)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}), encoding="utf-8")
    return AutoTokenizer.from_pretrained(folder)


def test_training_is_deterministic() -> None:
    assert tokenizer.train(0, n=N).to_str() == TRAINED.to_str()


def test_building_writes_the_same_bytes_twice(tmp_path: Path) -> None:
    for name in ("a", "b"):
        tokenizer.build(tmp_path / name, 0)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@given(st.text())
def test_any_text_comes_back(text: str) -> None:
    assert TRAINED.decode(TRAINED.encode(text).ids, skip_special_tokens=False) == text


def test_the_vocabulary_is_full_and_the_special_tokens_come_first() -> None:
    assert TRAINED.get_vocab_size() == tokenizer.VOCABULARY
    ids = [TRAINED.token_to_id(token) for token in (tokenizer.PAD, tokenizer.START, tokenizer.END)]
    assert ids == [tokenizer.PAD_ID, tokenizer.START_ID, tokenizer.END_ID] == [0, 1, 2]


def test_digits_stand_alone() -> None:
    assert TRAINED.encode("1024").tokens == ["1", "0", "2", "4"]


def test_known_words_are_one_token(loaded: PreTrainedTokenizerBase) -> None:
    known = [*(f" {word}" for word in words.LEXICON), *words.NAMES]
    assert [word for word in known if len(loaded.encode(word)) > 1] == []


def test_transformers_encodes_as_we_do(loaded: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    ours = tokenizer.build(tmp_path, 0)
    for instance in stream(1, 200):
        for message in instance.conversation:
            assert loaded.encode(message["content"]) == ours.encode(message["content"]).ids
            assert loaded.decode(loaded.encode(message["content"])) == message["content"]


def test_end_and_pad_are_different_tokens(loaded: PreTrainedTokenizerBase) -> None:
    assert (loaded.pad_token_id, loaded.bos_token_id, loaded.eos_token_id) == (0, 1, 2)
    assert loaded.model_max_length == tokenizer.MAX_LENGTH


CONVERSATION = [
    {"role": "user", "content": "Hello!"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Who is green?"},
]


def test_the_template_renders_a_prompt(loaded: PreTrainedTokenizerBase) -> None:
    rendered = loaded.apply_chat_template(CONVERSATION, tokenize=False, add_generation_prompt=True)
    assert rendered == (
        "<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"
        "<|im_start|>user\nWho is green?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_system_message_is_optional(loaded: PreTrainedTokenizerBase) -> None:
    system = {"role": "system", "content": "Be brief."}
    bare = loaded.apply_chat_template(CONVERSATION, tokenize=False)
    with_system = loaded.apply_chat_template([system, *CONVERSATION], tokenize=False)
    assert with_system == f"<|im_start|>system\nBe brief.<|im_end|>\n{bare}"


def test_every_turn_ends_with_the_end_token(loaded: PreTrainedTokenizerBase) -> None:
    rendered = loaded.apply_chat_template(CONVERSATION, tokenize=True, return_dict=False)
    assert rendered.count(loaded.eos_token_id) == len(CONVERSATION)
    assert rendered.count(loaded.bos_token_id) == len(CONVERSATION)
    assert loaded.decode(rendered[-2:]) == "<|im_end|>\n"


def test_a_prompt_is_a_prefix_of_its_conversation(loaded: PreTrainedTokenizerBase) -> None:
    for instance in stream(1, 100):
        prompt = loaded.apply_chat_template(
            list(instance.messages), add_generation_prompt=True, return_dict=False
        )
        whole = loaded.apply_chat_template(instance.conversation, return_dict=False)
        assert whole[: len(prompt)] == prompt

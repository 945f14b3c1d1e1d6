"""A stock llama.cpp beside transformers, and what happens when it fails."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from random_models import logits_of, random_model, write_model
from transformers import PreTrainedModel

from lorikeet.errors import ModelError
from lorikeet.export.llama_cpp import LlamaCpp, find

pytestmark = pytest.mark.skipif(find() is None, reason="needs xllamacpp or llama-cpp-python")


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return random_model()


@pytest.fixture(scope="module")
def file(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "größe.gguf"
    write_model(path, model)
    return path


@pytest.fixture(scope="module")
def llama(file: Path) -> Iterator[LlamaCpp]:
    with LlamaCpp(file, context=1024, threads=1) as llama:
        yield llama


def ids(count: int, *, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(320, (count,), generator=generator).tolist()


def test_logits(llama: LlamaCpp, model: PreTrainedModel) -> None:
    assert llama.exact
    for count in (1, 7, 100):
        expected = logits_of(model, ids(count))
        found = llama.logits(ids(count))
        assert (found.shape, found.dtype) == ((count, 320), torch.float32)
        assert expected.std() > 1
        assert (found - expected).abs().max() < 3e-6 * expected.abs().max()


def test_a_document_in_several_batches(llama: LlamaCpp, model: PreTrainedModel) -> None:
    expected = logits_of(model, ids(700))
    assert (llama.logits(ids(700)) - expected).abs().max() < 3e-6 * expected.abs().max()


def test_documents_do_not_see_each_other(llama: LlamaCpp) -> None:
    first = llama.logits(ids(50))
    llama.logits(ids(90, seed=1))
    llama.continuations([ids(9)], max_new_tokens=3, stop_ids=[])
    assert torch.equal(llama.logits(ids(50)), first)


def test_greedy_continuations(llama: LlamaCpp, model: PreTrainedModel) -> None:
    prompts = [ids(5, seed=seed) for seed in range(6)]
    expected = []
    for prompt in prompts:
        text = list(prompt)
        for _ in range(12):
            text.append(int(logits_of(model, text)[-1].argmax()))
        expected.append(text[5:])
    assert llama.continuations(prompts, max_new_tokens=12, stop_ids=[]) == expected
    stop = expected[0][4]
    cut = [one[: one.index(stop)] if stop in one else one for one in expected]
    assert cut != expected
    assert llama.continuations(prompts, max_new_tokens=12, stop_ids=[stop]) == cut
    assert llama.continuations(prompts[:1], max_new_tokens=0, stop_ids=[]) == [[]]


def test_of_equal_logits_the_lowest_wins(tmp_path: Path) -> None:
    model = random_model()
    with torch.no_grad():
        model.lm_head.weight[:] = model.lm_head.weight[7]
    write_model(tmp_path / "x", model)
    with LlamaCpp(tmp_path / "x", threads=1) as llama:
        assert llama.continuations([[1, 2]], max_new_tokens=2, stop_ids=[]) == [[0, 0]]


def test_tokenize(llama: LlamaCpp) -> None:
    def tokens(text: str, *, add: bool = False, parse: bool = False) -> list[int]:
        return llama.tokenize(text, add_special=add, parse_special=parse)

    assert tokens("hell") == [256, 257]
    assert tokens("hell", add=True) == [259, 256, 257]
    assert tokens("<|end|>he", parse=True) == [258, 256]
    assert len(tokens("<|end|>")) == 7
    assert tokens("") == []
    assert len(tokens("é\0😀")) == 2 + 1 + 4
    assert len(tokens("x y" * 5000)) == 15_000


def test_tokens_that_end_an_answer(llama: LlamaCpp) -> None:
    assert llama.ending() == [258]


def test_what_does_not_fit_is_refused_before_llama_cpp_aborts(llama: LlamaCpp) -> None:
    with pytest.raises(
        ModelError, match="1025 tokens and 0 more do not fit into a context of 1024"
    ):
        llama.logits(ids(1025))
    with pytest.raises(ModelError, match="1000 tokens and 25 more"):
        llama.continuations([ids(1000)], max_new_tokens=25, stop_ids=[])
    with pytest.raises(ValueError, match="320 is no token of 320"):
        llama.logits([320])
    with pytest.raises(ValueError, match="without tokens"):
        llama.logits([])


def test_a_file_that_does_not_load(file: Path, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(ModelError) as caught:
        LlamaCpp(tmp_path / "x")
    assert "llama.cpp: cannot load" in str(caught.value)
    assert "data is not within the file bounds" in str(caught.value)


def test_an_adapter_that_does_not_load(file: Path) -> None:
    with pytest.raises(ModelError, match="cannot load the adapter") as caught:
        LlamaCpp(file, adapter=file)
    assert "expect general.type to be 'adapter'" in str(caught.value)


def test_a_crash_is_our_error(file: Path) -> None:
    with LlamaCpp(file, threads=1) as llama:
        os.kill(llama._process.pid, signal.SIGABRT)
        with pytest.raises(ModelError, match="it ended with SIGABRT while at work on"):
            llama.logits([1, 2])
        with pytest.raises(ModelError, match="it ended with SIGABRT"):
            llama.tokenize("a", add_special=False, parse_special=False)


def test_leaving_ends_the_process(file: Path) -> None:
    with pytest.raises(KeyboardInterrupt), LlamaCpp(file, threads=1) as llama:
        process = llama._process
        assert process.poll() is None
        raise KeyboardInterrupt
    assert process.returncode == 0
    assert not Path(f"/proc/{process.pid}").exists()


def test_an_interruption_in_an_answer_does_not_hang(file: Path) -> None:
    """What is left of the answer is thrown away with the process."""
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt), LlamaCpp(file, threads=1) as llama:
        answer = llama._answer({"logits": ids(1500)})
        next(answer)
        raise KeyboardInterrupt
    assert llama._process.returncode is not None
    assert time.monotonic() - started < 20

"""Exports of every type in a stock llama.cpp: our reader's logits, and our own greedy answers.

The small ones run always; real widths and real numbers of layers are slow.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from exporting import divergence, exported, random_folder, random_ids, reread, spread
from random_models import logits_of
from small_tokenizers import dolly
from transformers import AutoConfig, GemmaConfig, LlamaConfig, PretrainedConfig, Qwen2Config

from lorikeet import starter
from lorikeet.data import Renderer
from lorikeet.export.llama_cpp import LlamaCpp, find
from lorikeet.export.tolerance import of_llama_cpp
from lorikeet.generate import generate
from lorikeet.gguf.mixture import KINDS
from lorikeet.model import load_model, load_tokenizer

pytestmark = pytest.mark.skipif(find() is None, reason="needs xllamacpp or llama-cpp-python")

Found = Callable[[str], Path]
Folders = Callable[[str], Path]

TRAINED = ("stories260k", "starter")
FEW = ("f32", "bf16", "q4_k_m", "q2_k")
OTHERS = tuple(kind for kind in KINDS if kind not in FEW)
EXACT = ("f32", "f16", "bf16")


def narrow(**more: Any) -> dict[str, Any]:
    """Rows of 256, so that K-quants are what they are; the embedded model's vocabulary."""
    return {
        "vocab_size": 1024,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        **more,
    }


SMALL: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**narrow(tie_word_embeddings=False)),
    # Rows of 576 are no multiple of 256: everything falls back.
    "smollm": LlamaConfig(
        **narrow(hidden_size=576, intermediate_size=1536, tie_word_embeddings=True)
        | {"num_attention_heads": 9, "num_key_value_heads": 3, "num_hidden_layers": 1}
    ),
    "qwen2": Qwen2Config(**narrow(tie_word_embeddings=True)),
    "gemma": GemmaConfig(**narrow(head_dim=128, num_key_value_heads=1)),
}


LARGE = ("smollm-135m", "tinyllama-1.1b-chat", "qwen2 0.5b", "gemma 2b")


def large(name: str, shared: Found) -> tuple[PretrainedConfig, Path]:
    """The sizes of real models, and a folder with a tokenizer of so many rows or fewer."""
    if name in ("smollm-135m", "tinyllama-1.1b-chat"):
        folder = shared(f"shapes/{name}")
        layers = {"num_hidden_layers": 2} if name.startswith("tiny") else {}
        return AutoConfig.from_pretrained(folder, **layers), folder
    if name == "qwen2 0.5b":  # of Qwen2.5-0.5B
        sizes = {"hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14}
        more = {"num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 49152}
        return Qwen2Config(**sizes, **more, tie_word_embeddings=True), shared("shapes/smollm-135m")
    sizes = {"hidden_size": 2048, "intermediate_size": 16384, "num_attention_heads": 8}
    more = {"num_key_value_heads": 1, "head_dim": 256, "num_hidden_layers": 1, "vocab_size": 32000}
    return GemmaConfig(**sizes, **more), shared("shapes/tinyllama-1.1b-chat")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, shared: Found) -> Folders:
    """A model folder by name, made when it is asked for."""
    made: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name == "starter":
            return starter.folder()
        if name == "stories260k":
            return shared("models/stories260k")
        if name not in made:
            folder = tmp_path_factory.mktemp("model") / name
            config, tokenizer = (
                (SMALL[name], starter.folder()) if name in SMALL else large(name, shared)
            )
            made[name] = random_folder(folder, config, tokenizer)
        return made[name]

    return of


def check_type(name: str, folder: Path, kind: str, out: Path, *, count: int = 60) -> None:
    """llama.cpp runs the file, and as near to our own reading of it as its arithmetic lets it."""
    conversion = exported(folder, kind, out)
    ids = random_ids(count, below=500)
    expected = logits_of(reread(conversion, out), ids)
    with LlamaCpp(out, context=128, threads=1) as llama:
        found = llama.logits(ids)
    assert found.shape == expected.shape
    assert bool(found.isfinite().all())
    assert 2 < float(expected.std()) < 10
    assert spread(found, expected) < allowed(name, kind)
    if name in TRAINED:
        assert divergence(expected, found) < of_llama_cpp(kind).kl


def allowed(name: str, kind: str) -> float:
    """About three times the most that was seen of the difference, in parts of the logits' spread.

    The inputs of products are rounded to the type that suits the weights': to 8 bits a value, and
    of K-quants 256 of them share a scale. With exact weights there is nothing to round but Gemma's
    GELU, which llama.cpp looks up in a table of float16. A wrong place gives 0.1 to 1.5.
    """
    if kind in EXACT:
        return {"f32": 1e-3 if name.startswith("gemma") else 1e-5, "f16": 2e-3, "bf16": 2e-2}[kind]
    return 0.09


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TRAINED)
def test_every_type(name: str, kind: str, folders: Folders, tmp_path: Path) -> None:
    check_type(name, folders(name), kind, tmp_path / "x.gguf")


@pytest.mark.parametrize("kind", [*FEW, *(pytest.param(k, marks=pytest.mark.slow) for k in OTHERS)])
@pytest.mark.parametrize("name", SMALL)
def test_every_type_of_other_architectures(
    name: str, kind: str, folders: Folders, tmp_path: Path
) -> None:
    check_type(name, folders(name), kind, tmp_path / "x.gguf")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LARGE)
def test_every_type_of_real_widths(name: str, kind: str, folders: Folders, tmp_path: Path) -> None:
    check_type(name, folders(name), kind, tmp_path / "x.gguf", count=40)


def answers(folder: Path, prompts: Sequence[Sequence[int]], most: int, out: Path) -> Any:
    """Greedy continuations in transformers and in llama.cpp, none of which ends early."""
    model = load_model(folder, dtype="fp32", fast="off").model
    ours = generate(model, prompts, max_new_tokens=most, stop_ids=set())
    exported(folder, "f32", out)
    with LlamaCpp(out, context=512, threads=1) as llama:
        theirs = llama.continuations(prompts, max_new_tokens=most, stop_ids=[])
    assert all(len(continuation) == most for continuation in ours)
    return ours, theirs


def test_greedy_answers(folders: Folders, shared: Found, tmp_path: Path) -> None:
    """32 prompts of Dolly's rows, 64 tokens each: every token is ours."""
    folder = folders("stories260k")
    tokenizer = load_tokenizer(folder)
    texts = dolly(shared("data/dolly-15k.jsonl"), 32)
    prompts = list(dict.fromkeys(tuple(tokenizer(text)["input_ids"][:48]) for text in texts))
    assert len(prompts) == 32
    ours, theirs = answers(folder, prompts, 64, tmp_path / "x.gguf")
    assert theirs == ours
    assert len({token for continuation in ours for token in continuation}) > 100


def test_greedy_answers_to_questions(tmp_path: Path) -> None:
    """The embedded model in conversations of the kind that it was trained on."""
    folder = starter.folder()
    renderer = Renderer(load_tokenizer(folder), template="auto")
    rows = (folder.parent / "json-test.jsonl").read_text(encoding="utf-8").splitlines()
    rendered = (tuple(renderer.prompt(json.loads(row)["messages"][:1])) for row in rows)
    prompts = list(dict.fromkeys(rendered))[:32]
    assert len(prompts) == 32
    ours, theirs = answers(folder, prompts, 64, tmp_path / "x.gguf")
    assert theirs == ours


@pytest.mark.parametrize("name", SMALL)
def test_greedy_answers_of_random_weights(name: str, folders: Folders, tmp_path: Path) -> None:
    check_greedy(name, folders(name), tmp_path / "x.gguf", count=8, most=32)


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_greedy_answers_of_real_widths(name: str, folders: Folders, tmp_path: Path) -> None:
    check_greedy(name, folders(name), tmp_path / "x.gguf", count=8, most=16)


def check_greedy(name: str, folder: Path, out: Path, *, count: int, most: int) -> None:
    prompts = [random_ids(9 + i, below=500, seed=i) for i in range(count)]
    ours, theirs = answers(folder, prompts, most, out)
    assert len({token for continuation in ours for token in continuation}) >= most // 2
    assert theirs == ours

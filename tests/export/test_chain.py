"""The chain from base to file: sound exports pass, planted faults are named by their link."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from exporting import exported, random_folder
from torch import Tensor, nn
from transformers import GemmaConfig

from lorikeet import starter
from lorikeet.adapters import Adapter, read_adapter, save_adapter
from lorikeet.config import LoraConfig
from lorikeet.data import Renderer, Turns
from lorikeet.errors import ModelError
from lorikeet.evaluate import evaluate
from lorikeet.export.chain import Chain, Spelling, check_chain
from lorikeet.export.chat import Chat
from lorikeet.export.convert import Conversion, export_gguf
from lorikeet.export.llama_cpp import find
from lorikeet.export.verify import Material
from lorikeet.gguf.metadata import Field
from lorikeet.gguf.read import open_gguf
from lorikeet.gguf.write import Stored, write_gguf
from lorikeet.lora import grow_vocabulary, inject
from lorikeet.model import load_model, load_tokenizer

needs_llama_cpp = pytest.mark.skipif(find() is None, reason="needs xllamacpp or llama-cpp-python")

STARTER = starter.folder()
ROWS = (STARTER.parent / "pirate-test.jsonl").read_text(encoding="utf-8").splitlines()[:6]
Q0 = "blk.0.attn_q.weight"


class Adapted:
    """A base with an adapter, live and as a file's parts, and what to compare on."""

    def __init__(self, folder: Path, base: Path = STARTER, **options: Any) -> None:
        self.base, self.folder = base, folder
        loaded = load_model(base, dtype="fp32", fast="off")
        if new := options.get("new_tokens"):
            grow_vocabulary(loaded.model, loaded.tokenizer, new)
        self.plain = load_model(base, dtype="fp32", fast="off").model
        config = LoraConfig(**{"r": 4, "alpha": 8.0, **options})
        inject(loaded.model, config, seed=0)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in loaded.model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.03)
        save_adapter(
            loaded.model,
            folder,
            config=config,
            base_model=str(base),
            provenance={},
            tokenizer=loaded.tokenizer if new else None,
        )
        self.model: nn.Module = loaded.model.eval()
        self.tokenizer = load_tokenizer(folder) if new else None
        self.renderer = Renderer(loaded.tokenizer, template="auto")
        self.adapter: Adapter = read_adapter(folder)

    def material(self, renderer: Renderer | None = None, *, prompts: int = 0) -> Material:
        renderer = renderer or self.renderer
        talks = [Turns(tuple(json.loads(row)["messages"])) for row in ROWS]
        asked = [talk.prompt for talk in talks]
        return Material(
            examples=[e for talk in talks for e in renderer.example(talk, origin="row")],
            prompts=[renderer.prompt(prompt) for prompt in asked[:prompts]],
            texts=[(renderer.prompt_text(p), renderer.prompt(p)) for p in asked],
            stop_ids={2},
        )

    def plan(self, kind: str, **more: Any) -> Conversion:
        given = {"adapter": self.adapter, "tokenizer": self.tokenizer}
        return Conversion.plan(self.base, kind, **{**given, **more}, chat=Chat.of(self.renderer))

    def check(
        self,
        conversion: Conversion,
        file: Path,
        *,
        llama_cpp: bool = True,
        renderer: Renderer | None = None,
        prompts: int = 0,
        **more: Any,
    ) -> Chain:
        return check_chain(
            conversion,
            file,
            self.model,
            self.material(renderer, prompts=prompts),
            adapted=True,
            llama_cpp=llama_cpp and find() is not None,
            **more,
        )


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    return Adapted(tmp_path_factory.mktemp("adapter") / "a")


@pytest.fixture(scope="module")
def sound(adapted: Adapted, tmp_path_factory: pytest.TempPathFactory) -> tuple[Conversion, Path]:
    """An export in float32 as it should be."""
    out = tmp_path_factory.mktemp("file") / "f32.gguf"
    conversion = adapted.plan("f32")
    export_gguf(conversion, out)
    return conversion, out


def changed(
    path: Path,
    out: Path,
    tensors: Mapping[str, Tensor] | None = None,
    metadata: Mapping[str, Field] | None = None,
    names: Mapping[str, str] | None = None,
) -> Path:
    """A file with other tensors (in float32), other keys, or tensors that take others' places."""
    file, tensors, names = open_gguf(path), tensors or {}, names or {}
    stored = {}
    for name, info in file.tensors.items():
        if name in tensors:
            stored[name] = Stored("F32", info.shape, partial(list, [tensors[name]]))
        else:
            source = file.tensors[names.get(name, name)]
            stored[name] = Stored(source.type, source.shape, partial(file.raw, source.name))
    write_gguf(out, {**file.metadata, **(metadata or {})}, stored)
    return out


def whole(path: Path, name: str) -> Tensor:
    file = open_gguf(path)
    return file.rows(name, 0, file.tensors[name].shape[0])


def blamed(chain: Chain) -> set[str]:
    """What problems are named by: links, `in the file`, `beside our own reading`."""
    parts = [problem.partition(":")[0] for problem in chain.problems()]
    marks = ("in the file", "beside our own reading")
    return {next((mark for mark in marks if mark in part), part) for part in parts}


FILE = {"in the file"}
LLAMA = {"in llama.cpp"} if find() else set()


@needs_llama_cpp
@pytest.mark.parametrize("kind", ["f32", "bf16", "q6_k", "q4_k_m"])
def test_a_sound_export(kind: str, adapted: Adapted, tmp_path: Path) -> None:
    out = tmp_path / "x.gguf"
    conversion = adapted.plan(kind)
    export_gguf(conversion, out)
    told: list[str] = []
    chain = adapted.check(conversion, out, starting=told.append, prompts=1)
    assert chain.problems() == []
    half = ["f16"] if kind.startswith("q") else []
    assert [link.name for link in chain.links] == ["base", "merged", *half, kind, "in llama.cpp"]
    assert told == [link.name for link in chain.links]
    assert chain.reference == "adapter"
    found = {link.name: link.found for link in chain.links}
    assert found["merged"].kl_mean < 1e-4
    assert found["base"].kl_mean > 100 * found["merged"].kl_mean
    assert found[kind].prompts == 1
    assert chain.spelling == Spelling(6, 6, None)
    summary = json.loads(json.dumps(chain.summary()))
    assert [link["name"] for link in summary["links"]] == told
    assert summary["links"][0]["tolerance"] is None
    assert summary["spelling"] == {"conversations": 6, "equal": 6}


def test_links_are_the_models_that_they_are_called(
    adapted: Adapted, sound: tuple[Conversion, Path]
) -> None:
    """The base is scored without its adapter, the reference with it, as the evaluation scores."""
    chain = adapted.check(*sound, llama_cpp=False)
    examples = adapted.material().examples
    base, live = (evaluate(m, examples, packing=False) for m in (adapted.plain, adapted.model))
    found = {link.name: link.found for link in chain.links}
    assert list(found) == ["base", "merged", "f32"]
    assert found["base"].candidate.nll == pytest.approx(base.nll, rel=1e-5)
    assert found["f32"].candidate.nll == pytest.approx(live.nll, rel=1e-5)
    assert all(one.reference.nll == pytest.approx(live.nll, rel=1e-5) for one in found.values())
    assert abs(base.nll - live.nll) > 0.01
    assert found["f32"].kl_mean < 1e-9
    assert 1e-7 < found["merged"].kl_mean < 2e-4  # rounded to the base's bf16
    assert chain.spelling is None
    assert chain.summary()["spelling"] is None


def test_a_base_alone_is_its_own_reference(tmp_path: Path) -> None:
    out, base = tmp_path / "x.gguf", load_model(STARTER, dtype="fp32", fast="off")
    renderer = Renderer(base.tokenizer, template="auto")
    talks = [Turns(tuple(json.loads(row)["messages"])) for row in ROWS]
    examples = [e for talk in talks for e in renderer.example(talk, origin="row")]
    material = Material(examples, [], [], set())
    conversion = exported(STARTER, "q8_0", out)
    chain = check_chain(conversion, out, base.model, material, adapted=False, llama_cpp=False)
    assert chain.reference == "base"
    assert [link.name for link in chain.links] == ["f16", "q8_0"]
    assert chain.problems() == []


@needs_llama_cpp
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": "all-linear", "dora": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "new_tokens": ["<tool>", "arrr"]},
    ],
)
def test_adapters_of_every_kind(options: dict[str, Any], tmp_path: Path) -> None:
    """Untied weights, magnitudes, whole modules and new tokens go through every link."""
    own, out = Adapted(tmp_path / "a", **options), tmp_path / "x.gguf"
    conversion = own.plan("q8_0")
    export_gguf(conversion, out)
    chain = own.check(conversion, out)
    assert chain.problems() == []
    assert chain.spelling == Spelling(6, 6, None)
    assert len(chain.links) == 5


def test_rows_in_the_wrong_order(
    adapted: Adapted, sound: tuple[Conversion, Path], tmp_path: Path
) -> None:
    conversion, path = sound
    placed = next(p for p in conversion.layout.placed if p.name == Q0)
    assert placed.order is not None
    unordered = torch.empty(placed.shape)
    unordered[placed.order] = whole(path, Q0)
    bad = changed(path, tmp_path / "x.gguf", {Q0: unordered})
    found = adapted.check(conversion, bad)
    assert blamed(found) == FILE | {"f32"} | LLAMA
    assert f"the weights of {Q0} are not those it was made of: 1.4" in found.problems()[0]
    assert len(found.misplaced) == 1


@needs_llama_cpp
@pytest.mark.parametrize("kind", ["f32", "q4_k_m"])
def test_a_layout_that_is_wrong_there_and_back(kind: str, adapted: Adapted, tmp_path: Path) -> None:
    """What our reader undoes as it was done, llama.cpp shows; whatever the type may lose."""
    sound = adapted.plan(kind)
    placed = tuple(replace(p, order=None) for p in sound.layout.placed)
    wrong = replace(sound, layout=replace(sound.layout, placed=placed))
    export_gguf(wrong, tmp_path / "x.gguf")
    found = adapted.check(wrong, tmp_path / "x.gguf")
    assert blamed(found) == LLAMA | {"beside our own reading"}
    assert found.reading is not None
    assert found.reading.found.kl_mean > 0.1
    assert adapted.check(wrong, tmp_path / "x.gguf", llama_cpp=False).problems() == []


@pytest.mark.parametrize("kind", ["f32", "q4_k_m"])
@pytest.mark.parametrize("layers", [(0, 1), (1, 2)])
def test_two_layers_swapped(
    layers: tuple[int, int], kind: str, adapted: Adapted, tmp_path: Path
) -> None:
    """Even where it costs less than the rounding of a coarse type may cost."""
    conversion = adapted.plan(kind)
    export_gguf(conversion, tmp_path / "x.gguf")
    file, (one, two) = open_gguf(tmp_path / "x.gguf"), layers
    names = {}
    for name in file.tensors:
        if name.startswith(f"blk.{one}."):
            other = name.replace(f"blk.{one}.", f"blk.{two}.")
            names |= {name: other, other: name}
    bad = changed(file.path, tmp_path / "bad.gguf", names=names)
    found = adapted.check(conversion, bad, llama_cpp=False)
    assert FILE <= blamed(found) <= FILE | {kind}
    assert f"the weights of blk.{one}.attn_" in found.problems()[0]
    assert found.misplaced[-1] == "and 14 tensors more"
    if layers == (0, 1):
        assert kind in blamed(found)


def test_two_matrices_swapped(adapted: Adapted, tmp_path: Path) -> None:
    conversion = adapted.plan("q2_k")
    export_gguf(conversion, tmp_path / "x.gguf")
    one, two = "blk.1.attn_q.weight", "blk.2.attn_q.weight"
    bad = changed(tmp_path / "x.gguf", tmp_path / "bad.gguf", names={one: two, two: one})
    found = adapted.check(conversion, bad, llama_cpp=False)
    assert blamed(found) >= FILE
    assert len(found.misplaced) == 2


def test_gemmas_norms_without_one(tmp_path: Path) -> None:
    sizes = {"vocab_size": 1024, "hidden_size": 64, "intermediate_size": 96, "head_dim": 32}
    more = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    base = random_folder(tmp_path / "base", GemmaConfig(**sizes, **more), STARTER)
    own, out = Adapted(tmp_path / "a", base), tmp_path / "x.gguf"
    conversion = own.plan("f32")
    export_gguf(conversion, out)
    assert own.check(conversion, out).problems() == []
    norms = {p.name: whole(out, p.name) - 1 for p in conversion.layout.placed if p.added}
    assert len(norms) == 5
    bad = changed(out, tmp_path / "bad.gguf", norms)
    links = FILE | {"f32"} | LLAMA
    assert blamed(own.check(conversion, bad)) == links
    one = {"blk.1.ffn_norm.weight": norms["blk.1.ffn_norm.weight"]}
    bad = changed(out, tmp_path / "bad.gguf", one)
    assert blamed(own.check(conversion, bad)) == links


def test_the_base_without_its_adapter(adapted: Adapted, tmp_path: Path) -> None:
    forgotten = adapted.plan("q8_0", adapter=None, tokenizer=None)
    export_gguf(forgotten, tmp_path / "x.gguf")
    found = adapted.check(forgotten, tmp_path / "x.gguf")
    assert blamed(found) == {"merged", "f16", "q8_0"} | LLAMA


def test_another_adapter(adapted: Adapted, sound: tuple[Conversion, Path], tmp_path: Path) -> None:
    """The file alone is of another: the links before it hold."""
    first = next(iter(adapted.adapter.updates))
    updates = dict(adapted.adapter.updates)
    updates[first] = replace(updates[first], B=-updates[first].B)
    other = adapted.plan("f32", adapter=replace(adapted.adapter, updates=updates))
    export_gguf(other, tmp_path / "x.gguf")
    found = adapted.check(sound[0], tmp_path / "x.gguf")
    assert blamed(found) == FILE | {"f32"} | LLAMA
    assert len(found.misplaced) == 1


def test_a_file_of_another_model(
    adapted: Adapted, sound: tuple[Conversion, Path], shared: Callable[[str], Path], tmp_path: Path
) -> None:
    out = tmp_path / "x.gguf"
    exported(shared("models/stories260k"), "f32", out)
    with pytest.raises(ModelError, match="is not the file of this model") as caught:
        adapted.check(sound[0], out, llama_cpp=False)
    assert "token_embd.weight is [512, 64]; expected [1024, 256]" in str(caught.value)


def test_a_file_that_lacks_a_tensor(
    adapted: Adapted, sound: tuple[Conversion, Path], tmp_path: Path
) -> None:
    file = open_gguf(sound[1])
    stored = {
        name: Stored(info.type, info.shape, partial(file.raw, name))
        for name, info in file.tensors.items()
        if name != Q0
    }
    write_gguf(tmp_path / "x.gguf", file.metadata, stored)
    with pytest.raises(ModelError, match=f"{Q0} is missing"):
        adapted.check(sound[0], tmp_path / "x.gguf", llama_cpp=False)


def test_a_file_that_was_cut_off(
    adapted: Adapted, sound: tuple[Conversion, Path], tmp_path: Path
) -> None:
    bad = tmp_path / "x.gguf"
    bad.write_bytes(sound[1].read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"x\.gguf"):
        adapted.check(sound[0], bad)


@pytest.mark.parametrize("garbage", [b"\xff", b"\x00"])
def test_a_garbled_block(garbage: bytes, adapted: Adapted, tmp_path: Path) -> None:
    """Some hundred bytes of one tensor of 655 thousand weights' worth."""
    out = tmp_path / "x.gguf"
    conversion = adapted.plan("q8_0")
    export_gguf(conversion, out)
    info = open_gguf(out).tensors["blk.2.ffn_down.weight"]
    data = bytearray(out.read_bytes())
    at = info.begin + info.size // 2
    data[at : at + 34 * 64] = garbage * (34 * 64)
    out.write_bytes(data)
    found = adapted.check(conversion, out, llama_cpp=False)
    assert blamed(found) >= FILE
    assert "the weights of blk.2.ffn_down.weight are not" in found.problems()[0]


@needs_llama_cpp
def test_another_start_of_conversations(
    adapted: Adapted, sound: tuple[Conversion, Path], tmp_path: Path
) -> None:
    """BOS where the training had none; one that the template writes is not doubled by servers."""
    key = "tokenizer.ggml.add_bos_token"
    adds = changed(sound[1], tmp_path / "x.gguf", metadata={key: Field("bool", True)})
    assert adapted.check(sound[0], adds).spelling == Spelling(6, 6, None)
    plain = Renderer(adapted.renderer.tokenizer, template="instruction-response")
    found = adapted.check(sound[0], adds, renderer=plain)
    assert found.spelling is not None
    assert found.spelling.equal == 0
    problem = found.problems()[-1]
    assert "6 of 6 rendered conversations have other token ids in llama.cpp" in problem
    assert "at token 0, llama.cpp" in problem


@needs_llama_cpp
def test_an_answer_that_does_not_end(
    adapted: Adapted, sound: tuple[Conversion, Path], tmp_path: Path
) -> None:
    """Because its token has a name that llama.cpp does not know, and no key says so."""
    assert adapted.check(*sound).endless == ()
    key = "tokenizer.ggml.tokens"
    tokens = list(open_gguf(sound[1]).metadata[key].value)
    tokens[2] = "<|done|>"
    moved = {f"tokenizer.ggml.{name}_token_id": Field("u32", 0) for name in ("eos", "eot")}
    bad = changed(sound[1], tmp_path / "x.gguf", metadata={key: Field("str", tokens), **moved})
    found = adapted.check(sound[0], bad)
    assert found.endless == ("<|im_end|>",)
    assert "llama.cpp goes on after <|im_end|>" in found.problems()[0]


@needs_llama_cpp
def test_another_vocabulary(
    adapted: Adapted, sound: tuple[Conversion, Path], tmp_path: Path
) -> None:
    """Two tokens that have changed their places."""
    key = "tokenizer.ggml.tokens"
    field = open_gguf(sound[1]).metadata[key]
    tokens = list(field.value)
    ids = adapted.material().texts[0][1]
    a, b = sorted(set(ids))[-2:]
    tokens[a], tokens[b] = tokens[b], tokens[a]
    bad = changed(sound[1], tmp_path / "x.gguf", metadata={key: Field("str", tokens)})
    found = adapted.check(sound[0], bad)
    assert found.spelling is not None
    assert found.spelling.equal < 6
    assert "the tokenizer gives" in found.problems()[-1]


def test_a_tolerance_of_ones_own(adapted: Adapted, tmp_path: Path) -> None:
    out = tmp_path / "x.gguf"
    conversion = adapted.plan("q4_0")
    export_gguf(conversion, out)
    assert adapted.check(conversion, out, llama_cpp=False).problems() == []
    strict = adapted.check(conversion, out, llama_cpp=False, kl=1e-12)
    assert blamed(strict) == {"q4_0"}
    assert "at most 1e-12 is allowed" in strict.problems()[0]

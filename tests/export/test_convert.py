"""Folders as GGUF files: the folded weights exactly, what adapters do, and nothing by halves."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from exporting import exported, random_folder, random_ids, reread, spread, weights_in
from exporting import texts_of as said
from random_models import logits_of
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GemmaConfig, GPT2Config, LlamaConfig, PretrainedConfig, Qwen2Config

from lorikeet import starter
from lorikeet.adapters import Adapter, Update, read_adapter, save_adapter
from lorikeet.adapters.merge import merge
from lorikeet.adapters.safe import Content, write_safe
from lorikeet.config import LoraConfig
from lorikeet.data import Example
from lorikeet.errors import AdapterError, ModelError, StorageError
from lorikeet.export.convert import Conversion, export_gguf
from lorikeet.export.importance import Importance, measure_importance
from lorikeet.export.llama_cpp import LlamaCpp, find
from lorikeet.gguf.read import open_gguf
from lorikeet.lora import grow_vocabulary, inject
from lorikeet.model import load_model, load_tokenizer

needs_llama_cpp = pytest.mark.skipif(find() is None, reason="needs xllamacpp or llama-cpp-python")

SIZES: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
FAMILIES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=False),
    "llama tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "gemma": GemmaConfig(**SIZES, head_dim=32),
}
NEW = ["<tool>", "blorptastic"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    "every linear layer": ("llama", {"target_modules": "all-linear"}),
    "rank-stabilised": ("qwen2", {"target_modules": "all-linear", "rslora": True}),
    "DoRA": ("llama", {"target_modules": "all-linear", "dora": True}),
    "DoRA, gemma": ("gemma", {"target_modules": ["q_proj", "o_proj"], "dora": True}),
    "tied embedding": ("llama tied", {"target_modules": ["q_proj", "embed_tokens"]}),
    "tied head": ("qwen2", {"target_modules": ["q_proj", "lm_head"]}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "k_proj"]}),
    "whole head": ("llama tied", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "new tokens": ("llama", {"target_modules": ["q_proj"], "new_tokens": NEW}),
    "new tokens, tied": ("llama tied", {"target_modules": ["k_proj"], "new_tokens": NEW}),
    "new tokens, gemma": ("gemma", {"target_modules": ["q_proj"], "new_tokens": NEW}),
}

Bases = Callable[[str], Path]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    """The folder of a family: random weights in bf16, the embedded model's tokenizer."""
    made: dict[str, Path] = {}

    def of(family: str) -> Path:
        if family not in made:
            folder = tmp_path_factory.mktemp("base") / "model"
            made[family] = random_folder(folder, FAMILIES[family], starter.folder())
            edit(folder, lambda state: {name: t.bfloat16() for name, t in state.items()})
        return made[family]

    return of


def edit(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    path = folder / "model.safetensors"
    state = change({name: t.clone() for name, t in load_file(path).items()})
    path.unlink()
    save_file(state, path, metadata={"format": "pt"})


def copied(folder: Path, to: Path) -> Path:
    to.mkdir()
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


def train(base: Path, folder: Path, **options: Any) -> Any:
    """A random adapter in a folder; the model that carries it, and its tokenizer."""
    loaded = load_model(base, dtype="fp32", fast="off")
    new = options.get("new_tokens")
    if new:
        grow_vocabulary(loaded.model, loaded.tokenizer, new)
    config = LoraConfig(r=4, alpha=8.0, **options)
    inject(loaded.model, config, seed=0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.1 * noise)
    save_adapter(
        loaded.model,
        folder,
        config=config,
        base_model=str(base),
        provenance={},
        tokenizer=loaded.tokenizer if new else None,
    )
    return loaded.model.eval(), loaded.tokenizer


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: t.float() for name, t in load_file(folder / "model.safetensors").items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_is_the_weights_themselves(family: str, bases: Bases, tmp_path: Path) -> None:
    base = bases(family)
    conversion = exported(base, "f32", tmp_path / "x.gguf")
    found = dict(weights_in(conversion, open_gguf(tmp_path / "x.gguf")))
    expected = weights(base)
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        # Gemma's norms are stored with 1 added, in float32.
        most = 1e-6 if family == "gemma" and name.endswith("norm.weight") else 0
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=most)


@pytest.mark.parametrize(("kind", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_half_precision_is_rounded_once(
    kind: str, dtype: torch.dtype, bases: Bases, tmp_path: Path
) -> None:
    """Matrices are; norms stay in float32."""
    adapter = random_adapter()
    conversion = exported(bases("llama"), kind, tmp_path / "x.gguf", adapter=adapter)
    file = open_gguf(tmp_path / "x.gguf")
    found = dict(weights_in(conversion, file))
    for name, tensor in weights(bases("llama")).items():
        update = adapter.updates.get(name.removesuffix(".weight"))
        exact = update.applied(tensor) if update else tensor
        assert torch.equal(found[name], exact.to(dtype).float() if exact.ndim > 1 else exact)
    types = {name: info.type for name, info in file.tensors.items()}
    assert types["blk.0.attn_q.weight"] == kind.upper()
    assert types["blk.0.attn_norm.weight"] == types["output_norm.weight"] == "F32"


def random_adapter(*, scale: float = 2.0) -> Adapter:
    """Of q_proj, whose rows move, and down_proj."""
    torch.manual_seed(4)
    sizes = {"self_attn.q_proj": (64, 64), "mlp.down_proj": (64, 96)}
    return Adapter(
        {
            f"model.layers.{layer}.{leaf}": Update(
                torch.randn(4, fan_in) * 0.1, torch.randn(out, 4) * 0.1, scale
            )
            for layer in range(2)
            for leaf, (out, fan_in) in sizes.items()
        }
    )


def test_the_sum_of_base_and_adapter_is_not_rounded(bases: Bases, tmp_path: Path) -> None:
    """A merged folder has the base's type; the file has the sum itself."""
    adapter = random_adapter()
    merge(bases("llama"), adapter, tmp_path / "merged")
    conversion = exported(bases("llama"), "f32", tmp_path / "x.gguf", adapter=adapter)
    found = dict(weights_in(conversion, open_gguf(tmp_path / "x.gguf")))
    rounded = load_file(tmp_path / "merged" / "model.safetensors")
    assert set(found) == set(rounded)
    base = weights(bases("llama"))
    for name, tensor in found.items():
        assert torch.equal(tensor.to(rounded[name].dtype), rounded[name])
        update = adapter.updates.get(name.removesuffix(".weight"))
        assert torch.equal(tensor, update.applied(base[name]) if update else base[name])
        assert torch.equal(tensor, rounded[name].float()) == (update is None)


@needs_llama_cpp
@pytest.mark.parametrize("case", CASES)
def test_adapters_in_llama_cpp(case: str, bases: Bases, tmp_path: Path) -> None:
    """What llama.cpp computes is what the model computes that carries the adapter."""
    family, options = CASES[case]
    model, tokenizer = train(bases(family), tmp_path / "adapter", **options)
    adapter, out = read_adapter(tmp_path / "adapter"), tmp_path / "x.gguf"
    folder = {"tokenizer": tmp_path / "adapter"} if "new_tokens" in options else {}
    conversion = exported(bases(family), "f32", out, adapter=adapter, **folder)
    new = tokenizer.convert_tokens_to_ids(NEW) if "new_tokens" in options else []
    ids = [*random_ids(20, below=1000), *new, *random_ids(9, below=1000, seed=1)]
    expected = logits_of(model, ids)
    with LlamaCpp(out, context=64, threads=1) as llama:
        found = llama.logits(ids)
        spelled = [llama.tokenize(t, add_special=True, parse_special=True) for t in sentences(new)]
    assert spread(found, expected) < (1e-3 if family == "gemma" else 1e-5)
    assert spread(logits_of(reread(conversion, out), ids), expected) < 1e-5
    base = load_model(bases(family), dtype="fp32", fast="off").model
    plain = logits_of(base, random_ids(20, below=1000))
    assert spread(expected[:20, :1024], plain) > 0.02  # the adapter does something
    assert spelled == [tokenizer(text)["input_ids"] for text in sentences(new)]
    if new:
        assert found.shape == (len(ids), 1026)
        assert new == [1024, 1025]
        assert new[0] in spelled[0]
        assert new[1] in spelled[1]


def sentences(new: list[int]) -> list[str]:
    return ["Call <tool> now.", "How blorptastic it is!", "a<tool><tool>"] if new else []


def test_a_tied_weight_that_an_adapter_unties(bases: Bases, tmp_path: Path) -> None:
    base = bases("llama tied")
    train(base, tmp_path / "adapter", target_modules=["embed_tokens"])
    out = tmp_path / "x.gguf"
    exported(base, "f32", out, adapter=read_adapter(tmp_path / "adapter"))
    file, own = open_gguf(out), weights(base)["model.embed_tokens.weight"]
    assert torch.equal(file.rows("output.weight", 0, 1024), own)
    assert not torch.allclose(file.rows("token_embd.weight", 0, 1024), own)
    exported(base, "f32", out)
    assert "output.weight" not in open_gguf(out).tensors


def test_new_tokens_are_in_the_files_vocabulary(bases: Bases, tmp_path: Path) -> None:
    train(bases("llama"), tmp_path / "adapter", target_modules=["q_proj"], new_tokens=NEW)
    adapter, out = read_adapter(tmp_path / "adapter"), tmp_path / "x.gguf"
    exported(bases("llama"), "q8_0", out, adapter=adapter, tokenizer=tmp_path / "adapter")
    found = said(out)
    assert list(found["tokenizer.ggml.tokens"][1024:]) == NEW
    assert found["llama.vocab_size"] == 1026
    assert open_gguf(out).tensors["token_embd.weight"].shape == (1026, 64)
    with pytest.raises(AdapterError, match="the folder with its tokenizer is needed"):
        Conversion.plan(bases("llama"), "q8_0", adapter=adapter)
    with pytest.raises(AdapterError):  # a tokenizer that does not know them
        Conversion.plan(bases("llama"), "q8_0", adapter=adapter, tokenizer=bases("llama"))


def importance() -> Importance:
    base = load_model(starter.folder(), dtype="fp32", fast="off")
    ids = random_ids(300, below=1000)
    supervised = tuple(i > 0 for i in range(300))
    return measure_importance(
        base.model, [Example(tuple(ids), supervised, 300, "x")], source="words.txt"
    )


def test_calibration_moves_bytes_where_the_format_searches(tmp_path: Path) -> None:
    """The errors of K-quants, weighed by importance, go down; Q8_0 has no use for it."""
    columns = importance()
    plain, calibrated = tmp_path / "plain.gguf", tmp_path / "calibrated.gguf"
    fewer = 0
    for kind in ("q4_k_s", "q2_k", "q5_0", "q8_0"):
        conversion = exported(starter.folder(), kind, plain)
        exported(starter.folder(), kind, calibrated, importance=columns)
        files = open_gguf(plain), open_gguf(calibrated)
        for placed in conversion.layout.placed:
            types = {file.tensors[placed.name].type for file in files}
            own = columns.of(placed.source)
            before, after = (b"".join(file.raw(placed.name)) for file in files)
            if len(types) > 1:
                continue  # with a matrix the mixture is another
            if own is None or types & {"Q8_0", "F32"}:
                assert before == after, placed.name
                continue
            assert before != after, placed.name
            exact = torch.cat(list(conversion.rows(placed)))
            errors = [
                float(((f.rows(placed.name, 0, len(exact)) - exact).square() * own).sum())
                for f in files
            ]
            assert errors[1] < errors[0], (kind, placed.name)
            fewer += 1
    assert fewer > 60
    assert said(calibrated)["quantize.imatrix.chunks_count"] == 1
    assert said(calibrated)["quantize.imatrix.entries_count"] == 28
    assert "quantize.imatrix.file" not in said(plain)


@pytest.mark.parametrize(("kind", "number"), [("f32", 0), ("f16", 1), ("q4_k_m", 15), ("q2_k", 10)])
def test_what_the_file_says_of_itself(kind: str, number: int, bases: Bases, tmp_path: Path) -> None:
    """The numbers are llama.cpp's own, of the kinds in its `llama_ftype`."""
    out = tmp_path / "x.gguf"
    conversion = exported(bases("llama"), kind, out)
    found = said(out)
    assert found["general.file_type"] == number
    assert found["general.quantization_version"] == 2
    assert found["general.architecture"] == "llama"
    tokenizer = load_tokenizer(bases("llama"))
    assert found["tokenizer.chat_template"] == tokenizer.chat_template
    assert found["tokenizer.ggml.bos_token_id"] == tokenizer.bos_token_id
    assert len(found["tokenizer.ggml.tokens"]) == 1024
    assert [*open_gguf(out).tensors] == [*conversion.types.types]


def test_a_report_of_what_was_written(bases: Bases, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    out = tmp_path / "x.gguf"
    conversion = Conversion.plan(bases("llama"), "q4_k_m")
    found = export_gguf(conversion, out, progress=lambda *at: told.append(at))
    state = weights(bases("llama"))
    assert found.weights == sum(t.numel() for t in state.values())
    assert told[-1] == (found.weights, found.weights)
    assert len(told) == len(state)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert found.size == out.stat().st_size
    assert sum(found.types.values()) == len(state)
    assert set(found.fallbacks.values()) <= {("Q5_0", "Q4_K"), ("Q8_0", "Q6_K")}
    assert found.fallbacks["blk.0.attn_q.weight"] == ("Q5_0", "Q4_K")  # rows of 64
    json.dumps(found.summary())


def test_an_export_twice_is_the_same_bytes(bases: Bases, tmp_path: Path) -> None:
    for name in ("a", "b"):
        exported(bases("llama"), "q4_k_m", tmp_path / name, adapter=random_adapter())
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, OSError(28, "No space left")])
def test_an_interruption_leaves_the_earlier_file(error: Any, bases: Bases, tmp_path: Path) -> None:
    out = tmp_path / "x.gguf"
    exported(bases("llama"), "q8_0", out)
    before = out.read_bytes()
    seen = 0

    def stop(done: int, total: int) -> None:
        nonlocal seen
        seen = done
        if done > total / 2:
            raise error

    raised = StorageError if isinstance(error, OSError) else error
    with pytest.raises(raised):
        export_gguf(Conversion.plan(bases("llama"), "f32"), out, progress=stop)
    assert seen
    assert out.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["x.gguf"]


FULL = """
import resource, sys
from pathlib import Path
from lorikeet.export.convert import Conversion, export_gguf
base, out = map(Path, sys.argv[1:])
conversion = Conversion.plan(base, "f32")
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
export_gguf(conversion, out)
"""


def test_a_full_disk(bases: Bases, tmp_path: Path) -> None:
    """A bound on the size of files stands for it."""
    out = tmp_path / "x.gguf"
    out.write_text("earlier")
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(bases("llama")), str(out)], capture_output=True, text=True
    )
    assert "lorikeet.errors.StorageError: cannot write" in done.stderr
    assert "free some space" in done.stderr
    assert out.read_text() == "earlier"
    assert [path.name for path in tmp_path.iterdir()] == ["x.gguf"]


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0", "q4_0", "q4_k_m"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers(kind: str, value: float, bases: Bases, tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    base = copied(bases("llama"), tmp_path / "base")

    def damage(state: dict[str, Tensor]) -> dict[str, Tensor]:
        state[name][5, 7] = value
        return state

    edit(base, damage)
    with pytest.raises(ModelError) as caught:
        exported(base, kind, tmp_path / "x.gguf")
    message = str(caught.value)
    assert f"{name} cannot be stored as" in message
    assert f"row 5, column 7 is {value}" in message  # of the checkpoint's, not of the file's
    assert "training diverged" in message
    assert not (tmp_path / "x.gguf").exists()


def test_a_norm_that_is_no_number(bases: Bases, tmp_path: Path) -> None:
    """One that stays in float32, of a model whose other tensors are quantised."""
    base = copied(bases("gemma"), tmp_path / "base")
    bad = {"model.norm.weight": torch.full((64,), torch.nan)}
    edit(base, lambda state: state | bad)
    with pytest.raises(ModelError, match=r"model\.norm\.weight cannot be stored as F32"):
        exported(base, "q4_0", tmp_path / "x.gguf")


def test_weights_too_large_for_half_precision(bases: Bases, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    base = copied(bases("llama"), tmp_path / "base")

    def enlarge(state: dict[str, Tensor]) -> dict[str, Tensor]:
        state[name][3, 3] = 2**20
        return state

    edit(base, enlarge)
    with pytest.raises(ModelError) as caught:
        exported(base, "f16", tmp_path / "x.gguf")
    assert f"{name} cannot be stored as F16: weights as large as 1.05e+06" in str(caught.value)
    assert "bf16" in str(caught.value)
    exported(base, "bf16", tmp_path / "x.gguf")


def test_an_adapter_that_is_no_number(bases: Bases, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.layers\.0\.self_attn\.q_proj\.weight cannot"):
        exported(
            bases("llama"), "q8_0", tmp_path / "x.gguf", adapter=random_adapter(scale=float("nan"))
        )


@pytest.mark.parametrize("changes", [{"model_type": "gpt2"}, {"num_local_experts": 4}])
def test_architectures_that_are_refused(
    changes: dict[str, Any], bases: Bases, tmp_path: Path
) -> None:
    base = copied(bases("llama"), tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ModelError, match="cannot be exported to GGUF"):
        exported(base, "q8_0", tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()


def test_a_real_gpt2_is_refused(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=1024, n_embd=32, n_layer=1, n_head=2, n_positions=64)
    base = random_folder(tmp_path / "base", config, starter.folder(), decisive=False)
    with pytest.raises(ModelError, match="'gpt2' cannot be exported to GGUF: supported are llama"):
        exported(base, "q8_0", tmp_path / "x.gguf")


def test_a_vocabulary_of_another_size(bases: Bases, tmp_path: Path) -> None:
    """More tokens than rows: refused before anything is written."""
    base = copied(bases("llama"), tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"vocab_size": 1000}))
    names = ("model.embed_tokens.weight", "lm_head.weight")
    edit(base, lambda state: state | {name: state[name][:1000].clone() for name in names})
    with pytest.raises(ModelError, match="1000"):
        exported(base, "q8_0", tmp_path / "x.gguf")


CHILD = """
import json, resource, sys, time
from pathlib import Path
from lorikeet.export.convert import Conversion, export_gguf
base, out = map(Path, sys.argv[1:])
begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
started = time.monotonic()
found = export_gguf(Conversion.plan(base, "q4_k_m"), out)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"begin": begin * 1024, "peak": peak * 1024, "seconds": found.seconds,
                  "all": time.monotonic() - started, "types": dict(found.types)}))
"""


@pytest.mark.slow
def test_memory_stays_near_the_largest_tensor(
    shared: Callable[[str], Path], tmp_path: Path
) -> None:
    """TinyLlama's 1.1 billion weights to q4_k_m in less than 2 GB, the process itself included."""
    base = copied(shared("shapes/tinyllama-1.1b-chat"), tmp_path / "base")
    largest = write_random_weights(base)
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(base), str(tmp_path / "x.gguf")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print(found, "largest tensor in float32:", largest)
    assert found["peak"] < 2e9
    assert found["peak"] - found["begin"] < largest + 300e6


def write_random_weights(base: Path) -> int:
    """The folder's weights in bf16, drawn tensor by tensor; bytes of the largest in float32."""
    config = json.loads((base / "config.json").read_text())
    shapes = llama_shapes(config)
    generator = torch.Generator().manual_seed(0)

    def drawn(shape: tuple[int, ...]) -> Iterator[Tensor]:
        for part in torch.empty(shape[0]).split(4096):
            rows = torch.empty(len(part), *shape[1:])
            yield rows.normal_(std=0.02, generator=generator).bfloat16()

    contents = {
        name: Content("BF16", shape, partial(drawn, shape)) for name, shape in shapes.items()
    }
    write_safe(base / "model.safetensors", contents, metadata={"format": "pt"})
    return max(4 * math.prod(shape) for shape in shapes.values())


def llama_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    width, inner = config["hidden_size"], config["intermediate_size"]
    values = width // config["num_attention_heads"] * config["num_key_value_heads"]
    block = {
        "input_layernorm": (width,),
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (values, width),
        "self_attn.v_proj": (values, width),
        "self_attn.o_proj": (width, width),
        "post_attention_layernorm": (width,),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }
    found: dict[str, tuple[int, ...]] = {
        f"model.layers.{layer}.{name}.weight": shape
        for layer in range(config["num_hidden_layers"])
        for name, shape in block.items()
    }
    table = (config["vocab_size"], width)
    found |= {"model.embed_tokens.weight": table, "model.norm.weight": (width,)}
    return found | ({} if config["tie_word_embeddings"] else {"lm_head.weight": table})

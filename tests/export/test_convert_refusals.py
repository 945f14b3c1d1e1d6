"""What cannot be exported, and what stays when an export does not end; memory on the way."""

from __future__ import annotations

import json
import math
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from exporting import copied, edit, exported, random_adapter, random_folder
from torch import Tensor
from transformers import GPT2Config

from lorikeet import starter
from lorikeet.adapters.safe import Content, write_safe
from lorikeet.errors import ModelError, StorageError
from lorikeet.export.convert import Conversion, export_gguf

Bases = Callable[[str], Path]


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


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Within the block no file can grow beyond this size."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk(bases: Bases, tmp_path: Path) -> None:
    """A bound on the size of files stands for it."""
    out = tmp_path / "x.gguf"
    out.write_text("earlier")
    conversion = Conversion.plan(bases("llama"), "f32")
    with largest_file(300_000), pytest.raises(StorageError, match="cannot write") as caught:
        export_gguf(conversion, out)
    assert "free some space" in str(caught.value)
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


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_numbers_that_need_a_scale(dtype: torch.dtype, bases: Bases, tmp_path: Path) -> None:
    """Stored so without a word in config.json, they would be taken as they are."""
    base = copied(bases("llama"), tmp_path / "base")

    def quantise(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {n: t.to(dtype) if n.endswith("q_proj.weight") else t for n, t in state.items()}

    edit(base, quantise)
    with pytest.raises(ModelError, match="of a quantised model take the original") as caught:
        exported(base, "q8_0", tmp_path / "x.gguf")
    assert "model.layers.0.self_attn.q_proj.weight is " in str(caught.value)


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


def test_a_folder_without_a_tokenizer(bases: Bases, tmp_path: Path) -> None:
    base = copied(bases("llama"), tmp_path / "base")
    (base / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=f"{base} has no tokenizer"):
        Conversion.plan(base, "q8_0")


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

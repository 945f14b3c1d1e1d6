"""Merging into a folder: which files, what is refused, and nothing by halves."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lorikeet.adapters import Adapter, Update, write_adapter
from lorikeet.adapters.adapter import Tokens
from lorikeet.adapters.merge import merge
from lorikeet.adapters.safe import Content, open_safe, write_safe
from lorikeet.errors import AdapterError, ConfigError, ModelError, StorageError

Tiny = Callable[[str], PreTrainedModel]


def save_base(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(str(folder))
    (folder / "tokenizer.json").write_text('{"made": "up"}')
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in load_file(folder / "model.safetensors").items()}


@pytest.fixture
def base(tiny: Tiny, tmp_path: Path) -> Path:
    return save_base(tiny("llama"), tmp_path / "base")


@pytest.fixture
def adapter(tmp_path: Path) -> Adapter:
    """Of q_proj and down_proj in every block; also in the folder `adapter`."""
    sizes = {"self_attn.q_proj": (16, 16), "mlp.down_proj": (16, 24)}
    updates = {
        f"model.layers.{block}.{leaf}": Update(torch.randn(4, fan_in), torch.randn(out, 4), 2.0)
        for block in range(3)
        for leaf, (out, fan_in) in sizes.items()
    }
    adapter = Adapter(updates, base_model="tiny", provenance={"a": "é"})
    write_adapter(adapter, tmp_path / "adapter")
    return adapter


def test_untouched_tensors_keep_their_bytes(base: Path, adapter: Adapter, tmp_path: Path) -> None:
    """Also those that torch could not have read: nothing is decoded to be copied."""
    contents = {
        name: Content("F32", tuple(t.shape), lambda t=t: [t]) for name, t in weights(base).items()
    }
    contents["odd"] = Content("F4", (4,), lambda: [b"\x12\x34"])
    contents["nan"] = Content("F32", (1,), lambda: [b"\x01\x00\xa0\x7f"])  # a signalling NaN
    write_safe(base / "model.safetensors", contents, metadata={})
    merge(base, adapter, tmp_path / "out")
    before, after = (open_safe(p / "model.safetensors") for p in (base, tmp_path / "out"))
    assert list(before.entries) == list(after.entries)
    changed = {name for name in before.entries if [*before.raw(name)] != [*after.raw(name)]}
    assert changed == {f"{module}.weight" for module in adapter.updates}


def test_the_other_files(base: Path, adapter: Adapter, tmp_path: Path) -> None:
    for name in (
        "README.md chat_template.jinja tokenizer.model vocab.txt LICENSE modeling_x.py a.gguf"
        " b.onnx c.bin training_args.bin adapter_config.json pytorch_model.bin.index.json"
    ).split():
        (base / name).write_text(name)
    (base / "onnx").mkdir()
    (base / "onnx" / "config.json").write_text("{}")
    merge(base, adapter, tmp_path / "out")
    found = {path.name for path in (tmp_path / "out").iterdir()}
    copied = set(
        "chat_template.jinja tokenizer.model vocab.txt LICENSE modeling_x.py tokenizer.json"
        " generation_config.json config.json".split()
    )
    assert found == copied | {"model.safetensors", "lorikeet.json"}
    assert all((tmp_path / "out" / n).read_bytes() == (base / n).read_bytes() for n in copied)
    note = json.loads((tmp_path / "out" / "lorikeet.json").read_text(encoding="utf-8"))
    assert note["base"] == str(base)
    assert note["adapter"] == {"base_model": "tiny", "provenance": {"a": "é"}}
    assert note["versions"]["torch"] == torch.__version__


def refused(base: Path, adapter: Adapter, out: Path) -> str:
    with pytest.raises(AdapterError) as caught:
        merge(base, adapter, out)
    assert not out.exists()
    assert not list(out.parent.glob(".*"))
    return str(caught.value)


def test_every_misfit_is_listed(base: Path, adapter: Adapter, tmp_path: Path) -> None:
    state = weights(base)
    names = sorted(adapter.updates)
    state[f"{names[0]}.weight"] = torch.zeros(4, 4)
    state[f"{names[1]}.weight"] = torch.zeros(16, 24, dtype=torch.int8)
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    stranger = Update(torch.zeros(2, 16), torch.zeros(16, 2), 1.0)
    updates = {**adapter.updates, "model.layers.7.mlp.up_proj": stranger}
    copies = {"model.embed_tokens.weight": torch.zeros(48, 16), "x.y.weight": torch.zeros(1)}
    message = refused(base, replace(adapter, updates=updates, copies=copies), tmp_path / "out")
    for part in (
        f"misshapen (1): {names[0]}.weight is [4, 4], the adapter fits [16, 24]",
        f"not a plain floating-point weight (quantised?) (1): {names[1]}.weight is I8",
        "the base has no such weight (2): model.layers.7.mlp.up_proj.weight, x.y.weight",
        "base weights that differ from the model's (resized or retrained?) (1): model.embed",
    ):
        assert part in message, message


def test_what_was_trained_whole_must_fit_too(base: Path, adapter: Adapter, tmp_path: Path) -> None:
    name = sorted(adapter.updates)[0]
    whole = {
        "model.norm.weight": torch.ones(15),
        "lm_head.bias": torch.ones(48),
        f"{name}.weight": torch.zeros(16, 24),
    }
    message = refused(base, replace(adapter, whole=whole), tmp_path / "out")
    assert "misshapen (1): model.norm.weight is [16], the adapter fits [15]" in message
    assert "the base has no such weight (1): lm_head.bias" in message
    assert f"adapted twice (1): {name}.weight" in message
    far = {"model.norm.weight": torch.full((16,), torch.inf)}
    message = refused(base, replace(adapter, whole=far), tmp_path / "out")
    assert "the merged model.norm.weight has values that are not finite" in message


def test_rows_that_do_not_fit(tiny: Tiny, base: Path, adapter: Adapter, tmp_path: Path) -> None:
    def message(base: Path, adapter: Adapter, **tokens: object) -> str:
        own = Tokens(**{"module": "model.embed_tokens", "ids": (1, 2), **tokens})  # type: ignore[arg-type]
        return refused(base, replace(adapter, tokens=(own,)), tmp_path / "out")

    rows = torch.ones(2, 16)
    assert "misshapen (1): model.embed_tokens.weight is [48, 16], the adapter has rows [2, 15]" in (
        message(base, adapter, rows=torch.ones(2, 15))
    )
    assert "does not have (1): lm_head.weight: 48" in message(base, adapter, rows=rows, ids=(1, 48))
    assert "has rows [2, 16] of 1 tokens" in message(base, adapter, rows=rows, ids=(2,))
    assert "no such weight (1): x.weight" in message(base, adapter, rows=rows, module="x")
    head = Update(torch.ones(1, 16), torch.ones(48, 1), 1.0)
    tied = save_base(tiny("llama-tied"), tmp_path / "tied")
    found = message(tied, Adapter({"lm_head": head}), rows=rows)
    assert "single tokens beside another change of their weight (1): model.embed_tokens" in found
    whole = {"model.embed_tokens.weight": torch.ones(48, 16)}
    assert "single tokens beside" in message(base, replace(adapter, whole=whole), rows=rows)
    other = replace(adapter, tokens=(Tokens("model.embed_tokens", (1, 2), rows),))
    untied = replace(other, updates={"lm_head": head})  # the head has a weight of its own
    assert merge(base, untied, tmp_path / "out").merged == ("lm_head", "model.embed_tokens")


def test_a_scalar_that_was_trained(base: Path, adapter: Adapter, tmp_path: Path) -> None:
    state = weights(base) | {"temperature": torch.tensor(1.5)}
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    merge(base, replace(adapter, whole={"temperature": torch.tensor(2.5)}), tmp_path / "out")
    assert weights(tmp_path / "out")["temperature"] == torch.tensor(2.5)


def test_two_updates_of_one_tensor(base: Path, adapter: Adapter, tmp_path: Path) -> None:
    name = sorted(adapter.updates)[0]
    twice = {**adapter.updates, name.removeprefix("model."): adapter.updates[name]}
    message = refused(base, replace(adapter, updates=twice), tmp_path / "out")
    assert f"adapted twice (1): {name}.weight" in message


def test_a_quantised_base(base: Path, adapter: Adapter, tmp_path: Path) -> None:
    edit_config(base, quantization_config={"quant_method": "gptq"})
    assert "the base is quantised" in refused(base, adapter, tmp_path / "out")


def edit_config(base: Path, **values: object) -> None:
    path = base / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_an_embedding_that_may_be_tied_by_another_name(tiny: Tiny, tmp_path: Path) -> None:
    base = save_base(tiny("llama-tied"), tmp_path / "base")
    state = weights(base)
    state["model.tokens.weight"] = state.pop("model.embed_tokens.weight")
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    update = Update(torch.ones(2, 48), torch.ones(16, 2), 1.0, "embedding")
    message = refused(base, Adapter({"model.tokens": update}), tmp_path / "out")
    assert (
        "cannot tell whether embedding and head share this weight (1): model.tokens.weight"
        in message
    )


def test_a_copy_in_a_coarser_type_is_a_copy(base: Path, adapter: Adapter, tmp_path: Path) -> None:
    saved = weights(base)["model.embed_tokens.weight"].bfloat16()
    merge(base, replace(adapter, copies={"model.embed_tokens.weight": saved}), tmp_path / "out")


def test_a_sum_out_of_range(tiny: Tiny, adapter: Adapter, tmp_path: Path) -> None:
    base = save_base(tiny("llama").half(), tmp_path / "base")
    name, update = next(iter(adapter.updates.items()))
    far = {**adapter.updates, name: replace(update, scale=1e6)}
    message = refused(base, replace(adapter, updates=far), tmp_path / "out")
    assert f"the merged {name}.weight has values that are not finite in F16" in message


def test_bases_that_are_not_whole(base: Path, adapter: Adapter, tmp_path: Path) -> None:
    def refusal() -> str:
        with pytest.raises(ModelError) as caught:
            merge(base, adapter, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return str(caught.value)

    whole = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(whole[:-1])
    assert f"{base / 'model.safetensors'} is damaged" in refusal()
    (base / "model.safetensors").unlink()
    assert "has no weights" in refusal()
    index = base / "model.safetensors.index.json"
    for text in ("{", "[]", '{"weight_map": [1]}', '{"weight_map": {"a": "../base/x"}}'):
        index.write_text(text)
        assert f"{index} is damaged" in refusal()
    (base / "a.safetensors").write_bytes(whole)
    index.write_text('{"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}')
    assert "lacks weight files that model.safetensors.index.json names:\n  - b.s" in refusal()
    shutil.copy(base / "a.safetensors", base / "b.safetensors")
    message = refusal()
    assert "in no file, though the index names a file (2): a, b" in message
    assert "in several files (" in message
    index.unlink()
    for content in (Path("code"), [1], {"a": torch.eye(2).to_sparse()}):
        torch.save(content, base / "pytorch_model.bin")
        assert str(base / "pytorch_model.bin") in refusal()
    (base / "pytorch_model.bin").write_bytes(b"PK" + bytes(50))
    assert "is damaged or holds more than tensors" in refusal()
    (base / "config.json").write_text("[]")
    assert "must hold an object" in refusal()
    (base / "config.json").unlink()
    assert "not a model folder" in refusal()


def test_what_may_be_replaced(base: Path, adapter: Adapter, tmp_path: Path) -> None:
    out = tmp_path / "out"
    merge(base, adapter, out)
    first = (out / "model.safetensors").read_bytes()
    (out / "vocab.txt").write_text("of the earlier merge")
    merge(base, adapter, out)
    assert (out / "model.safetensors").read_bytes() == first
    assert not (out / "vocab.txt").exists()
    (out / "mine").mkdir()
    for taken in (out, base, base.parent, base / "config.json"):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(ConfigError, match="choose another folder"):
            merge(base, adapter, taken)
        assert sorted(tmp_path.rglob("*")) == before


class Interruption(BaseException):
    pass


@pytest.mark.parametrize("kind", [Interruption, KeyboardInterrupt, OSError])
def test_an_interruption_leaves_nothing(
    base: Path, adapter: Adapter, tmp_path: Path, kind: type[BaseException]
) -> None:
    seen = []

    def stop(done: int, total: int) -> None:
        seen.append((done, total))
        if done == 9:
            raise kind(28, "No space left on device")

    with pytest.raises(StorageError if kind is OSError else kind):
        merge(base, adapter, tmp_path / "out", progress=stop)
    total = len(weights(base))
    assert seen == [(n, total) for n in range(1, 10)]
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))


def run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True
    )


KILLED = """
import os, signal, sys
from pathlib import Path
from lorikeet.adapters import read_adapter
from lorikeet.adapters.adapter import Tokens
from lorikeet.adapters.merge import merge
base, adapter, out = map(Path, sys.argv[1:])
def die(done, total):
    if done == total:
        os.kill(os.getpid(), signal.SIGKILL)
merge(base, read_adapter(adapter), out, progress=die)
"""


def test_a_kill_leaves_no_folder_of_that_name(base: Path, adapter: Adapter, tmp_path: Path) -> None:
    done = run(KILLED, base, tmp_path / "adapter", tmp_path / "out")
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "out").exists()
    merge(base, adapter, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file()


FULL = """
import resource, sys
from pathlib import Path
from lorikeet.adapters import read_adapter
from lorikeet.adapters.adapter import Tokens
from lorikeet.adapters.merge import merge
base, adapter, out = map(Path, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
merge(base, read_adapter(adapter), out)
"""


def test_a_full_disk(base: Path, adapter: Adapter, tmp_path: Path) -> None:
    """A bound on the size of files stands for it."""
    done = run(FULL, base, tmp_path / "adapter", tmp_path / "out")
    assert "lorikeet.errors.StorageError: cannot write" in done.stderr
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))


PEAK = """
import sys
from pathlib import Path
from lorikeet.adapters import read_adapter
from lorikeet.adapters.adapter import Tokens
from lorikeet.adapters.merge import merge
base, adapter, out = map(Path, sys.argv[1:])
merge(base, read_adapter(adapter), out)
status = Path("/proc/self/status").read_text()
print(status.partition("VmHWM:")[2].split()[0])
"""


@pytest.mark.slow
def test_the_memory_of_a_merge(shared: Callable[[str], Path], tmp_path: Path) -> None:
    """A model of TinyLlama's shape, 2.2 GB of bf16, every matrix of it adapted."""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc")
    base, shape = tmp_path / "base", shared("shapes/tinyllama-1.1b-chat")
    base.mkdir()
    shutil.copy(shape / "config.json", base)
    with torch.device("meta"):
        config = AutoConfig.from_pretrained(shape)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}

    def drawn(size: tuple[int, ...]) -> Content:
        return Content("BF16", size, lambda: [torch.randn(size).bfloat16()])

    contents = {name: drawn(size) for name, size in shapes.items()}
    write_safe(base / "model.safetensors", contents, metadata={"format": "pt"})
    assert (base / "model.safetensors").stat().st_size > 2e9
    updates: dict[str, Update] = {}
    for name, size in shapes.items():
        module = name.removesuffix(".weight")
        if len(size) == 2:
            embedding = module == "model.embed_tokens"
            rows, columns = size[::-1] if embedding else size
            A, B = torch.randn(16, columns), torch.randn(rows, 16)
            updates[module] = Update(A, B, 0.01, "embedding" if embedding else "linear")
    write_adapter(Adapter(updates), tmp_path / "adapter")
    done = run(PEAK, base, tmp_path / "adapter", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) * 1024 < 1.5e9
    merged = open_safe(tmp_path / "out" / "model.safetensors")
    name = "model.layers.21.mlp.down_proj.weight"
    before = open_safe(base / "model.safetensors").rows(name, 2000, 2048)
    update = updates[name.removesuffix(".weight")]
    expected = (before.float() + 0.01 * update.B[2000:] @ update.A).bfloat16()
    off = merged.rows(name, 2000, 2048) != expected
    assert off.float().mean() < 1e-3  # sums that end between two values round either way


def test_a_square_weight_that_adapter_and_base_store_differently(
    tiny: Tiny, tmp_path: Path
) -> None:
    """Of a square weight the shape does not tell; the architecture does."""
    tiny("llama").save_pretrained(str(tmp_path / "base"))
    update = Update(torch.randn(2, 16), torch.randn(16, 2), 1.0, "conv1d")
    adapter = Adapter({"model.layers.0.self_attn.q_proj": update})
    with pytest.raises(AdapterError, match="fan_in_fan_out does not go with this architecture"):
        merge(tmp_path / "base", adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()

"""What llama-quantize chooses for models of known shapes, and the script that asks it.

    python tests/gguf/mixture_tables.py PATH_OF_LLAMA_QUANTIZE > tests/gguf/mixtures.json

It writes each model as a GGUF file of float16 zeros, which take no space on the disk (a file with a
hole), and reads the types from `llama-quantize --dry-run`. In the table blocks are joined: a
tensor of all blocks has one type, or a list of blocks for each type.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

TABLE = Path(__file__).with_name("mixtures.json")
ALIGNMENT = gguf.GGUF_DEFAULT_ALIGNMENT

Types = dict[str, str]
Joined = dict[str, Any]


@dataclass(frozen=True)
class Model:
    """Enough of a model to name its tensors.

    Attributes:
        architecture: as in GGUF.
        layers: blocks.
        width: of the residual stream.
        inner: of the feed-forward layers.
        heads: query heads.
        kv_heads: key-value heads.
        head: size of a head.
        vocabulary: rows of the embedding.
        tied: no output tensor.
        experts: of a layer.
        biases: on q, k and v.
        fused: q, k and v in one tensor, gate and up in one.
        head_norms: norms of q and k.
        post_norms: norms after attention and feed-forward.
        importance: llama-quantize is given an importance matrix.
    """

    architecture: str
    layers: int
    width: int
    inner: int
    heads: int
    kv_heads: int
    head: int
    vocabulary: int
    tied: bool = False
    experts: int = 0
    biases: bool = False
    fused: bool = False
    head_norms: bool = False
    post_norms: bool = False
    importance: bool = False

    def tensors(self) -> list[tuple[str, tuple[int, ...]]]:
        """Names and shapes, as torch has them."""
        outside: list[tuple[str, tuple[int, ...]]] = [
            ("token_embd.weight", (self.vocabulary, self.width)),
            ("output_norm.weight", (self.width,)),
        ]
        if not self.tied:
            outside.append(("output.weight", (self.vocabulary, self.width)))
        return outside + [
            (f"blk.{layer}.{name}", shape)
            for layer in range(self.layers)
            for name, shape in (*self._attention(), *self._feed_forward())
        ]

    def _attention(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        q, kv = self.heads * self.head, self.kv_heads * self.head
        yield "attn_norm.weight", (self.width,)
        if self.fused:
            yield "attn_qkv.weight", (q + 2 * kv, self.width)
        else:
            for part, size in (("q", q), ("k", kv), ("v", kv)):
                yield f"attn_{part}.weight", (size, self.width)
                if self.biases:
                    yield f"attn_{part}.bias", (size,)
        if self.head_norms:
            yield "attn_q_norm.weight", (self.head,)
            yield "attn_k_norm.weight", (self.head,)
        yield "attn_output.weight", (self.width, q)
        if self.post_norms:
            yield "post_attention_norm.weight", (self.width,)
            yield "post_ffw_norm.weight", (self.width,)

    def _feed_forward(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield "ffn_norm.weight", (self.width,)
        if self.experts:
            yield "ffn_gate_inp.weight", (self.experts, self.width)
            yield "ffn_gate_exps.weight", (self.experts, self.inner, self.width)
            yield "ffn_up_exps.weight", (self.experts, self.inner, self.width)
            yield "ffn_down_exps.weight", (self.experts, self.width, self.inner)
        elif self.fused:
            yield "ffn_up.weight", (2 * self.inner, self.width)
            yield "ffn_down.weight", (self.width, self.inner)
        else:
            yield "ffn_gate.weight", (self.inner, self.width)
            yield "ffn_up.weight", (self.inner, self.width)
            yield "ffn_down.weight", (self.width, self.inner)


MODELS = {
    "stories260k": Model("llama", 5, 64, 172, 8, 4, 8, 512, tied=True),
    "SmolLM-135M": Model("llama", 30, 576, 1536, 9, 3, 64, 49152, tied=True),
    "SmolLM-135M, importance": Model(
        "llama", 30, 576, 1536, 9, 3, 64, 49152, tied=True, importance=True
    ),
    "TinyLlama-1.1B": Model("llama", 22, 2048, 5632, 32, 4, 64, 32000),
    "TinyLlama-1.1B, importance": Model("llama", 22, 2048, 5632, 32, 4, 64, 32000, importance=True),
    "Llama-2-7B": Model("llama", 32, 4096, 11008, 32, 32, 128, 32000),
    "Llama-3-8B": Model("llama", 32, 4096, 14336, 32, 8, 128, 128256),
    "Llama-2-70B": Model("llama", 80, 8192, 28672, 64, 8, 128, 32000),
    "Mixtral-8x7B": Model("llama", 32, 4096, 14336, 32, 8, 128, 32000, experts=8),
    "Qwen2-0.5B": Model("qwen2", 24, 896, 4864, 14, 2, 64, 151936, tied=True, biases=True),
    "Qwen2-72B": Model("qwen2", 80, 8192, 29568, 64, 8, 128, 152064, biases=True),
    "Qwen3-1.7B": Model("qwen3", 28, 2048, 6144, 16, 8, 128, 151936, tied=True, head_norms=True),
    "Gemma-2B": Model("gemma", 18, 2048, 16384, 8, 1, 256, 256000, tied=True),
    "Gemma-2-2B": Model("gemma2", 26, 2304, 9216, 8, 4, 256, 256000, tied=True, post_norms=True),
    "Phi-3-mini": Model("phi3", 32, 3072, 8192, 32, 32, 96, 32064, fused=True),
}


def joined(types: Types) -> Joined:
    """One entry for a tensor of all blocks; norms and biases, which stay F32, are left out."""
    layers: dict[str, dict[str, list[int]]] = {}
    table: Joined = {}
    for name, kind in types.items():
        found = re.match(r"blk\.(\d+)\.(.*)", name)
        if kind == "F32":
            continue
        if found is None:
            table[name] = kind
        else:
            layers.setdefault(found[2], {}).setdefault(kind, []).append(int(found[1]))
    for name, kinds in sorted(layers.items()):
        kinds = {kind: sorted(kinds[kind]) for kind in sorted(kinds)}
        table[f"blk.*.{name}"] = next(iter(kinds)) if len(kinds) == 1 else kinds
    return table


def write(path: Path, model: Model) -> None:
    """A file whose header is whole and whose tensors are a hole."""
    writer = gguf.GGUFWriter(path, model.architecture)
    writer.add_context_length(2048)
    writer.add_embedding_length(model.width)
    writer.add_block_count(model.layers)
    writer.add_feed_forward_length(model.inner)
    writer.add_head_count(model.heads)
    writer.add_head_count_kv(model.kv_heads)
    writer.add_key_length(model.head)
    writer.add_value_length(model.head)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(model.head)
    writer.add_vocab_size(model.vocabulary)
    writer.add_sliding_window(2048)
    if model.experts:
        writer.add_expert_count(model.experts)
        writer.add_expert_used_count(2)
    total = 0
    for name, shape in model.tensors():
        single = len(shape) == 1 or name.endswith("ffn_gate_inp.weight")
        dtype = np.float32 if single else np.float16
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        writer.add_tensor_info(name, shape, np.dtype(dtype), size)
        total += -(-size // ALIGNMENT) * ALIGNMENT
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as file:
        file.seek(0, 2)
        file.truncate(-(-file.tell() // ALIGNMENT) * ALIGNMENT + total)


def write_importance(path: Path, model: Model) -> None:
    """An importance matrix of ones, for the tensors of the blocks."""
    writer = gguf.GGUFWriter(path, "imatrix")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["ones"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, shape in model.tensors():
        if len(shape) == 2 and name.startswith("blk."):
            writer.add_tensor(f"{name}.in_sum2", np.ones((1, shape[1]), np.float32))
            writer.add_tensor(f"{name}.counts", np.ones((1, 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def asked(quantize: str, model: Model, kinds: list[str]) -> dict[str, Types]:
    """The types of a model's tensors for each kind, in llama-quantize's own words."""
    with tempfile.TemporaryDirectory() as folder:
        path, matrix = Path(folder, "model.gguf"), Path(folder, "importance.gguf")
        write(path, model)
        command = [quantize, "--dry-run"]
        if model.importance:
            write_importance(matrix, model)
            command += ["--imatrix", str(matrix)]
        return {kind: _types([*command, str(path), kind.upper()]) for kind in kinds}


def _types(command: list[str]) -> Types:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stdout[-2000:] + done.stderr[-2000:])
    line = r"\[ *\d+/ *\d+\] (\S+) .*?type = +(\w+), .*?size = .*?MiB(?: -> .*?MiB \((\w+)\))?$"
    found = re.findall(line, done.stdout + done.stderr, re.MULTILINE)
    return {name: (new or old).upper() for name, old, new in found}


def main() -> None:
    from lorikeet.gguf.mixture import KINDS

    kinds = [kind for kind in KINDS if kind not in ("f32", "f16", "bf16")]
    tables = {}
    for name, model in MODELS.items():
        chosen = asked(sys.argv[1], model, kinds)
        for kind, types in chosen.items():
            assert set(types) == {tensor for tensor, _ in model.tensors()}, (name, kind)
        tables[name] = {kind: joined(types) for kind, types in chosen.items()}
    text = json.dumps(tables, indent=1)
    print(re.sub(r"\[[\d,\s]+\]", lambda found: str(json.loads(found[0])), text))


if __name__ == "__main__":
    main()

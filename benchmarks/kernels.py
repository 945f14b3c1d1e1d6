"""What each compiled kernel gives: `python -m benchmarks.kernels`, on SmolLM-135M's sizes in bf16.

A row times one kernel compiled and as tensor operations (the attention: as PyTorch's own, one
document at a time), in turn, forward and backward together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from time import perf_counter
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.tables import markdown
from lorikeet import kernels
from lorikeet.kernels import Dropout, Projection, native
from lorikeet.model import keep_freed_memory

TOKENS, WIDTH, INNER, HEADS, KV_HEADS, SIZE, VOCABULARY, RANK = 1024, 576, 1536, 9, 3, 64, 49152, 16
ROUNDS = 15

Pass = Callable[[], object]


def main() -> None:
    """Print the table."""
    reason = native.missing()
    if reason is not None:
        raise SystemExit(f"there are no compiled kernels here: {reason}")
    keep_freed_memory()
    torch.manual_seed(0)
    rows = []
    for name, compiled, plain in cases():
        seconds: tuple[list[float], list[float]] = ([], [])
        for _ in range(ROUNDS + 2):
            seconds[0].append(timed(compiled))
            with tensor_operations():
                seconds[1].append(timed(plain))
        ours, theirs = (median(times[2:]) * 1e3 for times in seconds)
        ratios = sorted(b / a for a, b in list(zip(*seconds, strict=True))[2:])
        spread = f"{median(ratios):.1f} [{ratios[len(ratios) // 4]:.1f}, {ratios[-4]:.1f}]"
        rows.append([name, f"{ours:.2f}", f"{theirs:.2f}", spread])
    columns = ["forward + backward", "compiled, ms", "without, ms", "times as fast [quartiles]"]
    print(markdown(columns, rows))


def cases() -> Iterator[tuple[str, Pass, Pass]]:
    """Name, the compiled pass, and the pass without compiled kernels."""
    yield from (attention(lengths) for lengths in ([512] * 2, [171] * 6, [32] * 32))
    x, weight = leaf(TOKENS, WIDTH), leaf(WIDTH).detach()
    yield same("residual sum and RMSNorm", lambda: norm(x, weight))
    q = leaf(TOKENS, HEADS, SIZE)
    cos, sin = (torch.randn(TOKENS, SIZE // 2).repeat(1, 2) for _ in range(2))
    yield same("rotary embedding, 9 heads", lambda: backward(kernels.rotate(q, cos, sin)))
    yield same("cross-entropy, 256 rows (with the head)", head())
    for p in (0.0, 0.05):
        yield same(f"gated MLP with LoRA r={RANK}, dropout {p}", mlp(p))


def attention(lengths: list[int]) -> tuple[str, Pass, Pass]:
    """Packed attention beside SDPA on each document."""
    tokens = sum(lengths)
    q, k, v = leaf(tokens, HEADS, SIZE), leaf(tokens, KV_HEADS, SIZE), leaf(tokens, KV_HEADS, SIZE)
    ends = torch.tensor([0, *lengths]).cumsum(0).int()

    def compiled() -> None:
        backward(kernels.attend(q, k, v, ends, scale=SIZE**-0.5))

    def sdpa() -> None:
        outputs = []
        queries, keys, values = (x.transpose(0, 1)[None].split(lengths, dim=2) for x in (q, k, v))
        for own in zip(queries, keys, values, strict=True):
            query, key, value = own
            outputs.append(
                F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
            )
        backward(torch.cat(outputs, dim=2))

    return f"attention, {len(lengths)} documents of {lengths[0]}", compiled, sdpa


def norm(x: Tensor, weight: Tensor) -> None:
    """The sum of two terms, its norm, and the gradients of both outputs."""
    total, normal = kernels.add_rms_norm(x, x, weight, 1e-5)
    torch.autograd.backward([total, normal.rows], [total.detach(), normal.rows.detach()])


def head() -> Pass:
    """The head over the whole vocabulary, with the gradient of its input."""
    hidden, weight = leaf(256, WIDTH), leaf(VOCABULARY, WIDTH).detach()
    targets = torch.randint(VOCABULARY, (256,))
    return lambda: kernels.head_nll(hidden, weight, None, targets).sum().backward()


def mlp(p: float) -> Pass:
    """A gated MLP whose factors are trained."""
    x = leaf(TOKENS, WIDTH)
    gate, up, down = (
        Projection(leaf(*shape).detach(), None, master(RANK, shape[1]), master(shape[0], RANK))
        for shape in ((INNER, WIDTH), (INNER, WIDTH), (WIDTH, INNER))
    )
    drops = (Dropout(p, 1), Dropout(p, 2)) if p else (None, None)
    return lambda: backward(kernels.gated_mlp(x, gate, up, down, dropout=drops))


def same(name: str, run: Pass) -> tuple[str, Pass, Pass]:
    """A kernel that runs in both ways itself."""
    return name, run, run


def leaf(*shape: int) -> Tensor:
    """A bf16 tensor that wants a gradient."""
    return torch.randn(shape).bfloat16().requires_grad_()


def master(*shape: int) -> Tensor:
    """A float32 factor that wants a gradient."""
    return (torch.randn(shape) / shape[-1] ** 0.5).requires_grad_()


def backward(y: Tensor) -> None:
    """Some gradient of the output, through the pass."""
    y.backward(y.detach())


def timed(run: Pass) -> float:
    """Seconds of one run."""
    started = perf_counter()
    run()
    return perf_counter() - started


@contextmanager
def tensor_operations() -> Iterator[None]:
    """Without the compiled kernels."""
    with mock.patch.object(native, "missing", lambda: "switched off"):
        yield


if __name__ == "__main__":
    main()

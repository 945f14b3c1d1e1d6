"""Compiled and in bfloat16 only: elsewhere PyTorch's attention serves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from lorikeet.kernels import attend, attention, native

LENGTHS = [1, 5, 63, 64, 65, 130, 200]

Check = Callable[..., None]
Threads = Callable[[int], None]

pytestmark = pytest.mark.usefixtures("compiled")


def inputs(
    lengths: Sequence[int], *, heads: int = 3, kv_heads: int = 1, size: int = 32
) -> dict[str, Tensor]:
    tokens = sum(lengths)
    shapes = {"query": heads, "key": kv_heads, "value": kv_heads}
    return {
        name: torch.randn(tokens, count, size, dtype=torch.float64)
        for name, count in shapes.items()
    }


def halved(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.bfloat16().requires_grad_() for name, t in tensors.items()}


def ends(lengths: Sequence[int]) -> list[int]:
    return [sum(lengths[:i]) for i in range(len(lengths) + 1)]


def kernel(
    lengths: Sequence[int], *, window: int | None = None, sharpness: float = 1.0
) -> Callable[..., Tensor]:
    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        cu_seqlens = torch.tensor(ends(lengths), dtype=torch.int32)
        scale = sharpness * query.shape[-1] ** -0.5
        return attend(query, key, value, cu_seqlens, scale=scale, window=window)

    return run


def oracle(
    lengths: Sequence[int], *, window: int | None = None, sharpness: float = 1.0
) -> Callable[..., Tensor]:
    """The whole matrix of scores of every document, all but what a token sees at -inf."""

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        shared = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(shared, 1) for x in (key, value))
        outputs = []
        for start, end in pairwise(ends(lengths)):
            q, k, v = (x[start:end].transpose(0, 1) for x in (query, key, value))
            scores = q @ k.transpose(1, 2) * (sharpness * query.shape[-1] ** -0.5)
            distance = torch.arange(end - start)[:, None] - torch.arange(end - start)
            seen = (distance >= 0) & (distance < (window or end - start))
            weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
            outputs.append((weights @ v).transpose(0, 1))
        return torch.cat(outputs)

    return run


def results(
    run: Callable[..., Tensor], tensors: dict[str, Tensor], upstream: Tensor
) -> dict[str, Tensor]:
    """The output and the gradients of query, key and value."""
    output = run(**tensors)
    gradients = torch.autograd.grad(output, list(tensors.values()), upstream)
    return {"output": output.detach(), **dict(zip(tensors, gradients, strict=True))}


@pytest.mark.parametrize("heads", [(1, 1), (3, 1), (4, 1), (8, 2), (2, 2)])
@pytest.mark.parametrize("size", [16, 32, 64, 80, 96, 128])
def test_it_is_its_formula(check: Check, size: int, heads: tuple[int, int]) -> None:
    tensors = inputs(LENGTHS, heads=heads[0], kv_heads=heads[1], size=size)
    check(kernel(LENGTHS), oracle(LENGTHS), tensors, dtype=torch.bfloat16)


@pytest.mark.parametrize("length", [2, 15, 16, 17, *LENGTHS[1:]])
def test_a_document_alone(check: Check, length: int) -> None:
    check(kernel([length]), oracle([length]), inputs([length]), dtype=torch.bfloat16)


@pytest.mark.parametrize("window", [2, 5, 16, 63, 64, 65, 100, 128, 199, 200, 1000])
def test_a_sliding_window(check: Check, window: int) -> None:
    run, exact = kernel(LENGTHS, window=window), oracle(LENGTHS, window=window)
    check(run, exact, inputs(LENGTHS), dtype=torch.bfloat16)


def test_a_token_that_sees_itself_alone() -> None:
    """Its weight is 1 whatever the score: it answers its value, and only the value learns."""
    for lengths, window in (([1] * 9, None), ([70], 1)):
        tensors = halved(inputs(lengths))
        upstream = torch.randn(sum(lengths), 3, 32).bfloat16()
        found = results(kernel(lengths, window=window), tensors, upstream)
        assert torch.equal(found["output"], tensors["value"].expand(-1, 3, -1))
        exact = upstream.double().sum(1, keepdim=True)
        torch.testing.assert_close(found["value"].double(), exact, rtol=1e-2, atol=1e-6)
        for name in ("query", "key"):
            assert found[name].abs().max() < 0.05  # bf16's rounding of what cancels


@pytest.mark.parametrize("sharpness", [0.0, 0.1, 20.0])
def test_flat_and_sharp_weights(check: Check, sharpness: float) -> None:
    """Sharp ones leap from key to key, so that the running maximum is rescaled again and again."""
    options = {"sharpness": sharpness}
    frozen = ["query", "key"] if sharpness != 0.1 else []  # zero, or what rounding leaves
    check(
        kernel(LENGTHS, **options),
        oracle(LENGTHS, **options),
        inputs(LENGTHS),
        dtype=torch.bfloat16,
        frozen=frozen,
    )


def test_scores_beyond_what_an_exponential_holds(check: Check) -> None:
    """Growing and falling scores of thousands: each token sees one key, the first or its own."""
    for slope in (-1.0, 1.0):
        tensors = inputs([200])
        tensors["query"].fill_(1)
        tensors["key"].copy_(slope * torch.arange(200.0)[:, None, None] * 4)
        options = {"dtype": torch.bfloat16, "frozen": ["query", "key"]}
        check(kernel([200], sharpness=50), oracle([200], sharpness=50), tensors, **options)


def test_heads_that_do_not_lie_together(check: Check) -> None:
    """Slices of one wide product, and a gradient that is a view."""

    def sliced(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = torch.cat([query, key, value], dim=1).split([3, 1, 1], dim=1)
        return kernel([40, 30])(q, k, v).transpose(0, 1)

    def exact(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return oracle([40, 30])(query, key, value).transpose(0, 1)

    check(sliced, exact, inputs([40, 30]), dtype=torch.bfloat16)


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("value", ["numbers", "nan"])
def test_a_document_never_feels_another(window: int | None, value: str) -> None:
    """All that is said and asked of one document may change, the others stay bit-identical."""
    lengths = [65, 5, 130, 1, 64, 200]
    tensors = halved(inputs(lengths))
    upstream = torch.randn(sum(lengths), 3, 32).bfloat16()
    run = kernel(lengths, window=window)
    before = results(run, tensors, upstream)
    for start, end in pairwise(ends(lengths)):
        changed = {name: t.detach().clone() for name, t in tensors.items()}
        other = upstream.clone()
        for t in (*changed.values(), other):
            t[start:end] = float("nan") if value == "nan" else torch.randn(t[start:end].shape) * 9
        for t in changed.values():
            t.requires_grad_()
        after = results(run, changed, other)
        outside = torch.ones(sum(lengths), dtype=torch.bool)
        outside[start:end] = False
        for name, was in before.items():
            assert torch.equal(after[name][outside], was[outside]), name
            if name in ("output", "value"):
                assert not torch.equal(after[name][~outside], was[~outside])


def test_empty_documents_change_nothing() -> None:
    given = halved(inputs([5, 70]))
    results = []
    for bounds in ([0, 5, 75], [0, 0, 5, 5, 75, 75, 75]):
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
        output = attend(*given.values(), cu_seqlens, scale=0.2)
        results.append([output, *torch.autograd.grad(output.sum(), list(given.values()))])
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_a_document_is_what_it_is_alone() -> None:
    lengths = [65, 5, 130]
    tensors = halved(inputs(lengths))
    upstream = torch.randn(sum(lengths), 3, 32).bfloat16()
    together = results(kernel(lengths), tensors, upstream)
    for start, end in pairwise(ends(lengths)):
        own = {name: t.detach()[start:end].requires_grad_() for name, t in tensors.items()}
        alone = results(kernel([end - start]), own, upstream[start:end])
        for name, found in alone.items():
            assert torch.equal(found, together[name][start:end]), name


def test_a_token_never_feels_a_later_one() -> None:
    tensors = halved(inputs([200]))
    changed = {name: t.detach().clone() for name, t in tensors.items()}
    for t in changed.values():
        t[77:] = torch.randn(t[77:].shape)
    assert torch.equal(kernel([200])(**changed)[:77], kernel([200])(**tensors)[:77])


@pytest.mark.parametrize("window", [None, 70])
def test_the_number_of_threads_changes_nothing(threads: Threads, window: int | None) -> None:
    tensors = halved(inputs(LENGTHS, heads=4, kv_heads=2, size=64))
    upstream = torch.randn(sum(LENGTHS), 4, 64).bfloat16()
    found = []
    for count in (1, 2, 2):
        threads(count)
        found.append(results(kernel(LENGTHS, window=window), tensors, upstream))
    for name, one in found[0].items():
        assert torch.equal(found[1][name], one), name
        assert torch.equal(found[2][name], one), name


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_what_is_no_number_stays_so(name: str, bad: float) -> None:
    """A query's own row is spoilt; by a key or a value, the rows of all that see it."""
    tensors = inputs([70, 90, 20])
    tensors[name][100] = bad
    given = halved(tensors)
    output = kernel([70, 90, 20])(**given)
    good = torch.isfinite(output).all(2).all(1)
    assert good[:70].all()
    assert good[160:].all()
    spoilt = [100] if name == "query" else range(100, 160)
    assert not good[spoilt].any()
    gradients = torch.autograd.grad(output.sum(), list(given.values()))
    for gradient in gradients:
        finite = torch.isfinite(gradient).all(2).all(1)
        assert finite[:70].all()
        assert finite[160:].all()
    assert not all(torch.isfinite(gradient).all() for gradient in gradients)


def test_a_gradient_that_is_no_number_stays_so() -> None:
    tensors = halved(inputs([70, 90, 20]))
    upstream = torch.ones(180, 3, 32).bfloat16()
    upstream[120] = float("nan")
    gradients = results(kernel([70, 90, 20]), tensors, upstream)
    assert torch.isnan(gradients["query"][120]).all()
    for name in ("key", "value"):
        assert torch.isnan(gradients[name][70:121]).all()
    for name in tensors:
        assert torch.isfinite(gradients[name][:70]).all()
        assert torch.isfinite(gradients[name][160:]).all()


def test_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    for size in (16, 64, 80, 128):
        assert attention.takes(torch.zeros(3, 2, size, dtype=torch.bfloat16))
    for size in (8, 24, 100):
        assert not attention.takes(torch.zeros(3, 2, size, dtype=torch.bfloat16))
    assert not attention.takes(torch.zeros(3, 2, 16))
    assert not attention.takes(torch.zeros(3, 2, 16, dtype=torch.bfloat16, device="meta"))
    monkeypatch.setattr(native, "missing", lambda: "some reason")
    assert not attention.takes(torch.zeros(3, 2, 16, dtype=torch.bfloat16))

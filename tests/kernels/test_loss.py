from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from lorikeet.kernels import head_nll, loss

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
SIZES = [(1, 172, 61), (5, 16, 61), (70, 20, 172), (100, 16, 512), (0, 16, 8)]  # S, I, V

Check = Callable[..., None]
Threads = Callable[[int], None]


@pytest.fixture(params=[1, 1 << 30], ids=["many chunks", "one chunk"])
def _chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Few rows at a time, the last chunk smaller than the others, or all of them."""
    monkeypatch.setattr(loss, "CHUNK_BYTES", request.param)
    yield


def inputs(sizes: tuple[int, int, int], *, bias: bool = True) -> dict[str, Tensor | None]:
    rows, width, vocabulary = sizes
    tensors = {
        "hidden": torch.randn(rows, width),
        "weight": torch.randn(vocabulary, width) * 2 / width**0.5,
        "bias": torch.randn(vocabulary) if bias else None,
    }
    return {name: None if t is None else t.double() for name, t in tensors.items()}


def targets(rows: int, vocabulary: int) -> Tensor:
    drawn = torch.randint(vocabulary, (rows,), generator=torch.Generator().manual_seed(1))
    drawn[:1], drawn[1:2] = 0, vocabulary - 1
    return drawn


def kernel(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return head_nll(hidden, weight, bias, targets(hidden.shape[0], weight.shape[0]))


def oracle(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    logits = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    chosen = targets(*logits.shape)
    rows = [-torch.log_softmax(row, 0)[t] for row, t in zip(logits, chosen, strict=True)]
    return torch.stack(rows) if rows else logits.sum(1)


def upstreams(rows: int) -> dict[str, Tensor]:
    some = torch.randn(rows, dtype=torch.float64)
    return {
        "ones": torch.ones(rows, dtype=torch.float64),
        "uniform": torch.full((rows,), -0.37, dtype=torch.float64),
        "uneven": some,
        "some zero": some * (torch.arange(rows) % 3 > 0),
        "first zero": some * (torch.arange(rows) > 0),
    }


@pytest.mark.usefixtures("way", "_chunks")
@pytest.mark.parametrize("upstream", upstreams(0))
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_its_formula(
    check: Check, dtype: torch.dtype, sizes: tuple[int, int, int], upstream: str
) -> None:
    options = {"dtype": dtype, "upstream": [upstreams(sizes[0])[upstream]]}
    check(kernel, oracle, inputs(sizes), **options)
    check(kernel, oracle, inputs(sizes, bias=False), **options, frozen=["weight"])


@pytest.mark.usefixtures("way", "_chunks")
@pytest.mark.parametrize("trained", ["hidden", "weight", "bias"])
@pytest.mark.parametrize("upstream", ["uniform", "uneven"])
def test_any_part_can_be_trained_alone(check: Check, trained: str, upstream: str) -> None:
    frozen = [name for name in ("hidden", "weight", "bias") if name != trained]
    options = {"dtype": torch.float32, "upstream": [upstreams(70)[upstream]]}
    check(kernel, oracle, inputs((70, 20, 172)), **options, frozen=frozen)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("scale", [30.0, 100.0])
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_rows_that_are_all_but_certain(check: Check, dtype: torch.dtype, scale: float) -> None:
    """Logits far apart: probabilities that underflow, losses of hundreds of nats."""
    tensors = inputs((40, 20, 61))
    tensors["hidden"] *= scale
    check(kernel, oracle, tensors, dtype=dtype)


def test_finite_differences_agree() -> None:
    tensors = [t.requires_grad_() for t in inputs((3, 4, 5)).values() if t is not None]
    assert torch.autograd.gradcheck(kernel, tensors)


@pytest.mark.usefixtures("way", "_chunks")
@pytest.mark.parametrize("dtype", DTYPES)
def test_without_gradients_the_numbers_are_the_same(
    flops: Callable[..., int], dtype: torch.dtype
) -> None:
    given = {name: t.to(dtype) for name, t in inputs((70, 20, 172)).items() if t is not None}
    frozen = kernel(**given)
    hidden = given.pop("hidden").requires_grad_()
    trained = kernel(hidden, **given)
    product = 2 * 70 * 20 * 172
    with torch.no_grad():
        assert flops(lambda: kernel(hidden, **given)) == product
        assert torch.equal(kernel(hidden, **given), trained)
    assert torch.equal(frozen, trained)
    assert trained.dtype == torch.promote_types(dtype, torch.float32)
    assert not frozen.requires_grad


@pytest.mark.usefixtures("_chunks")
def test_a_frozen_head_costs_no_product(flops: Callable[..., int]) -> None:
    tensors = inputs((70, 20, 172))
    tensors["hidden"].requires_grad_()
    product = 2 * 70 * 20 * 172
    assert flops(lambda: kernel(**tensors)) == 2 * product
    nll = kernel(**tensors)
    assert flops(lambda: nll.sum().backward()) == 0


@pytest.mark.usefixtures("way", "_chunks")
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_what_is_no_number_stays_so(dtype: torch.dtype, bad: float) -> None:
    given = {name: t.to(dtype) for name, t in inputs((70, 20, 61)).items() if t is not None}
    clean = kernel(**given)
    given["hidden"][66, 7] = bad
    given["hidden"].requires_grad_()
    nll = kernel(**given)
    others = torch.arange(70) != 66
    assert torch.equal(nll[others], clean[others])
    assert not torch.isfinite(nll[66])
    (gradient,) = torch.autograd.grad(nll.sum(), given["hidden"])
    assert torch.isfinite(gradient[others]).all()
    assert torch.isnan(gradient[66]).any()


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("where", [0, 16, 31, 60])
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_one_logit_that_is_no_number(dtype: torch.dtype, where: int) -> None:
    """A bias of NaN anywhere in the row, in the target's column or another, spoils every row."""
    given = {name: t.to(dtype) for name, t in inputs((40, 20, 61)).items() if t is not None}
    given["bias"][where] = float("nan")
    assert torch.isnan(kernel(**given)).all()


@pytest.mark.usefixtures("way", "_chunks")
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_a_gradient_that_is_no_number_stays_so(dtype: torch.dtype) -> None:
    given = [t.to(dtype).requires_grad_() for t in inputs((70, 20, 61)).values() if t is not None]
    upstream = torch.ones(70)
    upstream[3] = float("nan")
    dhidden, dweight, dbias = torch.autograd.grad(kernel(*given), given, upstream)
    assert torch.isnan(dhidden).any(1).nonzero().flatten().tolist() == [3]
    assert torch.isnan(dweight).all()
    assert torch.isnan(dbias).all()


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_a_token_that_cannot_be(dtype: torch.dtype) -> None:
    """A logit of -inf is a probability of zero: the others share what there is."""
    given = {name: t.to(dtype) for name, t in inputs((40, 20, 61)).items() if t is not None}
    impossible = 17
    given["bias"][impossible] = float("-inf")
    nll = kernel(**given)
    others = targets(40, 61) != impossible
    exact = oracle(**{name: t.double() for name, t in given.items()})
    rtol = 1e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(nll[others].double(), exact[others], rtol=rtol, atol=rtol)
    assert (nll[~others] == float("inf")).all()


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_the_number_of_threads_changes_nothing(threads: Threads, dtype: torch.dtype) -> None:
    """The product has one term, so that only the rows are shared out."""
    tensors = inputs((130, 1, 512), bias=False)
    hidden, weight = (tensors[name].to(dtype).requires_grad_() for name in ("hidden", "weight"))
    results = []
    for count in (1, 2):
        threads(count)
        nll = kernel(hidden, weight, None)
        results.append((nll, torch.autograd.grad(nll.sum(), hidden)[0]))
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


@pytest.mark.usefixtures("way", "_chunks")
@pytest.mark.parametrize("upstream", ["ones", "uneven"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_without_a_target(check: Check, dtype: torch.dtype, upstream: str) -> None:
    """They count nothing, whatever their logits are, and leave the gradients of others alone."""
    chosen = targets(70, 172)
    chosen[3::5] = -1
    chosen[64:] = -100

    def with_gaps(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return head_nll(hidden, weight, bias, chosen)

    def exact(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        logits = hidden @ weight.T if bias is None else hidden @ weight.T + bias
        nll = torch.nn.functional.cross_entropy(logits, chosen.clamp(min=0), reduction="none")
        return nll.masked_fill(chosen < 0, 0.0)

    options = {"dtype": dtype, "upstream": [upstreams(70)[upstream]]}
    check(with_gaps, exact, inputs((70, 20, 172)), **options)
    spoilt = inputs((70, 20, 172), bias=False)
    given = [t.to(dtype).requires_grad_() for t in spoilt.values() if t is not None]
    with torch.no_grad():
        given[0][3] = float("nan")
    nll = head_nll(*given, None, chosen)
    (dhidden,) = torch.autograd.grad(nll.sum(), given[0])
    assert nll[3] == 0 and torch.isfinite(nll).all()
    assert not dhidden[3].any() and torch.isfinite(dhidden).all()


def test_a_sum_is_known_without_reading_it() -> None:
    """What lets a head be trained in a CUDA graph, where nothing can be read."""
    weight = torch.randn(61, 16, device="meta", requires_grad=True)
    hidden, chosen = (
        torch.randn(9, 16, device="meta"),
        torch.zeros(9, dtype=torch.long, device="meta"),
    )
    (gradient,) = torch.autograd.grad(head_nll(hidden, weight, None, chosen).sum(), weight)
    assert gradient.shape == weight.shape

"""Adapters as vectors: sums, multiples, truncation, against dense matrices."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_adapters import assert_same, dense, make, norm, plus
from torch import Tensor
from torch.testing import assert_close
from transformers import PreTrainedModel

from lorikeet.adapters import Adapter, Update, load_adapter, read_adapter, write_adapter
from lorikeet.adapters.algebra import combine, dense_spectrum, scale, subtract
from lorikeet.errors import AdapterError

Tiny = Callable[[str], PreTrainedModel]
Logits = Callable[[torch.nn.Module], Tensor]
WEIGHTS = st.floats(0.125, 3).flatmap(lambda w: st.sampled_from([w, -w]))

peft_talks = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is dep:FutureWarning",
    "ignore:Setting `save_embedding_layers` to `True`:UserWarning",
    r"ignore:Unexpected keyword arguments \['lorikeet'\] for class LoraConfig:UserWarning",
)


@st.composite
def adapters(draw: st.DrawFn) -> Adapter:
    """Any rank per module, any scale, any of the modules."""
    updates: dict[str, Update] = {}
    for module in draw(st.lists(st.sampled_from("abcd"), min_size=1, unique=True)):
        one = make(draw(st.integers(0, 99)), module, draw(st.integers(1, 6)))
        updates[module] = replace(one.updates[module], scale=draw(st.floats(0.01, 30)))
    return Adapter(updates)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(adapters())
def test_one_adapter_of_weight_one_comes_back(adapter: Adapter) -> None:
    found = combine([adapter], [1.0])
    assert list(found.adapter.updates) == list(adapter.updates)
    assert set(found.errors.values()) == {0.0}
    for module, update in adapter.updates.items():
        own = found.adapter.updates[module]
        assert torch.equal(own.A, update.A)
        assert torch.equal(own.B, update.B)
        assert (own.scale, own.kind) == (update.scale, update.kind)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.lists(st.tuples(WEIGHTS, adapters()), min_size=1, max_size=4))
def test_the_sum_is_the_sum_of_the_matrices(parts: list[tuple[float, Adapter]]) -> None:
    found = combine([a for _, a in parts], [w for w, _ in parts])
    terms = [(w, dense(a)) for w, a in parts]
    size = sum(abs(w) * norm(d) for w, d in terms)
    assert_same(dense(found.adapter), plus(terms), size)
    assert set(found.errors.values()) == {0.0}
    for module, update in found.adapter.updates.items():
        assert update.r == sum(a.updates[module].r for _, a in parts if module in a.updates)
        assert update.A.is_contiguous()
        assert update.B.is_contiguous()
        assert {update.A.dtype, update.B.dtype} == {torch.float32}
        if len(parts) > 1:
            assert update.scale == 1
    backwards = combine([a for _, a in parts[::-1]], [w for w, _ in parts[::-1]])
    assert_same(dense(backwards.adapter), plus(terms), size)


@settings(deadline=None, max_examples=40, derandomize=True)
@given(adapters(), adapters(), WEIGHTS, WEIGHTS, WEIGHTS)
def test_it_is_linear(a: Adapter, b: Adapter, v: float, w: float, factor: float) -> None:
    once = combine([a, b], [factor * v, factor * w]).adapter
    twice = scale(combine([a, b], [v, w]).adapter, factor)
    nested = combine([scale(a, v), scale(b, w)], [factor, factor]).adapter
    size = abs(factor) * (abs(v) * norm(dense(a)) + abs(w) * norm(dense(b)))
    assert_same(dense(twice), dense(once), size)
    assert_same(dense(nested), dense(once), size)


@settings(deadline=None, max_examples=40, derandomize=True)
@given(adapters(), adapters())
def test_what_is_added_can_be_taken_away(a: Adapter, b: Adapter) -> None:
    nothing = dense(subtract(a, a))
    assert_same(nothing, {m: torch.zeros_like(d) for m, d in nothing.items()}, norm(dense(a)))
    back = dense(subtract(combine([a, b], [1, 1]).adapter, b))
    size = norm(dense(a), dense(b))
    assert_same({m: back[m] for m in a.updates}, dense(a), size)


def test_a_weight_of_zero_drops_an_adapter_and_its_modules() -> None:
    a, b = make(1, "ab"), make(2, "bc")
    found = combine([a, b], [1, 0]).adapter
    assert set(found.updates) == {"a", "b"}
    assert torch.equal(found.updates["b"].A, a.updates["b"].A)
    assert found.provenance["combined"]["sources"][1]["weight"] == 0


def best(matrix: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The nearest matrix of rank k and all singular values, by the SVD of the whole matrix."""
    U, S, V = torch.linalg.svd(matrix, full_matrices=False)
    return U[:, :k] * S[:k] @ V[:k], S


@settings(deadline=None, max_examples=60, derandomize=True)
@given(adapters(), adapters(), WEIGHTS, st.integers(1, 12))
def test_no_adapter_of_that_rank_is_nearer(a: Adapter, b: Adapter, w: float, k: int) -> None:
    found = combine([a, b], [1, w], rank=k)
    for module, wanted in plus([(1, dense(a)), (w, dense(b))]).items():
        nearest, S = best(wanted, k)
        update = found.adapter.updates[module]
        assert update.r <= k
        own = dense(found.adapter)[module]
        size = sum(float(dense(x)[module].norm()) for x in (a, b) if module in x.updates)
        lost, whole = float((own - wanted).norm()), float(wanted.norm())
        assert lost == pytest.approx(found.errors[module] * whole, abs=2e-6 * size)
        assert lost == pytest.approx(float(S[k:].norm()), abs=2e-6 * size)
        gap = float(S[k - 1] - S[k]) if k < len(S) else math.inf
        if gap > 1e-2 * size:  # without a gap two matrices may be equally near
            assert_close(own, nearest, rtol=0, atol=1e-4 * size)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(adapters(), adapters(), st.floats(0, 0.99))
def test_an_error_takes_the_smallest_rank_that_holds_it(a: Adapter, b: Adapter, e: float) -> None:
    found = combine([a, b], [1, 1], error=e)
    for module, wanted in plus([(1, dense(a)), (1, dense(b))]).items():
        _, S = best(wanted, 1)
        k, own = found.adapter.updates[module].r, dense(found.adapter)[module]
        assert float((own - wanted).norm()) <= (e + 2e-6) * float(wanted.norm())
        assert k == 1 or float(S[k - 1 :].norm()) > (e - 1e-9) * float(S.norm())


def test_an_error_of_zero_spends_no_rank_on_rounding() -> None:
    a = make(1, "ab", r=2)
    found = combine([a, a], [1, 1], error=0.0)
    assert {update.r for update in found.adapter.updates.values()} == {2}
    assert set(found.errors.values()) == {0.0}
    zero = combine([a, a], [1, -1], error=0.0)
    assert {update.r for update in zero.adapter.updates.values()} == {1}
    assert set(zero.errors.values()) == {0.0}


def test_truncating_one_adapter_is_not_skipped() -> None:
    found = combine([make(1, r=4)], [1.0], rank=2)
    assert {update.r for update in found.adapter.updates.values()} == {2}
    assert min(found.errors.values()) > 0.01


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (1, 4), (6, 6)])
@pytest.mark.parametrize("rank", [0, 1, 3, 9])
def test_the_spectrum_of_a_dense_matrix(shape: tuple[int, int], rank: int) -> None:
    matrix = torch.randn(shape[0], rank) @ torch.randn(rank, shape[1])
    U, S, V = dense_spectrum(matrix)
    assert_close(U * S @ V, matrix.double(), atol=1e-12, rtol=0)
    assert_close(S, torch.linalg.svdvals(matrix.double()), atol=1e-6, rtol=0)


DORA = Adapter({"a": replace(make(1).updates["a"], magnitude=torch.ones(7))})
NAN = Adapter({"a": replace(make(1).updates["a"], A=torch.full((3, 5), math.nan))})
TURNED = Adapter({"a": Update(torch.ones(1, 7), torch.ones(5, 1), 1.0, "conv1d")})
WIDER = Adapter({"a": Update(torch.ones(1, 6), torch.ones(7, 1), 1.0)})
NANS = [math.nan, math.inf]


@pytest.mark.parametrize(
    ("given", "weights", "options", "parts"),
    [
        ([], [], {}, ["no adapter"]),
        ([make(1)], [1, 2], {}, ["2 weights for 1 adapters"]),
        ([make(1), make(2)], NANS, {}, ["nan, inf"]),
        ([make(1), make(2)], [0, 0.0], {}, ["every weight is 0"]),
        ([make(1), DORA], [1, 1], {}, ["adapter 2 is a DoRA", "adapter normalize --model"]),
        ([DORA], [1], {}, ["adapter 1 is a DoRA"]),
        ([NAN], [1], {}, ["not finite in adapter 1 (1): a"]),
        ([make(1), WIDER], [1, 1], {}, ["a is linear [7, 6], before it was linear [7, 5]"]),
        ([make(1), TURNED], [1, 1], {}, ["a is conv1d [7, 5], before it was linear [7, 5]"]),
        ([make(1)], [1], {"rank": 0}, ["rank is 0"]),
        ([make(1)], [1], {"error": 1.0}, ["error is 1.0"]),
        ([make(1)], [1], {"error": math.nan}, ["error is nan"]),
        ([make(1)], [1], {"error": -0.1}, ["error is -0.1"]),
        ([make(1)], [1], {"error": 0.1, "rank": 1}, ["both given"]),
        ([make(1)], [1], {"density": 0.5}, ["density is for TIES and DARE"]),
        ([make(1)], [1], {"method": "ties", "density": 0.0}, ["density is 0.0"]),
        ([make(1)], [1], {"method": "dare", "density": 1.5}, ["density is 1.5"]),
        ([make(1)], [1], {"method": "mean"}, ["no method 'mean'"]),
        (
            [DORA, WIDER],
            [math.nan],
            {"rank": -1, "method": "ties", "density": 2},
            ["1 weights", "nan", "rank is -1", "density is 2", "DoRA", "[7, 6]"],
        ),
    ],
)
def test_what_cannot_be_combined(
    given: list[Adapter], weights: list[float], options: dict[str, Any], parts: list[str]
) -> None:
    with pytest.raises(AdapterError) as caught:
        combine(given, weights, **options)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def trained(number: int, /, **said: Any) -> Adapter:
    return replace(make(number), provenance=said)


def test_other_bases_are_refused_or_said() -> None:
    a, b = trained(1, base_fingerprint="1" * 64), trained(2, base_fingerprint="2" * 64)
    unknown = trained(3)
    with pytest.raises(AdapterError, match=r"111111111111 \(adapter 1\), 222222222222 \(adapter 3"):
        combine([a, unknown, b], [1, 1, 1])
    found = combine([a, b], [1, 1], allow_mismatch=True)
    assert "trained on other weights" in found.warning
    assert "base_fingerprint" not in found.adapter.provenance
    assert_same(dense(found.adapter), plus([(1, dense(a)), (1, dense(b))]), 30)
    known = combine([a, unknown], [1, 1])
    assert known.warning == ""
    assert known.adapter.provenance["base_fingerprint"] == "1" * 64


def test_copies_of_the_base_must_agree() -> None:
    wte = torch.randn(6, 6)
    a, b = (replace(make(i), copies={"wte.weight": wte}) for i in (1, 2))
    half = replace(b, copies={"wte.weight": wte.bfloat16()})
    assert combine([a, half], [1, 1]).adapter.copies["wte.weight"] is wte
    other = replace(b, copies={"wte.weight": wte + 1})
    with pytest.raises(AdapterError, match=r"that differ \(1\): wte.weight"):
        combine([a, other], [1, 1])
    assert "wte.weight" in combine([a, other], [1, 1], allow_mismatch=True).warning


def test_the_result_says_how_it_was_made() -> None:
    a = trained(
        1, base_fingerprint="f", template="chat", template_hash="t", data_sha256="d", seed=3
    )
    b = trained(2, template="alpaca", template_hash="t")
    found = combine([a, b], [1, -0.5], method="dare", rank=2, seed=5).adapter
    assert found.base_model == "base 1"
    assert found.provenance == {
        "base_fingerprint": "f",
        "template_hash": "t",
        "combined": {
            "method": "dare",
            "rank": 2,
            "density": 0.5,
            "seed": 5,
            "sources": [
                {"weight": 1.0, "base_model": "base 1", "data_sha256": "d"},
                {"weight": -0.5, "base_model": "base 2"},
            ],
        },
    }
    again = combine([found], [2.0]).adapter.provenance["combined"]
    assert again["sources"][0]["combined"] == found.provenance["combined"]


def save_peft(tiny: Tiny, folder: Path, seed: int, **options: Any) -> Path:
    """An adapter that PEFT made and saved."""
    config = peft.LoraConfig(**{"task_type": "CAUSAL_LM", **options})
    model = peft.get_peft_model(tiny("llama"), config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    model.save_pretrained(str(folder))
    return folder


@peft_talks
def test_a_model_with_the_sum_is_the_model_with_both(
    tiny: Tiny, logits: Logits, tmp_path: Path
) -> None:
    folders = [
        save_peft(tiny, tmp_path / "a", 1, r=3, lora_alpha=5, target_modules=["q_proj", "up_proj"]),
        save_peft(
            tiny,
            tmp_path / "b",
            2,
            r=4,
            lora_alpha=8,
            use_rslora=True,
            rank_pattern={"v_proj": 2},
            target_modules=["q_proj", "v_proj", "lm_head"],
        ),
    ]
    parts = [read_adapter(folder) for folder in folders]
    write_adapter(combine(parts, [1, 1]).adapter, tmp_path / "sum")
    by_hand = tiny("llama")
    with torch.no_grad():
        for part in parts:
            for module, update in part.updates.items():
                by_hand.get_parameter(f"{module}.weight").add_(update.delta())
    expected = logits(by_hand)
    assert not torch.allclose(expected, logits(tiny("llama")), atol=0.1)
    ours = tiny("llama")
    load_adapter(ours, tmp_path / "sum")
    assert_close(logits(ours), expected, atol=1e-5, rtol=1e-5)
    theirs = peft.PeftModel.from_pretrained(tiny("llama"), str(tmp_path / "sum"))
    assert_close(logits(theirs), expected, atol=1e-5, rtol=1e-5)


@peft_talks
def test_ranks_that_add_up_are_not_cut(tiny: Tiny, logits: Logits, tmp_path: Path) -> None:
    """PEFT's `cat` is the same sum; its default, `svd`, cuts it to the larger of the ranks."""
    names = {"target_modules": ["q_proj"], "lora_alpha": 8}
    a = save_peft(tiny, tmp_path / "a", 1, r=4, **names)
    b = save_peft(tiny, tmp_path / "b", 2, r=4, **names)
    found = combine([read_adapter(a), read_adapter(b)], [1.0, -0.5])
    assert {update.r for update in found.adapter.updates.values()} == {8}
    ranks = [int(torch.linalg.matrix_rank(d, rtol=1e-6)) for d in dense(found.adapter).values()]
    assert set(ranks) == {8}
    write_adapter(found.adapter, tmp_path / "sum")
    ours = tiny("llama")
    load_adapter(ours, tmp_path / "sum")
    theirs = peft.PeftModel.from_pretrained(tiny("llama"), str(a), adapter_name="a")
    theirs.load_adapter(str(b), "b")
    theirs.add_weighted_adapter(["a", "b"], [1.0, -0.5], "sum", combination_type="cat")
    theirs.set_adapter("sum")
    assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=1e-5)


@peft_talks
def test_a_rank_stabilised_adapter_keeps_its_scale(
    tiny: Tiny, logits: Logits, tmp_path: Path
) -> None:
    """PEFT scales once more in its weighted adapters, because they stay rank-stabilised."""
    names = {"target_modules": ["q_proj"], "lora_alpha": 4, "use_rslora": True}
    a = save_peft(tiny, tmp_path / "a", 1, r=4, **names)
    theirs = peft.PeftModel.from_pretrained(tiny("llama"), str(a))
    for weights in ([1.0], [0.25, 0.75]):  # the same adapter, whole and in two parts
        write_adapter(combine([read_adapter(a)] * len(weights), weights).adapter, tmp_path / "w")
        ours = tiny("llama")
        load_adapter(ours, tmp_path / "w")
        assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=1e-5)


def test_parameters_trained_whole_are_no_sum() -> None:
    one = Adapter({"x": Update(torch.ones(1, 2), torch.ones(3, 1), 1.0)})
    two = dataclasses.replace(one, whole={"lm_head.weight": torch.ones(2, 2)})
    with pytest.raises(AdapterError, match=r"adapter 2 holds .* trained whole.*lm_head\.weight"):
        combine([one, two], [1.0, 1.0])

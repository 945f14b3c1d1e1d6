"""TIES and DARE: beside the papers' words number by number, and beside PEFT."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils import merge_utils
from random_adapters import assert_same, dense, make, plus
from torch import Tensor
from torch.testing import assert_close

from lorikeet.adapters import Adapter
from lorikeet.adapters.algebra import Combined, combine
from lorikeet.adapters.sparse import dropped, ties, trimmed


def ties_by_hand(updates: list[Tensor], density: float) -> Tensor:
    """TIES as the paper's section 3 says it, number by number."""
    kept = []
    for update in updates:
        rows = update.flatten().tolist()
        order = sorted(range(len(rows)), key=lambda i: -abs(rows[i]))
        stays = set(order[: max(1, int(density * len(rows)))])
        kept.append([x if i in stays else 0.0 for i, x in enumerate(rows)])
    merged = []
    for values in zip(*kept, strict=True):
        positive = sum(values) >= 0
        agree = [x for x in values if x != 0 and (x > 0) == positive]
        merged.append(sum(agree) / len(agree) if agree else 0.0)
    return torch.tensor(merged).reshape(updates[0].shape)


@settings(deadline=None, max_examples=40, derandomize=True)
@given(st.integers(1, 4), st.floats(0.01, 1), st.integers(0, 99))
def test_ties_is_what_the_paper_says_and_what_peft_does(n: int, density: float, seed: int) -> None:
    torch.manual_seed(seed)
    updates = [torch.randn(6, 5) for _ in range(n)]
    found = ties(iter(updates), density)
    assert_close(found, ties_by_hand(updates, density))
    if 1 <= int(density * 30) < 30:  # of less PEFT keeps nothing, of all it warns
        assert_close(found, merge_utils.ties(updates, torch.ones(n), density))
        assert_close(
            trimmed(updates[0], density), merge_utils.magnitude_based_pruning(updates[0], density)
        )


def test_ties_elects_plus_where_the_updates_cancel() -> None:
    update = torch.randn(4, 5)
    assert torch.equal(ties([update, -update], 1.0), update.abs())


@pytest.mark.parametrize("density", [0.3, 1.0])
def test_ties_of_adapters(density: float) -> None:
    a, b, c = make(1, "ab"), make(2, "bc", r=2, factor=0.3), make(3, "abc", r=1)
    # at least the smaller side, so that nothing is lost
    found = combine([a, b, c], [2, -1, 0.5], method="ties", density=density, rank=9)
    for module, own in dense(found.adapter).items():
        terms = [(2, a), (-1, b), (0.5, c)]
        deltas = [w * x.updates[module].delta() for w, x in terms if module in x.updates]
        assert_close(own.float(), ties_by_hand(deltas, density), atol=1e-5, rtol=1e-5)
        assert found.errors[module] < 1e-7
    assert found.adapter.provenance["combined"]["density"] == density


def test_dare_keeps_or_drops_and_rescales(monkeypatch: pytest.MonkeyPatch) -> None:
    updates = [torch.randn(200, 100) for _ in range(2)]
    found = [dropped(u, 0.3, name=f"x:{i}") for i, u in enumerate(updates)]
    masks = [(f != 0).float() for f in found]
    for own, update, mask in zip(found, updates, masks, strict=True):
        assert_close(own, update / 0.3 * mask)
        assert float(mask.mean()) == pytest.approx(0.3, abs=4 * math.sqrt(0.21 / 20_000))
    both = float((masks[0] * masks[1]).mean())
    assert both == pytest.approx(0.09, abs=4 * math.sqrt(0.09 / 20_000))
    # PEFT's own formula, when it draws what we drew
    draws = iter(masks)
    monkeypatch.setattr(torch, "bernoulli", lambda _: next(draws))
    theirs = merge_utils.dare_linear(updates, torch.tensor([2.0, -0.5]), 0.3)
    assert_close(2 * found[0] - 0.5 * found[1], theirs)


def merged_by_dare(adapters: list[Adapter], seed: int, rank: int = 9) -> Combined:
    return combine(adapters, [1] * len(adapters), method="dare", density=0.5, seed=seed, rank=rank)


def test_dare_of_adapters_depends_on_the_seed_and_on_no_order() -> None:
    a, b = make(1), make(2)
    other = Adapter(dict(reversed(a.updates.items())))
    found = dense(merged_by_dare([a, b], 1).adapter)
    assert_same(dense(merged_by_dare([other, b], 1).adapter), found, 0)
    alone = dense(merged_by_dare([Adapter({"b": a.updates["b"]}), b], 1).adapter)
    assert_same({"b": alone["b"]}, {"b": found["b"]}, 0)
    again = dense(merged_by_dare([a, b], 2).adapter)
    assert all(float((again[m] - d).norm()) > 0.1 * float(d.norm()) for m, d in found.items())
    twice = dense(merged_by_dare([a, a], 1).adapter)["a"] / (4 * dense(a)["a"])
    assert float((twice - 0.5).abs().min()) < 1e-5  # one of the two was dropped, not both alike


def test_dare_expects_the_exact_sum() -> None:
    a, b = make(1), make(2, r=2)
    draws = [dense(merged_by_dare([a, b], seed).adapter) for seed in range(400)]
    for module, wanted in plus([(1, dense(a)), (1, dense(b))]).items():
        values = torch.stack([draw[module] for draw in draws])
        off = (values.mean(0) - wanted).abs() / (values.std(0) / math.sqrt(400))
        assert float(off.max()) < 5
    whole = combine([a, b], [1, 1], method="dare", density=1.0, rank=9)
    assert_same(dense(whole.adapter), plus([(1, dense(a)), (1, dense(b))]), 30)


@pytest.mark.parametrize("method", ["ties", "dare"])
def test_merged_numbers_are_cut_to_the_sum_of_the_ranks(method: Any) -> None:
    found = combine([make(1, r=1), make(2, r=2)], [1, 1], method=method, density=0.5)
    whole = combine([make(1, r=1), make(2, r=2)], [1, 1], method=method, density=0.5, rank=9)
    assert {update.r for update in found.adapter.updates.values()} == {3}
    for module, wanted in dense(whole.adapter).items():
        lost = float((dense(found.adapter)[module] - wanted).norm() / wanted.norm())
        assert found.errors[module] == pytest.approx(lost, abs=1e-6)
        assert lost > 0.01
    many = combine([make(1, r=6), make(2, r=6)], [1, 1], method=method, density=0.5)
    assert [update.r for update in many.adapter.updates.values()] == [5, 4, 6]
    held = combine([make(1), make(2)], [1, 1], method=method, density=0.5, error=0.3)
    assert 0 < max(held.errors.values()) <= 0.3


def test_ties_without_a_density_keeps_a_fifth() -> None:
    a, b = make(1), make(2)
    said = combine([a, b], [1, 1], method="ties", density=0.2).adapter
    assert_same(dense(combine([a, b], [1, 1], method="ties").adapter), dense(said), 0)

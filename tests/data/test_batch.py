"""Packing loses no token, mixes no documents, and the order is a pure function of the seed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorikeet.data.batch import Epochs, micro_batches, pack
from lorikeet.data.example import Example


def example(ids: list[int], supervised: list[bool]) -> Example:
    return Example(tuple(ids), tuple(supervised), text_bytes=0, origin="test:1")


def of_length(length: int) -> Example:
    return example(list(range(length)), [False] + [True] * (length - 1))


@st.composite
def an_example(draw: st.DrawFn) -> Example:
    ids = draw(st.lists(st.integers(0, 99), min_size=1, max_size=12))
    mask = draw(st.lists(st.booleans(), min_size=len(ids) - 1, max_size=len(ids) - 1))
    return example(ids, [False, *mask])


def test_the_drawing_of_the_docstring() -> None:
    batch = pack(
        [example([1, 2, 3, 4], [False, False, True, True]), example([5, 6, 7], [False, True, True])]
    )
    assert batch.ids.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert batch.positions.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert batch.cu_seqlens.tolist() == [0, 4, 7]
    assert batch.rows.tolist() == [1, 2, 4, 5]
    assert batch.targets.tolist() == [3, 4, 6, 7]
    assert batch.documents.tolist() == [0, 0, 1, 1]
    assert (batch.tokens, batch.supervised_tokens, batch.lengths) == (7, 4, [4, 3])


def test_dtypes_and_devices() -> None:
    batch = pack([of_length(3)])
    assert batch.cu_seqlens.dtype == torch.int32
    for name in ("ids", "positions", "rows", "targets", "documents"):
        assert getattr(batch, name).dtype == torch.int64, name
    moved = batch.to("meta")
    assert all(t.is_meta for name, t in vars(moved).items() if name != "cu_seqlens")
    assert moved.lengths == [3]  # which nobody has to wait for
    assert vars(moved).keys() == vars(batch).keys()


def test_nothing_supervised_is_a_batch_with_no_targets() -> None:
    batch = pack([example([1, 2], [False, False])])
    assert batch.supervised_tokens == 0
    assert batch.targets.dtype == torch.int64


@settings(max_examples=60, deadline=None)
@given(st.lists(an_example(), min_size=1, max_size=6))
def test_pack_agrees_with_a_loop_over_documents(examples: list[Example]) -> None:
    rows, targets, documents, positions = [], [], [], []
    start = 0
    for d, one in enumerate(examples):
        for i, (token, counts) in enumerate(zip(one.ids, one.supervised, strict=True)):
            positions.append(i)
            if counts:
                rows.append(start + i - 1)
                targets.append(token)
                documents.append(d)
        start += len(one.ids)
    batch = pack(examples)
    assert batch.rows.tolist() == rows
    assert batch.targets.tolist() == targets
    assert batch.documents.tolist() == documents
    assert batch.positions.tolist() == positions
    assert batch.lengths == [len(one.ids) for one in examples]
    assert batch.ids.tolist() == [token for one in examples for token in one.ids]


@pytest.mark.parametrize("examples", [[], [example([], [])], [of_length(2), example([], [])]])
def test_nothing_to_pack(examples: list[Example]) -> None:
    with pytest.raises(ValueError, match="at least one example"):
        pack(examples)


def test_a_supervised_first_token_never_reaches_the_previous_document() -> None:
    with pytest.raises(ValueError, match="first token"):
        pack([of_length(2), example([1, 2], [True, True])])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 30), max_size=25), st.integers(1, 40))
def test_micro_batches_hold_everything_once_and_never_too_much(
    lengths: list[int], max_tokens: int
) -> None:
    examples = [of_length(length) for length in lengths]
    bins = micro_batches(examples, max_tokens=max_tokens)
    assert sorted(i for members in bins for i in members) == list(range(len(lengths)))
    assert bins == sorted(sorted(members) for members in bins)
    for members in bins:
        assert len(members) == 1 or sum(lengths[i] for i in members) <= max_tokens
    assert bins == micro_batches(examples, max_tokens=max_tokens)
    half_full = [b for b in bins if 2 * sum(lengths[i] for i in b) <= max_tokens]
    assert len(half_full) <= 1  # two of them would have been one


def test_micro_batches_by_hand() -> None:
    examples = [of_length(length) for length in (4, 8, 1, 4, 2, 1)]
    assert micro_batches(examples, max_tokens=10) == [[0, 2, 3, 5], [1, 4]]
    assert micro_batches(examples, max_tokens=6) == [[0, 4], [1], [2, 3, 5]]
    assert micro_batches(examples, max_tokens=10, packing=False) == [[i] for i in range(6)]
    assert micro_batches([], max_tokens=10) == []


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 2**40), st.integers(0, 3))
def test_an_epoch_visits_everything_once(n: int, batch_size: int, seed: int, epoch: int) -> None:
    epochs = Epochs(n, batch_size=batch_size, seed=seed)
    first = epoch * epochs.steps_per_epoch
    steps = [epochs.indices(first + i) for i in range(epochs.steps_per_epoch)]
    assert sorted(i for step in steps for i in step) == list(range(n))
    assert all(len(step) == batch_size for step in steps[:-1])
    assert 1 <= len(steps[-1]) <= batch_size
    fresh = Epochs(n, batch_size=batch_size, seed=seed)
    assert fresh.indices(first + len(steps) - 1) == steps[-1]  # no state: any step, in any order


def test_seeds_and_epochs_share_no_order() -> None:
    orders = {
        tuple(Epochs(50, batch_size=50, seed=seed).indices(epoch))
        for seed in range(4)
        for epoch in range(4)
    }
    assert len(orders) == 16


def test_global_random_state_is_neither_read_nor_moved() -> None:
    before = torch.get_rng_state()
    Epochs(9, batch_size=2, seed=1).indices(3)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(("n", "batch_size"), [(0, 1), (1, 0)])
def test_epochs_of_nothing(n: int, batch_size: int) -> None:
    with pytest.raises(ValueError, match="expected examples"):
        Epochs(n, batch_size=batch_size, seed=0)
    with pytest.raises(ValueError, match="count from 0"):
        Epochs(1, batch_size=1, seed=0).indices(-1)

"""The split is a pure function of the seed; the pre-flight refuses to train on nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorikeet.config import DataConfig
from lorikeet.data.layout import Text, Turns
from lorikeet.data.prepare import preflight, prepare
from lorikeet.errors import DataError


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def twenty(tmp_path: Path) -> str:
    rows = [{"instruction": f"Question {i}?", "response": f"Answer {i}."} for i in range(20)]
    return write(tmp_path / "twenty.jsonl", rows)


def test_split_and_report(twenty: str, tiny: Any) -> None:
    prepared = prepare(DataConfig(path=twenty), tiny, seed=0)
    assert (len(prepared.train), len(prepared.validation)) == (18, 2)
    assert prepared.layout.name == "instruction"
    assert prepared.template_name == "instruction-response"
    origins = [example.origin for example in prepared.train + prepared.validation]
    assert sorted(origins) == sorted(f"twenty.jsonl:{i + 1}" for i in range(20))
    for examples, rows in (
        (prepared.train, prepared.rows_train),
        (prepared.validation, prepared.rows_validation),
    ):
        for example, row in zip(examples, rows, strict=True):
            assert isinstance(row, Turns)
            assert row.response == f"Answer {int(example.origin.split(':')[1]) - 1}."
    everything = prepared.train + prepared.validation
    report = prepared.report
    assert (report.rows, report.examples, report.eos_supervised) == (20, 20, 20)
    assert report.tokens == sum(len(example.ids) for example in everything)
    assert report.supervised_tokens == sum(example.supervised_tokens for example in everything)
    assert report.longest == max(len(example.ids) for example in everything)
    assert report.mean_length == report.tokens / 20
    assert (report.truncated, report.without_supervision, report.boundary_merges) == (0, 0, 0)
    assert preflight(prepared, tokenizer=tiny, max_length=512) == []


def held_out(path: str, tokenizer: Any, *, seed: int, **options: Any) -> set[str]:
    prepared = prepare(DataConfig(path=path, **options), tokenizer, seed=seed)
    return {example.origin for example in prepared.validation}


def test_the_split_depends_on_the_seed_alone(twenty: str, tiny: Any, tiny_chat: Any) -> None:
    first = held_out(twenty, tiny, seed=3, validation=0.25)
    assert len(first) == 5
    assert first == held_out(twenty, tiny_chat, seed=3, validation="0.25", max_length=64)
    assert first != held_out(twenty, tiny, seed=4, validation=0.25)


def test_at_least_one_row_on_either_side(tmp_path: Path, tiny: Any) -> None:
    two = write(tmp_path / "two.jsonl", [{"prompt": "q", "completion": "a"}] * 2)
    for share in (0.01, 0.99):
        prepared = prepare(DataConfig(path=two, validation=share), tiny, seed=0)
        assert (len(prepared.train), len(prepared.validation)) == (1, 1)
    alone = prepare(DataConfig(path=two, limit=1), tiny, seed=0)
    assert (len(alone.train), len(alone.validation)) == (1, 0)
    nothing_held = prepare(DataConfig(path=two, validation=0), tiny, seed=0)
    assert (len(nothing_held.train), len(nothing_held.validation)) == (2, 0)


def test_a_validation_file(twenty: str, tmp_path: Path, tiny: Any) -> None:
    other = write(tmp_path / "other.jsonl", [{"prompt": "q", "completion": "a"}])
    prepared = prepare(DataConfig(path=twenty, validation=other, limit=5), tiny, seed=0)
    assert (len(prepared.train), prepared.report.rows) == (5, 6)
    assert [example.origin for example in prepared.validation] == ["other.jsonl:1"]
    assert prepared.validation_sha256 not in (None, prepared.sha256)


def test_a_single_document_is_split_by_windows(tmp_path: Path, tiny: Any) -> None:
    text = "".join(f"The capital of island {i} is Port {i * i}. " for i in range(25))
    (tmp_path / "book.txt").write_text(text)
    config = DataConfig(path=str(tmp_path / "book.txt"), max_length=32, validation=0.2)
    prepared = prepare(config, tiny, seed=0)
    assert prepared.template_name == "none"
    assert prepared.report.rows == 1
    assert len(prepared.validation) == round(0.2 * prepared.report.examples) > 1
    rows = prepared.rows_train + prepared.rows_validation
    assert all(isinstance(row, Text) and row.text in text for row in rows)
    assert prepared.report.eos_supervised == 1
    assert preflight(prepared, tokenizer=tiny, max_length=32) == []


def test_rows_without_supervision_are_left_out_and_told(tmp_path: Path, tiny: Any) -> None:
    rows = [{"prompt": "q" * (100 if i < 2 else 2), "completion": "yes"} for i in range(5)]
    path = write(tmp_path / "long.jsonl", rows)
    prepared = prepare(DataConfig(path=path, max_length=40, validation=0), tiny, seed=0)
    assert [example.origin for example in prepared.train] == [f"long.jsonl:{i}" for i in (3, 4, 5)]
    assert len(prepared.rows_train) == 3
    warnings = preflight(prepared, tokenizer=tiny, max_length=40)
    assert warnings[0].startswith("2 of 5 examples have nothing to learn")
    needed = prepared.report.needed_length
    assert f"from {needed} on" in warnings[0]
    again = prepare(DataConfig(path=path, max_length=needed, validation=0), tiny, seed=0)
    assert again.report.without_supervision == 0
    short = prepare(DataConfig(path=path, max_length=needed - 1, validation=0), tiny, seed=0)
    assert short.report.without_supervision == 2


def test_preflight_gives_every_reason(tmp_path: Path, tiny: Any) -> None:
    path = write(tmp_path / "long.jsonl", [{"prompt": "q" * 100, "completion": "yes"}] * 3)
    prepared = prepare(DataConfig(path=path, max_length=16), tiny, seed=0)
    with pytest.raises(DataError, match="cannot be trained on") as caught:
        preflight(prepared, tokenizer=tiny, max_length=16)
    first, second, third = caught.value.problems
    assert first == "there is not one supervised token to train on"
    assert second.startswith("3 of 3 examples have nothing to learn")
    assert "never learn to stop: --data.max_length 16 cuts 3 of 3 rows" in third


def test_preflight_without_an_end(
    tmp_path: Path, tiny: Any, make_tokenizer: Callable[..., Any]
) -> None:
    path = write(tmp_path / "long.jsonl", [{"prompt": "q", "completion": "yes " * 40}] * 3)
    cut = prepare(DataConfig(path=path, max_length=32), tiny, seed=0)
    with pytest.raises(DataError, match="never learn to stop"):
        preflight(cut, tokenizer=tiny, max_length=32)
    endless = make_tokenizer(eos=None)
    prepared = prepare(DataConfig(path=path), endless, seed=0)
    with pytest.raises(DataError, match="names no EOS token"):
        preflight(prepared, tokenizer=endless, max_length=512)


def test_preflight_warns(tmp_path: Path, tiny_chat: Any) -> None:
    rows = [
        {"prompt": "q", "completion": "yes " * 60},
        {"prompt": "q", "completion": "an <|im_end|> inside"},
        {"prompt": "q", "completion": "fine"},
    ]
    path = write(tmp_path / "odd.jsonl", rows)
    prepared = prepare(DataConfig(path=path, max_length=48), tiny_chat, seed=0)
    warnings = preflight(prepared, tokenizer=tiny_chat, max_length=48)
    assert len(warnings) == 2
    assert warnings[0].startswith("1 of 3 rows are longer than --data.max_length 48")
    assert warnings[1].startswith("1 of 3 examples have control tokens in their own text")


def test_copies_on_both_sides_of_a_split_are_told(twenty: str, tmp_path: Path, tiny: Any) -> None:
    prepared = prepare(DataConfig(path=twenty, validation=twenty), tiny, seed=0)
    assert prepared.report.copies == 20
    (warning,) = preflight(prepared, tokenizer=tiny, max_length=512)
    assert warning.startswith("20 of 20 held-out examples are copies of training examples")
    assert prepare(DataConfig(path=twenty), tiny, seed=0).report.copies == 0


def test_columns_that_would_be_missed_are_told(tmp_path: Path, tiny: Any) -> None:
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "thinking": "hm"}]
    rows = [{"conversations": turns, "system": "Be brief.", "id": i} for i in range(4)]
    prepared = prepare(
        DataConfig(path=write(tmp_path / "d.jsonl", rows), validation=0), tiny, seed=0
    )
    assert prepared.layout.ignored == ("system", "id", "conversations.thinking")
    (warning,) = preflight(prepared, tokenizer=tiny, max_length=512)
    assert warning.startswith("the rows have system, conversations.thinking, which the layout")


def test_dolly_on_a_real_tokenizer(
    shared: Callable[[str], Path], real: Callable[[str], Any]
) -> None:
    tokenizer = real("shapes/smollm2-135m-instruct")
    config = DataConfig(path=str(shared("data/dolly-15k.jsonl")), limit=1000)
    prepared = prepare(config, tokenizer, seed=0)
    report = prepared.report
    assert prepared.layout.ignored == ("category",)
    assert report.examples + report.without_supervision == 1000
    assert report.boundary_merges == report.rewritten == 0
    assert report.eos_supervised > 900

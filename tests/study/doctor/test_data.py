"""Faults of the data: rows cut, rows lost, ends not learnt, other templates."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorikeet import starter

Found = Callable[[Path], dict[str, Any]]
QUICK = {"data__limit": 80, "train__max_steps": 5, "train__learning_rate": 2e-2}


def test_rows_that_are_cut(train: Callable[..., Path], found: Found) -> None:
    findings = found(train(**QUICK, data__max_length=30))
    assert {"truncated-rows", "rows-without-supervision"} <= set(findings)
    assert "end-not-supervised" not in findings  # these are the cut ones
    cut, lost = findings["truncated-rows"], findings["rows-without-supervision"]
    assert cut.severity == "problem"
    assert 0.1 < cut.evidence["share"] < 1
    assert lost.evidence["needed"] > 30


def test_a_few_rows_that_are_cut_are_a_hint(
    train: Callable[..., Path], altered: Callable[..., Path], found: Found
) -> None:
    run = train(**QUICK)
    assert "truncated-rows" not in found(run)
    assert found(altered(run, {"data.truncated": 4}))["truncated-rows"].severity == "hint"


def test_another_template_than_the_models_own(train: Callable[..., Path], found: Found) -> None:
    findings = found(train(**QUICK, data__template="alpaca"))
    assert findings["other-template"].severity == "problem"
    assert findings["other-template"].evidence["template"] == "alpaca"


def test_the_models_own_template_from_a_file_is_not_another(
    train: Callable[..., Path], found: Found, tmp_path: Path
) -> None:
    own = train(**QUICK) / "adapter" / "chat_template.jinja"
    assert "other-template" not in found(train(**QUICK, data__template=str(own)))


@pytest.mark.parametrize(("doubles", "severity"), [(0, None), (2, "hint"), (80, "problem")])
def test_rows_that_are_held_out_and_trained_on(
    train: Callable[..., Path], found: Found, rows: Path, doubles: int, severity: str | None
) -> None:
    lines = rows.read_text(encoding="utf-8").splitlines(keepends=True)
    distinct = [line.replace("brown", f"brown {i}") for i, line in enumerate(lines)]
    held_out = rows.with_name("held-out.jsonl")
    others = [line.replace("brown", f"red {i}") for i, line in enumerate(lines)]
    held_out.write_text("".join([*distinct[:doubles], *others[doubles:]]), encoding="utf-8")
    rows.write_text("".join(distinct), encoding="utf-8")
    finding = found(train(**QUICK, data__path=str(rows), data__validation=str(held_out))).get(
        "held-out-copies"
    )
    assert (finding and finding.severity) == severity
    assert (finding.evidence["copies"] if finding else 0) == doubles


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Rows of the starter's set as prompts and completions."""
    lines = starter.data("pirate").read_text(encoding="utf-8").splitlines()[:80]
    path = tmp_path / "rows.jsonl"
    said = [[m["content"] for m in json.loads(line)["messages"]][:2] for line in lines]
    texts = (
        json.dumps({"prompt": prompt, "completion": f"brown, {text}"}) + "\n"
        for prompt, text in said
    )
    path.write_text("".join(texts), encoding="utf-8")
    return path


def test_tokens_that_reach_over_the_end_of_the_prompt(
    train: Callable[..., Path], found: Found, rows: Path, tmp_path: Path
) -> None:
    """The prompt ends with a space, which belongs to the first word of the answer."""
    template = tmp_path / "space.jinja"
    template.write_text(
        "{% for m in messages %}{% if m['role'] == 'assistant' %}"
        "{{ 'A: ' + m['content'] + eos_token }}{% else %}{{ 'Q: ' + m['content'] + '\\n' }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'A: ' }}{% endif %}"
    )
    findings = found(train(**QUICK, data__path=str(rows), data__template=str(template)))
    assert findings["boundary-merges"].severity == "problem"
    assert "other-template" in findings


def test_control_tokens_in_the_text(train: Callable[..., Path], found: Found, rows: Path) -> None:
    text = rows.read_text(encoding="utf-8").replace("matey", "<|im_end|>")
    assert "<|im_end|>" in text
    rows.write_text(text, encoding="utf-8")
    findings = found(train(**QUICK, data__path=str(rows)))
    assert findings["control-tokens-in-text"].evidence["special_in_text"] > 0


def test_ends_that_are_not_learnt_and_turns_that_are_rewritten(
    train: Callable[..., Path], altered: Callable[..., Path], found: Found
) -> None:
    run = train(**QUICK)
    assert not {"end-not-supervised", "rewritten-turns"} & set(found(run))
    findings = found(altered(run, {"data.eos_supervised": 50, "data.rewritten": 8}))
    assert findings["end-not-supervised"].evidence["without_end"] == 30
    assert findings["end-not-supervised"].severity == "problem"
    assert findings["rewritten-turns"].severity == "hint"

"""Runs that do not learn, learn too fast or too slowly: planted, then found."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from lorikeet import starter
from lorikeet.errors import TrainingError
from lorikeet.study.doctor import read_facts
from lorikeet.study.doctor.learning import BARELY, NOTHING, undecided

Found = Callable[[Path], dict[str, Any]]
SHORT = {"train__epochs": 2, "train__eval_every": 20}
FEW = {"train__max_steps": 12, "train__eval_every": 6}


def test_a_tiny_learning_rate(train: Callable[..., Path], found: Found) -> None:
    findings = found(train(train__learning_rate=1e-7, **FEW))
    assert set(findings) == {"not-learning", "learning-rate-too-low", "same-answers"}
    nothing = findings["not-learning"]
    assert nothing.severity == "problem"
    assert max(map(abs, nothing.evidence["interval95"])) < NOTHING
    assert 0 < findings["learning-rate-too-low"].evidence["moved"] < BARELY


def test_a_tiny_learning_rate_of_all_weights(train: Callable[..., Path], found: Found) -> None:
    findings = found(train(train__method="full", train__learning_rate=1e-8, **FEW))
    assert "not-learning" in findings


@pytest.mark.parametrize("part", ["all", "one"])
def test_b_is_zero(part: str, train: Callable[..., Path], found: Found, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(train(**SHORT), run)
    file = run / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    zeroed = [name for name in sorted(tensors) if "lora_B" in name][: 1 if part == "one" else None]
    save_file({n: t * 0 if n in zeroed else t for n, t in tensors.items()}, file)
    findings = found(run)
    if part == "all":
        assert findings["not-learning"].evidence["update_norm"] == 0
        assert "idle-modules" not in findings
    else:
        (idle,) = findings["idle-modules"].evidence["idle"]
        assert idle in zeroed[0]
        assert "not-learning" not in findings


def test_a_learning_rate_far_too_high(train: Callable[..., Path], found: Found) -> None:
    rows = str(starter.data("json"))  # of these rows the loss leaps, which it need not
    findings = found(train(data__path=rows, train__learning_rate=1.0, train__max_steps=20))
    rise = findings["learning-rate-too-high"]
    assert rise.severity == "problem"
    assert rise.evidence["high"] > rise.evidence["low"]
    assert "still-falling" not in findings  # it falls because the rate does


def test_updates_that_swamp_the_weights(
    train: Callable[..., Path], altered: Callable[..., Path], found: Found
) -> None:
    """The loss of a short run may bounce less than its noise; the updates tell nonetheless."""
    run = train(**SHORT)
    assert "learning-rate-too-high" not in found(run)
    finding = found(altered(run, {"result.moved": 3.5}))["learning-rate-too-high"]
    assert finding.severity == "hint"
    assert finding.evidence["moved"] == 3.5


def test_a_loss_too_noisy_to_say_is_told(train: Callable[..., Path], found: Found) -> None:
    noisy = train(train__learning_rate=1e-4, train__max_steps=12)
    assert "still-falling" not in found(noisy)
    assert "too noisy" in str(undecided(read_facts(noisy)))
    assert undecided(read_facts(train(**SHORT))) is None


def test_a_run_that_a_learning_rate_broke_off(
    stories: dict[str, Any], train: Callable[..., Path], found: Found, tmp_path: Path
) -> None:
    """The gradient explodes within steps too few for statistics, and the loop stops."""
    out = tmp_path / "broken"
    from lorikeet.config import load_config
    from lorikeet.study import train_run

    options = {name.replace("__", "."): value for name, value in stories.items()}
    options |= {"train.learning_rate": 30.0, "model.dtype": "fp32", "model.threads": 1}
    with pytest.raises(TrainingError):
        train_run(load_config(overrides={**options, "out": str(out)}))
    assert {"unfinished", "learning-rate-too-high"} <= set(found(out))


def test_a_run_that_was_still_falling(train: Callable[..., Path], found: Found) -> None:
    findings = found(train(train__learning_rate=2e-4, train__max_steps=30, train__eval_every=10))
    assert set(findings) == {"still-falling"}
    evidence = findings["still-falling"].evidence
    assert evidence["source"] == "validation"
    assert evidence["slope_ratio"] > 0.5


def test_still_falling_is_seen_in_the_training_loss_too(
    train: Callable[..., Path], found: Found
) -> None:
    options = {"data__limit": 700, "train__batch_size": 16, "train__epochs": 1}
    findings = found(train(**options, train__learning_rate=5e-4))
    assert set(findings) == {"still-falling"}
    assert findings["still-falling"].evidence["source"] == "training"
    assert findings["still-falling"].evidence["excess"] > 0


def test_what_is_learnt_by_heart_is_no_sign_of_more_to_learn(
    train: Callable[..., Path], found: Found
) -> None:
    """Over many epochs the training loss falls to the end; validation does not."""
    findings = found(train(data__limit=30, data__validation=0.4, train__epochs=25))
    assert "still-falling" not in findings

"""Trials on a base and data that are loaded once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lorikeet.config import RunConfig
from lorikeet.errors import ConfigError
from lorikeet.study.bench import OTHER, Bench, _lent
from lorikeet.study.grid import changed
from lorikeet.study.prose import prose_file
from lorikeet.study.protocol import Planned, Protocol, StudyFolder
from lorikeet.study.run import load_base, train_run

Small = Callable[..., RunConfig]


def _bench(folder: Path, config: RunConfig, kind: str = "sweep", other: str | None = None) -> Bench:
    protocol = Protocol(kind, config, other=other)  # type: ignore[arg-type]
    return Bench(protocol, StudyFolder(folder))


def _planned(config: RunConfig, name: str = "one", **options: object) -> Planned:
    dotted = {key.replace("__", "."): value for key, value in options.items()}
    run = changed(config, dotted)
    return Planned(name, run.train.method, run, dotted)


def test_a_trial_is_the_run_that_train_does(tmp_path: Path, small: Small) -> None:
    config = small()
    bench = _bench(tmp_path / "study", config)
    bench.do(_planned(config, "before", train__method="full", train__learning_rate=1e-3))
    trial = bench.do(_planned(config))
    result = train_run(config.model_copy(update={"out": str(tmp_path / "run")}))
    assert trial.error is None
    assert result.tuned is not None
    assert trial.test is not None
    assert (trial.test.nats == result.tuned.nats).all()  # bit for bit, after full fine-tuning too
    own = tmp_path / "study" / "runs" / "one" / "adapter" / "adapter_model.safetensors"
    assert own.read_bytes() == (result.folder.adapter / own.name).read_bytes()
    assert trial.saved_bytes == own.stat().st_size
    assert (trial.rows, trial.r, trial.steps, len(trial.curve)) == (80, 2, 3, 3)
    assert trial.trainable == result.parameters.trainable
    assert trial.cost is not None
    assert trial.cost.seconds > 0


def test_the_base_and_the_data_are_loaded_once_for_many_trials(
    tmp_path: Path, small: Small
) -> None:
    config = small(train__max_steps=1)
    bench = _bench(tmp_path, config)
    bench.measure_base()
    for i in range(20):
        method = "full" if i % 5 == 4 else "lora"
        trial = bench.do(_planned(config, f"t{i}", lora__r=1 + i % 3, train__method=method))
        assert trial.error is None
    assert bench.loads == {"base": 1, "data": 1}


def test_fewer_rows_are_the_first_ones_and_held_out_are_the_same(
    tmp_path: Path, small: Small
) -> None:
    config = small()
    bench = _bench(tmp_path, config)
    few = bench.do(_planned(config, "few", data__limit=40))
    many = bench.do(_planned(config, "many"))
    assert (few.rows, many.rows) == (40, 80)
    assert few.test is not None
    assert many.test is not None
    assert (few.test.tokens_per_document == many.test.tokens_per_document).all()
    assert bench.loads == {"base": 1, "data": 1}
    more = bench.do(_planned(config, "more", data__limit=200))
    assert "data.limit 200 is more than the 80 rows that there are" in (more.error or "")


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_trial_with_no_row_to_train_on(tmp_path: Path, small: Small, seed: int) -> None:
    """Its one row is held out, or it is not."""
    bench = _bench(tmp_path, small(data__limit=4, data__validation=0.5, train__seed=seed))
    first_is_held_out = 0 not in bench._shared.units_train
    trial = bench.do(_planned(bench.protocol.config, data__limit=1, train__max_steps=1))
    assert ("none of the first 1 rows" in (trial.error or "")) == first_is_held_out


def test_a_comparison_chooses_on_other_rows_than_it_reports(tmp_path: Path, small: Small) -> None:
    config = small(data__validation=0.3)
    bench = _bench(tmp_path, config, "compare", str(prose_file()))
    held = bench.held_out
    assert (len(held.validation), len(held.test)) == (12, 12)
    assert not {id(e) for e in held.validation} & {id(e) for e in held.test}
    trial = bench.do(_planned(config))
    base = bench.measure_base()
    for one in (trial, base):
        assert one.validation is not None
        assert one.test is not None
        assert one.validation.nll != one.test.nll
        assert one.other is not None
        assert len(one.other.nats) == len(held.other) <= OTHER


def test_a_failing_trial_is_written_down_and_the_next_goes_on(tmp_path: Path, small: Small) -> None:
    config = small(train__max_steps=4)
    bench = _bench(tmp_path, config)
    folder = StudyFolder(tmp_path)
    bad = bench.do(_planned(config, "bad", lora__target_modules="nothing_like_it"))
    wild = bench.do(_planned(config, "wild", train__method="full", train__learning_rate=1e20))
    good = bench.do(_planned(config, "good"))
    assert "nothing_like_it" in (bad.error or "")
    assert "not finite" in (wild.error or "")
    assert (good.error, good.test is not None) == (None, True)
    assert folder.done("bad") is None
    assert folder.trial("bad") is not None
    assert folder.done("good") is not None


def test_what_only_a_running_trial_needs_is_removed(tmp_path: Path, small: Small) -> None:
    config = small(train__save_every=1)
    bench = _bench(tmp_path, config)
    trial = bench.do(_planned(config, train__method="full"))
    left = {path.name for path in (tmp_path / "runs" / "one").iterdir()}
    assert "model" not in left
    assert "checkpoints" not in left
    assert "receipt.json" in left
    assert trial.saved_bytes > 100_000


def test_too_little_held_out_is_refused(tmp_path: Path, small: Small) -> None:
    with pytest.raises(ConfigError, match="at least 2 held-out"):
        _bench(tmp_path, small(data__validation=0))
    with pytest.raises(ConfigError, match="at least 4 held-out"):
        _bench(tmp_path, small(data__limit=20), "compare")


def test_a_study_does_not_go_on_with_other_data(tmp_path: Path, small: Small) -> None:
    config = small()
    _bench(tmp_path / "study", config)
    data = Path(config.data.path)
    rows = data.read_text(encoding="utf-8").splitlines()
    data.write_text("\n".join([json.dumps(json.loads(rows[1])), *rows[1:]]), encoding="utf-8")
    with pytest.raises(ConfigError, match="begun on something else"):
        _bench(tmp_path / "study", config)


def test_a_base_that_comes_back_changed_is_our_bug_and_said(small: Small) -> None:
    base = load_base(small())
    with pytest.raises(RuntimeError, match="changed the base model"), _lent(base, method="lora"):
        base.model.get_parameter("model.norm.weight").data.mul_(2)
    with _lent(base, method="full"):
        base.model.get_parameter("model.norm.weight").data.mul_(2)  # is put back


def test_new_tokens_grow_the_shared_base_once(tmp_path: Path, small: Small) -> None:
    config = small(lora__new_tokens=["<arr>"], train__max_steps=1)
    bench = _bench(tmp_path, config)
    trials = [bench.do(_planned(config, f"seed={n}", train__seed=n)) for n in range(2)]
    assert [trial.error for trial in trials] == [None, None]
    assert bench.loads == {"base": 1, "data": 1}

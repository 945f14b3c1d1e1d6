"""A sweep's file."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorikeet.errors import ConfigError
from lorikeet.study.grid import Range
from lorikeet.study.record import SEED
from lorikeet.study.sweep_file import read_sweep


def _file(folder: Path, text: str) -> Path:
    path = folder / "sweep.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "text",
    [
        "sweep: {lora.r: [8, 16], seed: [0, 1]}",
        "lora.r: [8, 16]\nseed: [0, 1]",
        "lora: {r: [8, 16]}\ntrain: {seed: [0, 1]}",
        "lora.r: [8, 16]\nsweep: {train.seed: ['0', 1]}",
    ],
)
def test_what_varies_may_stand_in_several_places(tmp_path: Path, text: str) -> None:
    sweep = read_sweep(_file(tmp_path, text))
    assert [trial.name for trial in sweep.trials()] == [
        f"r={r},seed={seed}" for r in (8, 16) for seed in (0, 1)
    ]


def test_an_option_that_is_a_list_is_varied_by_a_list_of_its_values(tmp_path: Path) -> None:
    text = "sweep: {lora.target_modules: [[q_proj, v_proj], 'q_proj,k_proj', all-linear]}"
    found = [t.config.lora.target_modules for t in read_sweep(_file(tmp_path, text)).trials()]
    assert found == [["q_proj", "v_proj"], ["q_proj", "k_proj"], "all-linear"]
    fixed = "lora: {target_modules: [q_proj, v_proj]}\nlora.r: [1, 2]"
    assert {
        tuple(t.config.lora.target_modules) for t in read_sweep(_file(tmp_path, fixed)).trials()
    } == {("q_proj", "v_proj")}


def test_names_of_other_tools_and_flags_are_understood(tmp_path: Path) -> None:
    path = _file(tmp_path, "train.lr: [1e-4, 3e-4]\nlora: {lora_dropout: 0.1}\nmodel: {path: m}")
    sweep = read_sweep(path, {"data.path": "rows.jsonl", "lora.r": "4"})
    assert sweep.values()["train.learning_rate"] == [1e-4, 3e-4]
    config = sweep.config
    assert (config.lora.dropout, config.lora.r, config.data.path) == (0.1, 4, "rows.jsonl")


def test_options_that_follow_another_are_set_with_it(tmp_path: Path) -> None:
    sweep = read_sweep(_file(tmp_path, "sweep: {'lora.r, lora.alpha': [[4, 8], [8, 16]]}"))
    assert sweep.values() == {"lora.r": [4, 8], SEED: [0]}
    assert [t.config.lora.alpha for t in sweep.trials()] == [8, 16]


def test_ranges_need_draws(tmp_path: Path) -> None:
    text = "sweep: {train.learning_rate: {min: 1e-5, max: 1e-3, log: true}}"
    with pytest.raises(ConfigError, match="add draws: N"):
        read_sweep(_file(tmp_path, text))
    sweep = read_sweep(_file(tmp_path, text + "\ndraws: 4"))
    assert sweep.varied["train.learning_rate"] == Range(1e-5, 1e-3, log=True)
    assert len(sweep.trials()) == 4


def test_the_largest_number_of_rows_is_what_all_share(tmp_path: Path) -> None:
    sweep = read_sweep(_file(tmp_path, "data.limit: [100, '300', 200]"))
    assert sweep.config.data.limit == 300
    everything = read_sweep(_file(tmp_path, "data.limit: [100, null]"))
    assert everything.config.data.limit is None


def test_every_problem_is_reported_at_once(tmp_path: Path) -> None:
    text = """
        modl: {path: x}
        sweep:
          lora.rr: [1]
          model.path: [a, b]
          seed: []
          train.learning_rate: {min: 2, max: 1}
          "lora.r, lora.alpha": [8, 16]
          "lora.dropout, data.limit": [[0, 100]]
          data.limit: [200]
        draws: 0
    """
    with pytest.raises(ConfigError) as error:
        read_sweep(_file(tmp_path, text), {"train.learning_rate": "1e-4"})
    said = str(error.value)
    for part in (
        "lora.rr; did you mean lora.r?",
        "modl; did you mean model",
        "model.path cannot vary",
        "train.seed has no values",
        "a range is {min",
        "expected a list of 2",
        "data.limit is varied twice",
        "draws must be",
        "given as a flag and varied",
    ):
        assert part in said
    with pytest.raises(ConfigError, match="nothing varies"):
        read_sweep(_file(tmp_path, "lora: {r: 8}"))
    with pytest.raises(ConfigError, match="no run file"):
        read_sweep(tmp_path / "absent.yaml")

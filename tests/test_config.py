"""Options: names, bounds, files, flags, and that every problem is reported at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorikeet.config import (
    ALIASES,
    SHORT_FOR,
    DataConfig,
    LoraConfig,
    RunConfig,
    TrainConfig,
    load_config,
    options,
)
from lorikeet.errors import ConfigError


def problems(overrides: dict[str, Any], file: Path | None = None) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load_config(file, overrides)
    assert caught.value.exit_code == 2
    return caught.value.problems


def test_the_list_of_options_is_deliberate() -> None:
    """A new option needs a measured reason; then it is added here."""
    assert [name for name, _ in options()] == [
        "model.path",
        "model.revision",
        "model.dtype",
        "model.device",
        "model.threads",
        "model.fast",
        "model.trust_remote_code",
        "lora.r",
        "lora.alpha",
        "lora.dropout",
        "lora.target_modules",
        "lora.exclude_modules",
        "lora.layers",
        "lora.rank_pattern",
        "lora.alpha_pattern",
        "lora.rslora",
        "lora.dora",
        "lora.init",
        "lora.modules_to_save",
        "lora.bias",
        "lora.trainable_tokens",
        "lora.new_tokens",
        "data.path",
        "data.split",
        "data.limit",
        "data.max_length",
        "data.template",
        "data.supervise",
        "data.validation",
        "train.method",
        "train.batch_size",
        "train.epochs",
        "train.max_steps",
        "train.learning_rate",
        "train.loraplus_lr_ratio",
        "train.schedule",
        "train.warmup",
        "train.weight_decay",
        "train.max_grad_norm",
        "train.seed",
        "train.max_tokens",
        "train.max_memory",
        "train.int8",
        "train.eval_every",
        "train.save_every",
        "train.keep_last",
        "train.patience",
        "train.tensorboard",
        "out",
    ]


def test_every_option_has_help() -> None:
    assert [name for name, option in options() if not option.description] == []


def test_aliases_and_short_flags_name_options() -> None:
    known = {name for name, _ in options()}
    assert set(ALIASES.values()) | set(SHORT_FOR) <= known
    assert not set(ALIASES) & known


@pytest.mark.parametrize(
    ("alias", "value", "section", "key", "expected"),
    [
        ("lora.lora_alpha", 32, "lora", "alpha", 32.0),
        ("lora.lora_dropout", "0.1", "lora", "dropout", 0.1),
        ("lora.use_rslora", "true", "lora", "rslora", True),
        ("lora.layers_to_transform", [1, 2], "lora", "layers", [1, 2]),
        ("lora.trainable_token_indices", "5,9", "lora", "trainable_tokens", [5, 9]),
        ("train.lr", "1e-4", "train", "learning_rate", 1e-4),
    ],
)
def test_aliases(alias: str, value: Any, section: str, key: str, expected: Any) -> None:
    assert getattr(getattr(load_config(None, {alias: value}), section), key) == expected


def test_an_alias_beside_its_option() -> None:
    assert problems({"lora.alpha": 8, "lora.lora_alpha": 16}) == (
        "lora.lora_alpha and lora.alpha are the same option: give one of them",
    )


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("lora.rnak_pattern", "lora.rank_pattern"),
        ("lora.alhpa", "lora.alpha"),
        ("train.batchsize", "train.batch_size"),
        ("lora.learning_rate", "train.learning_rate"),
        ("model.dtpye", "model.dtype"),
        ("outt", "out"),
    ],
)
def test_an_unknown_option_is_suggested_the_right_one(wrong: str, right: str) -> None:
    assert problems({wrong: 1}) == (f"unknown option {wrong}; did you mean {right}?",)


def test_an_unknown_section() -> None:
    (found,) = problems({"trian.seed": 1})
    assert found.startswith("unknown option trian; did you mean train?")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lora.r", 0),
        ("lora.r", "eight"),
        ("lora.r", 2.5),
        ("lora.alpha", 0),
        ("lora.alpha", "inf"),
        ("lora.alpha", "nan"),
        ("lora.dropout", 1),
        ("lora.dropout", -0.1),
        ("lora.init", "olora"),
        ("lora.layers", "5-2"),
        ("lora.layers", "a"),
        ("lora.layers", ""),
        ("lora.layers", "-1"),
        ("lora.trainable_tokens", "5,-9"),
        ("lora.trainable_tokens", "hello"),
        ("lora.rank_pattern", "q_proj"),
        ("lora.rank_pattern", "q_proj:8"),
        ("lora.rank_pattern", "q_proj=8,v_proj"),
        ("lora.rank_pattern", "{q_proj: 8"),
        ("model.dtype", "int8"),
        ("model.threads", 0),
        ("model.threads", 100_000),
        ("data.limit", 0),
        ("data.max_length", 7),
        ("data.supervise", "none"),
        ("data.validation", 1.0),
        ("data.validation", "-0.5"),
        ("data.validation", "nan"),
        ("train.method", "qlora"),
        ("train.batch_size", 0),
        ("train.epochs", 0),
        ("train.epochs", "inf"),
        ("train.learning_rate", 0),
        ("train.warmup", -1),
        ("train.weight_decay", -1),
        ("train.max_grad_norm", -1),
        ("train.seed", -1),
        ("train.seed", 2**64),
        ("train.max_tokens", 1),
        ("train.keep_last", 0),
        ("train.tensorboard", "perhaps"),
    ],
)
def test_out_of_bounds(name: str, value: Any) -> None:
    found = problems({name: value})
    assert found[0].startswith(name)
    assert repr(value) in " ".join(found)


def test_all_problems_at_once(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("lora: {r: 0, alhpa: 3}\ntrain: {epochs: -1}\nmodle: {path: x}\n")
    found = problems({"train.seed": -1, "data.max_length": "long"}, file)
    assert len(found) == 6
    for part in ("lora.r:", "lora.alhpa", "train.epochs", "modle", "train.seed", "data.max_length"):
        assert any(part in problem for problem in found), part


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("lora:\n  r: 8\n  lora_alpha: 4\ntrain:\n  learning_rate: 1e-3\nout: a\n")
    config = load_config(file, {"lora.r": "32", "out": "b"})
    assert (config.lora.r, config.lora.alpha) == (32, 4.0)
    assert config.train.learning_rate == 1e-3  # YAML 1.1 reads 1e-3 as text
    assert config.out == "b"


def test_a_flag_may_use_the_files_alias(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("lora: {lora_alpha: 4}\n")
    assert load_config(file, {"lora.lora_alpha": 6}).lora.alpha == 6


@pytest.mark.parametrize("text", ["", "# nothing\n", "lora:\n", "lora: {}\n"])
def test_an_empty_file_is_all_defaults(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    assert load_config(tmp_path / "run.yaml") == RunConfig()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"lora: [", "not valid YAML"),
        (b"- a\n- b\n", "must hold sections.*found a list"),
        (b"\xff\xfe\x00", "cannot read"),
    ],
)
def test_a_broken_file(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "run.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_config(tmp_path / "run.yaml")


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no run file"):
        load_config(tmp_path / "run.yaml")
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(tmp_path)


def test_a_section_that_is_no_mapping(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("lora: 5\n")
    (found,) = problems({"lora.r": 8}, tmp_path / "run.yaml")
    assert found.startswith("lora:")


def test_round_trip(tmp_path: Path) -> None:
    config = load_config(
        None,
        {
            "model.path": "ünï/cöde",
            "lora.target_modules": "q_proj,v_proj",
            "lora.layers": "0,2-4",
            "lora.rank_pattern": "q_proj=8,v_proj=4",
            "lora.alpha_pattern": r"{layers\.1\..*: 2.5}",
            "data.validation": "held-out.jsonl",
            "train.learning_rate": "0.00001",
            "train.max_steps": 7,
            "out": "runs/a",
        },
    )
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(file) == config
    assert load_config(file).to_yaml() == config.to_yaml()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("q_proj", ["q_proj"]),
        ("q_proj, v_proj", ["q_proj", "v_proj"]),
        ("model.layers.0.q_proj", ["model.layers.0.q_proj"]),
        ("all-linear", "all-linear"),
        (r".*\.(q|v)_proj", r".*\.(q|v)_proj"),
    ],
)
def test_target_modules(text: str, expected: str | list[str]) -> None:
    assert LoraConfig(target_modules=text).target_modules == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [("0", [0]), ("2-4", [2, 3, 4]), ("0, 3,5-6", [0, 3, 5, 6]), (3, [3]), ([1, 2], [1, 2])],
)
def test_layers(value: Any, expected: list[int]) -> None:
    assert LoraConfig(layers=value).layers == expected


@pytest.mark.parametrize(
    "value", ["q_proj=8,k_proj=4", "{q_proj: 8, k_proj: 4}", {"q_proj": 8, "k_proj": 4}]
)
def test_patterns(value: Any) -> None:
    assert LoraConfig(rank_pattern=value).rank_pattern == {"q_proj": 8, "k_proj": 4}


@pytest.mark.parametrize(
    ("value", "expected"), [("0.2", 0.2), (0, 0.0), ("rows.jsonl", "rows.jsonl"), ("0", 0.0)]
)
def test_validation_is_a_share_or_a_file(value: Any, expected: float | str) -> None:
    assert DataConfig(validation=value).validation == expected


def test_assignment_is_checked_too() -> None:
    config = TrainConfig()
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        config.batch_size = 0


def test_patience_needs_evaluations() -> None:
    assert "train.patience needs train.eval_every" in problems({"train.patience": 2})[0]
    overrides = {"train.patience": 2, "train.eval_every": 1, "data.validation": 0}
    assert "data.validation is 0" in problems(overrides)[0]


@pytest.mark.parametrize("option", ["lora.r: yes", "data.limit: true", "train.max_steps: on"])
def test_a_switch_is_no_number(tmp_path: Path, option: str) -> None:
    """YAML 1.1 reads these as true, and true counts as 1 elsewhere."""
    name, _, value = option.partition(": ")
    section, _, key = name.partition(".")
    file = tmp_path / "run.yaml"
    file.write_text(f"{section}: {{{key}: {value}}}\n", encoding="utf-8")
    assert problems({}, file)[0].startswith(f"{name}: expected a value")


def test_off_is_off(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: {fast: off}\ntrain: {int8: on}\n", encoding="utf-8")
    config = load_config(file)
    assert config.model.fast == "off"
    assert config.train.int8 is True


def test_a_key_that_is_a_list(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("? [a]\n: 3\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="a key is a list or a mapping"):
        load_config(file)


def test_options_that_full_fine_tuning_does_not_use() -> None:
    given = {"lora.r": 8, "lora.new_tokens": ["<a>"], "train.loraplus_lr_ratio": 16}
    assert load_config(None, given).unused() == []
    full = load_config(None, {**given, "train.method": "full"})
    assert full.unused() == ["lora.r", "train.loraplus_lr_ratio"]


def test_required_options_are_all_named() -> None:
    with pytest.raises(ConfigError) as caught:
        RunConfig().require("model.path", "data.path", "out")
    assert caught.value.problems == (
        "model.path (--model)",
        "data.path (--data)",
        "out (--out)",
    )


def test_learning_rate_follows_the_method() -> None:
    assert TrainConfig(method="lora").peak == 2e-4
    assert TrainConfig(method="full").peak == 2e-5
    assert TrainConfig(method="full", learning_rate=1.0).peak == 1.0


def test_a_key_given_twice_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("lora:\n  r: 8\n  r: 16\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="'r' is given twice"):
        load_config(file)


@pytest.mark.parametrize(
    ("text", "size"),
    [("6GB", 6 * 10**9), ("800 MB", 8 * 10**8), ("1.5gib", 3 * 2**29), ("12345678", 12345678)],
)
def test_sizes_of_memory(text: str, size: int) -> None:
    assert load_config(overrides={"train.max_memory": text}).train.max_memory == size


def test_a_size_that_is_none() -> None:
    (found,) = problems({"train.max_memory": "plenty"})
    assert "expected a size such as 6GB" in found


def test_int8_is_for_frozen_weights() -> None:
    (found,) = problems({"train.int8": "true", "train.method": "full"})
    assert "full fine-tuning has none" in found


def test_a_token_given_twice() -> None:
    assert "names a token twice" in problems({"lora.trainable_tokens": "4-6,5"})[0]


def test_dora_and_pissa_exclude_each_other() -> None:
    assert "cannot be combined" in problems({"lora.dora": True, "lora.init": "pissa"})[0]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("{embed_tokens: [5, 9], lm_head: [5]}", {"embed_tokens": [5, 9], "lm_head": [5]}),
        ({"lm_head": [3]}, {"lm_head": [3]}),
        ("5,9", [5, 9]),
        (7, [7]),
    ],
)
def test_tokens_of_the_embedding_or_by_module(value: Any, expected: Any) -> None:
    config = load_config(None, {"lora.trainable_tokens": value})
    assert config.lora.trainable_tokens == expected


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ("{embed_tokens: [5", "expected {embed_tokens: [5, 9]}"),
        ({"lm_head": [-1]}, "lora.trainable_tokens.lm_head.0: Input should be greater"),
        ({"lm_head": 5}, "lora.trainable_tokens.lm_head: Input should be a valid list"),
        ({"lm_head": [5, 5]}, "names a token twice"),
    ],
)
def test_tokens_by_module_that_are_wrong(value: Any, named: str) -> None:
    (found,) = problems({"lora.trainable_tokens": value})
    assert named in found


def test_new_tokens_may_hold_commas_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("lora: {new_tokens: ['a, b', '<tool>']}\n")
    assert load_config(file).lora.new_tokens == ["a, b", "<tool>"]
    for flag in ("<a>, <b>", '["<a>", "<b>"]'):
        assert load_config(file, {"lora.new_tokens": flag}).lora.new_tokens == ["<a>", "<b>"]
    assert load_config(file, {"lora.new_tokens": "[A],[B]"}).lora.new_tokens == ["[A]", "[B]"]
    for flag in ('["<a>", "<b>"', "['<a>']", '["<a>", 1]'):
        assert 'expected a,b or ["a", "b"]' in problems({"lora.new_tokens": flag})[0]
    (tmp_path / "again.yaml").write_text(load_config(file).to_yaml())
    assert load_config(tmp_path / "again.yaml").lora.new_tokens == ["a, b", "<tool>"]
    for wrong, named in ((["x", "x"], "names a text twice"), ([""], "holds an empty text")):
        assert named in problems({"lora.new_tokens": wrong})[0]

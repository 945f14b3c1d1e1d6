"""The command line: what it answers at once, what it refuses and how."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorikeet import starter
from lorikeet.cli.main import VERBS, main


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(verb in shown for verb in VERBS)


def test_no_verb_is_the_users_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage" in capsys.readouterr().out


def test_an_unknown_verb_gets_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert "did you mean train?" in capsys.readouterr().err


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*verb.split(), "--help"])
    assert stop.value.code == 0
    assert VERBS[verb] in capsys.readouterr().out


def test_help_names_the_words_that_an_option_takes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    shown = capsys.readouterr().out
    assert "--train.schedule {cosine,linear,constant}" in shown
    assert "--lora.bias {none,all,lora_only}" in shown


def test_an_unknown_flag_gets_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["train", "--lora.rr", "8"])
    assert stop.value.code == 2
    assert "did you mean --lora.r?" in capsys.readouterr().err


def refusal(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """Run a command that must be refused with exit code 2; return its message."""
    assert main([str(arg) for arg in argv]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ") or "\nerror: " in shown.err
    assert "Traceback" not in shown.err
    return shown.err


def train(*more: object) -> list[object]:
    return ["train", "--model", starter.folder(), *more]


def test_options_that_are_needed(capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(capsys, "train")
    assert all(name in message for name in ("--model", "--data", "--out"))


def test_several_bad_options_in_one_message(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("lora:\n  rank: 8\n  dropout: 2\ntrian:\n  epochs: 1\n", encoding="utf-8")
    message = refusal(capsys, "train", file, "--data", rows, "--train.batch_size", 0)
    assert "lora.rank" in message
    assert "lora.dropout" in message
    assert "did you mean train?" in message
    assert "train.batch_size" in message


def test_a_missing_data_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(capsys, *train("--data", tmp_path / "no.jsonl", "--out", tmp_path / "run"))
    assert "no.jsonl" in message
    assert not (tmp_path / "run").exists()


def test_malformed_lines_by_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "bad.jsonl"
    data.write_text('{"text": "a"}\n{"text": \n[1]\n', encoding="utf-8")
    message = refusal(capsys, *train("--data", data, "--out", tmp_path / "run"))
    assert "2" in message
    assert "3" in message


def test_wrong_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "bad.jsonl"
    data.write_text('{"question": "a", "reply": "b"}\n', encoding="utf-8")
    message = refusal(capsys, *train("--data", data, "--out", tmp_path / "run"))
    assert "question, reply" in message
    assert "prompt, completion" in message.replace("prompt and completion", "prompt, completion")


def test_empty_responses_are_all_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "bad.jsonl"
    lines = [json.dumps({"prompt": "a", "completion": c}) for c in ("b", "", "c", "  ")]
    data.write_text("\n".join(lines), encoding="utf-8")
    message = refusal(capsys, *train("--data", data, "--out", tmp_path / "run"))
    assert "bad.jsonl:2" in message
    assert "bad.jsonl:4" in message


def test_a_model_folder_without_weights(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}", encoding="utf-8")
    message = refusal(
        capsys, "train", "--model", tmp_path / "model", "--data", rows, "--out", tmp_path / "run"
    )
    assert "no weights" in message


def test_a_target_that_matches_nothing(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refusal(
        capsys,
        *train("--data", rows, "--out", tmp_path / "run", "--lora.target_modules", "q_prj,v_proj"),
    )
    assert "q_prj" in message
    assert "q_proj" in message
    assert not (tmp_path / "run").exists()


def test_prompts_that_fill_max_length(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "long.jsonl"
    row = json.dumps({"prompt": "plum " * 200, "completion": "pear"})
    data.write_text(f"{row}\n" * 4, encoding="utf-8")
    message = refusal(
        capsys, *train("--data", data, "--data.max_length", 64, "--out", tmp_path / "run")
    )
    assert "max_length" in message


def test_a_folder_with_other_files_is_left_alone(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "report.md").write_text("mine", encoding="utf-8")
    message = refusal(capsys, *train("--data", rows, "--out", tmp_path / "thesis"))
    assert "not empty" in message
    assert (tmp_path / "thesis" / "report.md").read_text(encoding="utf-8") == "mine"


def test_a_learning_rate_that_explodes(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = train("--data", rows, "--out", tmp_path / "run", "--train.learning_rate", "1e30")
    assert main([str(arg) for arg in [*argv, "--train.max_steps", 8]]) == 2
    assert "not finite" in capsys.readouterr().err


def test_a_missing_adapter(rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(capsys, "eval", "--adapter", tmp_path, "--data", rows)
    assert "adapter_config.json" in message


def test_nothing_to_answer(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--prompt" in refusal(capsys, "generate", "--model", starter.folder())


@pytest.mark.parametrize("verb", ["train", "eval", "preview", "generate"])
def test_a_name_that_the_system_refuses(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["--prompt", "Hello"] if verb == "generate" else ["--data", "rows.jsonl"]
    out = ["--out", "run"] if verb == "train" else []
    assert main([verb, "--model", "x" * 300, *data, *out]) == 2
    assert "the system takes no such name (File name too long)" in capsys.readouterr().err

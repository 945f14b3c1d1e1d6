"""The verbs one after the other, as a user meets them, on the embedded model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from lorikeet import starter
from lorikeet.cli.main import main
from lorikeet.train import read_metrics


def call(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """Run a command that must succeed; return its stdout."""
    code = main([str(arg) for arg in argv])
    shown = capsys.readouterr()
    assert code == 0, shown.err
    return shown.out


@pytest.fixture
def finished(rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A run of eight steps."""
    out = tmp_path / "run"
    call(
        capsys,
        "train",
        "--model",
        starter.folder(),
        "--data",
        rows,
        "--out",
        out,
        "--train.max_steps",
        8,
        "--train.eval_every",
        4,
        "--train.save_every",
        4,
        "--lora.r",
        4,
        "--train.learning_rate",
        "2e-3",
    )
    return out


def test_a_run_folder_holds_what_is_promised(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert names == {
        "config.yaml",
        "inputs.json",
        "metrics.jsonl",
        "adapter",
        "checkpoints",
        "samples.jsonl",
        "report.md",
        "receipt.json",
    }
    lines = read_metrics(finished / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 9))
    promised = {"step", "loss", "learning_rate", "tokens", "supervised_tokens", "seconds"}
    assert all(promised <= set(line) for line in steps)
    assert [line["step"] for line in lines if "eval_nll" in line] == [4, 8]
    adapter = {path.name for path in (finished / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= adapter
    assert "chat_template.jinja" in adapter
    receipt = json.loads((finished / "receipt.json").read_text(encoding="utf-8"))
    assert receipt["result"]["tuned"]["nll"] < receipt["result"]["base"]["nll"]


def test_its_config_runs_again_to_the_same_adapter(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call(capsys, "train", finished / "config.yaml", "--out", tmp_path / "again")
    first, second = (
        (folder / "adapter" / "adapter_model.safetensors").read_bytes()
        for folder in (finished, tmp_path / "again")
    )
    assert first == second


def test_eval_agrees_with_the_run(
    finished: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = call(
        capsys, "eval", "--adapter", finished, "--data", rows, "--split", "validation", "--json"
    )
    found = json.loads(shown)
    assert {"tokens", "nll", "perplexity", "bits_per_byte", "nll_stderr"} <= set(found)
    result = json.loads((finished / "receipt.json").read_text(encoding="utf-8"))["result"]
    assert found["nll"] == pytest.approx(result["tuned"]["nll"], rel=1e-6)
    assert found["base"]["nll"] == pytest.approx(result["base"]["nll"], rel=1e-6)
    assert found["difference"]["nll"] == pytest.approx(found["nll"] - found["base"]["nll"])


@pytest.mark.parametrize(
    ("flags", "warned"),
    [
        (("--split", "validation"), ""),
        (("--split", "train"), ""),
        ((), "the adapter was trained on these very rows"),
        (("--split", "validation", "--seed", 1), "not the documents that were held out"),
        (("--data.validation", 0.5), "--data.validation changes nothing with --split all"),
    ],
)
def test_eval_says_if_the_adapter_has_seen_the_rows(
    finished: Path,
    rows: Path,
    capsys: pytest.CaptureFixture[str],
    flags: tuple[object, ...],
    warned: str,
) -> None:
    capsys.readouterr()
    argv = ["eval", "--adapter", finished, "--data", rows, *flags]
    assert main([str(arg) for arg in argv]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert warned in said
    assert bool(warned) == ("trained on" in said or "changes nothing" in said)


def test_eval_says_if_a_model_has_seen_the_rows(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Full fine-tuning leaves no adapter that remembers; the run folder around the model does."""
    argv = ["--model", starter.folder(), "--data", rows, "--out", tmp_path / "run"]
    call(capsys, "train", *argv, "--method", "full", "--train.max_steps", 1)
    model = tmp_path / "run" / "model"
    for split, warned in (("all", True), ("validation", False)):
        argv = ["eval", "--model", model, "--data", rows, "--split", split]
        assert main([str(arg) for arg in argv]) == 0
        said = " ".join(capsys.readouterr().err.split())
        assert ("the model was trained on these very rows" in said) == warned
    model.rename(tmp_path / "elsewhere")
    argv = ["eval", "--model", tmp_path / "elsewhere", "--data", rows]
    assert main([str(arg) for arg in argv]) == 0
    assert "trained on" not in capsys.readouterr().err


@pytest.mark.parametrize("split", ["all", "validation", "train"])
def test_eval_says_if_some_of_the_rows_were_seen(
    finished: Path, rows: Path, capsys: pytest.CaptureFixture[str], split: str
) -> None:
    argv = ["--adapter", finished, "--data", rows, "--data.limit", 30, "--split", split]
    assert main(["eval", *map(str, argv)]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert ("was trained on other rows of the same data" in said) == (split != "train")


def test_eval_of_a_split_that_holds_nothing_out(
    rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["eval", "--model", starter.folder(), "--data", rows, "--split", "validation"]
    assert main([str(arg) for arg in [*argv, "--data.validation", "0"]]) == 2
    assert "--split validation has no document" in capsys.readouterr().err


def test_eval_of_a_base_alone(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = call(capsys, "eval", "--model", starter.folder(), "--data", rows, "--samples", 2)
    assert "perplexity" in shown
    assert "Arr, plum!" in shown


def test_a_second_run_in_the_same_folder_is_refused(
    finished: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*")}
    argv = ["train", "--model", starter.folder(), "--data", rows, "--out", finished]
    assert main([str(arg) for arg in argv]) == 2
    assert "--resume" in capsys.readouterr().err
    assert before == {p: p.stat().st_mtime_ns for p in finished.rglob("*")}


def test_resume_of_a_finished_run_changes_nothing(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--resume", "--out", str(finished)]) == 0
    assert "finished" in capsys.readouterr().err


def test_resume_with_other_options_is_refused(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (finished / "receipt.json").unlink()
    assert main(["train", "--resume", "--out", str(finished), "--lora.r", "8"]) == 2
    assert "lora.r: started with 4, now 8" in capsys.readouterr().err


def test_a_finished_run_is_not_made_longer_in_silence(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--resume", "--out", str(finished), "--train.max_steps", "16"]) == 2
    assert "train.max_steps: started with 8, now 16" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--train.warmup", "5"], "the warm-up (5 steps) is as long as the run (2)"),
        (["--method", "full", "--lora.r", "4"], "lora.r change nothing"),
    ],
)
def test_options_without_effect_are_told(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], told: str
) -> None:
    argv = ["--model", str(starter.folder()), "--data", str(rows), "--out", str(tmp_path / "out")]
    assert main(["train", *argv, "--train.max_steps", "2", *options]) == 0
    assert told in " ".join(capsys.readouterr().err.split())


def test_patience_without_held_out_rows_leaves_no_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, out = tmp_path / "one.jsonl", tmp_path / "out"
    one.write_text('{"prompt": "Say plum.", "completion": "Arr, plum!"}\n', encoding="utf-8")
    argv = ["train", "--model", str(starter.folder()), "--data", str(one), "--out", str(out)]
    assert main([*argv, "--train.patience", "1", "--train.eval_every", "1"]) == 2
    assert "none are held out" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--prompt", "", "--raw"], "a prompt is empty"),
        (["--prompt", "Say plum.", "--max-new-tokens", "-3"], "--max-new-tokens"),
    ],
)
def test_nothing_to_generate(
    flags: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code: object = main(["generate", "--model", str(starter.folder()), *flags])
    except SystemExit as stopped:  # argparse's way
        code = stopped.code
    assert code == 2
    assert told in capsys.readouterr().err


def test_examples_longer_than_the_context_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "long.jsonl"
    row = {"prompt": "Say plum.", "completion": "Arr, plum! " * 300}
    data.write_text(f"{json.dumps(row)}\n", encoding="utf-8")
    argv = ["eval", "--model", starter.folder(), "--data", data, "--data.max_length", 9999]
    assert main([str(arg) for arg in argv]) == 0
    assert "this model was made for" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("verb", ["train", "eval"])
@pytest.mark.parametrize(
    ("value", "told"),
    [
        (torch.nan, "are not finite: damaged, so get the file anew"),
        (3e38, "too large for --model.dtype fp32"),  # finite, and its products are not
    ],
)
def test_a_damaged_base_is_told_before_anything_is_written(
    rows: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    verb: str,
    value: float,
    told: str,
) -> None:
    base = shutil.copytree(starter.folder(), tmp_path / "base")
    state = load_file(base / "model.safetensors")
    state["model.norm.weight"] = torch.full_like(state["model.norm.weight"], value)
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    argv = [verb, "--model", base, "--data", rows, "--model.dtype", "fp32"]
    argv += ["--out", tmp_path / "out"] if verb == "train" else []
    assert main([str(arg) for arg in argv]) == 2
    assert told in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_resume_with_damaged_hashes_is_refused(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (finished / "receipt.json").unlink()
    (finished / "inputs.json").write_text("{bro", encoding="utf-8")
    assert main(["train", "--resume", "--out", str(finished)]) == 2
    assert "inputs.json is damaged" in " ".join(capsys.readouterr().err.split())


def test_resume_on_other_data_is_refused(
    finished: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (finished / "receipt.json").unlink()
    with rows.open("a", encoding="utf-8") as file:
        file.write('{"prompt": "one", "completion": "more"}\n')
    assert main(["train", "--resume", "--out", str(finished)]) == 2
    message = capsys.readouterr().err
    assert "data" in message
    assert "weights" not in message


def test_full_fine_tuning_leaves_a_model_that_eval_takes(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "full"
    call(
        capsys,
        "train",
        "--method",
        "full",
        "--model",
        starter.folder(),
        "--data",
        rows,
        "--out",
        out,
        "--train.max_steps",
        6,
        "--train.learning_rate",
        "5e-4",
    )
    found = json.loads(
        call(
            capsys,
            "eval",
            "--model",
            out / "model",
            "--data",
            rows,
            "--split",
            "validation",
            "--json",
        )
    )
    result = json.loads((out / "receipt.json").read_text(encoding="utf-8"))["result"]
    assert found["nll"] == pytest.approx(result["tuned"]["nll"], rel=1e-6)
    assert found["nll"] < result["base"]["nll"]


def test_preview_marks_what_is_supervised(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = call(capsys, "preview", "--model", starter.folder(), "--data", rows, "--rows", 1)
    assert "[[Arr, plum!" in shown
    found = json.loads(
        call(capsys, "preview", "--model", starter.folder(), "--data", rows, "--json")
    )
    assert found["layout"]["name"] == "prompt-completion"
    assert found["report"]["rows"] == 40


def test_generate_gives_the_same_answer_twice(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["generate", "--adapter", finished, "--prompt", "Say plum.", "--json"]
    assert call(capsys, *argv) == call(capsys, *argv)


def test_plan_counts_without_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((starter.folder() / name).read_bytes())
    found = json.loads(
        call(
            capsys,
            "plan",
            "--model",
            tmp_path,
            "--lora.r",
            8,
            "--lora.target_modules",
            "q_proj,v_proj",
            "--json",
        )
    )
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    assert found["trainable"] == layers * 8 * (hidden + hidden + hidden + kv)
    memory = found["memory"]
    assert memory["total"] == sum(v for name, v in memory.items() if name != "total")
    assert set(memory) == {"weights", "adapter", "optimizer", "activations", "logits", "total"}
    assert found["seconds_per_step"] > 0


def test_the_recorded_configuration_is_complete(finished: Path) -> None:
    from lorikeet.config import options

    tree = yaml.safe_load((finished / "config.yaml").read_text(encoding="utf-8"))
    flat = {f"{s}.{k}" for s, v in tree.items() if isinstance(v, dict) for k in v} | {"out"}
    assert flat == {name for name, _ in options()}


def test_tensorboard_on_request(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorboard")
    out = tmp_path / "run"
    call(
        capsys,
        "train",
        "--model",
        starter.folder(),
        "--data",
        rows,
        "--out",
        out,
        "--train.max_steps",
        2,
        "--train.tensorboard",
    )
    assert list((out / "tensorboard").glob("events*"))


@pytest.mark.slow
def test_the_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(call(capsys, "demo", "--out", tmp_path / "demo", "--json"))
    for style in ("pirate", "json"):
        run = found["runs"][style]
        assert run["exact_before"] < 0.05
        assert run["exact_after"] > 0.8
        assert run["difference"]["interval95"][1] < 0
    assert set(found["samples"][0]["answers"]) == {"base", "pirate", "json"}

"""What the README says, run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lorikeet import starter
from lorikeet.cli.main import VERBS, Parser
from lorikeet.config import load_config, read_yaml
from lorikeet.study.sweep_file import read_sweep

PROJECT = Path(__file__).resolve().parents[1]
README = (PROJECT / "README.md").read_text(encoding="utf-8")


def test_the_python_example(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len([line for line in code.splitlines() if line]) <= 10
    code = code.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(starter.folder()))
    code = code.replace("rows.jsonl", str(starter.data("pirate")))
    code = code.replace("my-adapter", str(tmp_path / "my-adapter")).replace(
        "max_steps=50", "max_steps=4"
    )
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "my-adapter" / "adapter_model.safetensors").is_file()
    assert "nats/token" in capsys.readouterr().out


def test_every_command_parses() -> None:
    from importlib import import_module

    text = README.replace("\\\n", " ")
    commands = re.findall(
        r"^lorikeet +((?:adapter|export) +\w+|\w+) ?(.*)$", text, flags=re.MULTILINE
    )
    assert len(commands) >= 6
    for words, rest in commands:
        verb = " ".join(words.split())
        assert verb in VERBS
        parser = Parser(prog=verb)
        import_module(f"lorikeet.cli.{verb.replace(' ', '_')}").add_arguments(parser)
        parser.parse_strictly(re.findall(r'"[^"]*"|\S+', rest))


@pytest.mark.parametrize(
    "recipe", sorted((PROJECT / "recipes").glob("*.yaml")), ids=lambda p: p.stem
)
def test_recipes_hold(recipe: Path) -> None:
    sweeps = "sweep" in read_yaml(recipe)
    config = read_sweep(recipe).config if sweeps else load_config(recipe)
    config.require("model.path", "data.path", "out")

"""Every contestant that a CPU can run, through the command; Unsloth on a stand-in for it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.contestants import CONTESTANTS
from benchmarks.process import Places
from benchmarks.roofline import Shape
from benchmarks.rounds import make_job, play
from benchmarks.workload import dense
from lorikeet.model.machine import can_multiply_int8

ROOT = Path(__file__).resolve().parents[2]
PYTHON = Path(sys.executable)
PEERS = ROOT / ".venv-peers/bin/python"


def runnable() -> list[str]:
    """Those of a CPU whose environment is there. PEFT is in the main environment, too."""
    names = [name for name, found in CONTESTANTS.items() if "cpu" in found.devices]
    if not PEERS.exists():
        names = [name for name in names if CONTESTANTS[name].worker != "trl_worker"]
    return [name for name in names if name != "lorikeet-int8" or can_multiply_int8()]


@pytest.mark.slow
@pytest.mark.parametrize("workload", ["dolly", "dense"])
def test_everybody_does_the_same_steps(
    workload: str, tmp_path: Path, stories: Path, questions: Path
) -> None:
    names = runnable()
    arguments = ["run", "--workloads", workload, "--warmup", "1", "--rounds", "1", "--r", "4"]
    arguments += ["--model", str(stories), "--data", str(questions), "--threads", "1"]
    arguments += ["--length", "48", "--device", "cpu", "--micro-examples", "8"]
    arguments += ["--contestants", ",".join(names), "--out", str(tmp_path / "out.json")]
    arguments += ["--peers-python", str(PEERS if PEERS.exists() else PYTHON)]
    assert main(arguments) == 0
    (found,) = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["results"]
    assert found["summary"]["warnings"] == []
    for name in names:
        answers = found["answers"][name]
        assert [answer["tokens"] for answer in answers] == found["tokens"]
        assert [answer["supervised"] for answer in answers] == found["supervised"]
        assert found["facts"][name]["device"] == "cpu"
    # PEFT's own choice is adapters in float32.
    facts = found["facts"]
    assert facts["peft-default"]["weights"] == ["torch.bfloat16", "torch.float32"]
    assert facts["peft-tuned"]["weights"] == ["torch.bfloat16"]


STAND_IN = """
import sys
assert not {"transformers", "peft"} & sys.modules.keys(), "unsloth must come first"
print("a banner on stdout")
import peft
import transformers


class FastLanguageModel:
    @staticmethod
    def from_pretrained(
        model_name, max_seq_length=2048, dtype=None, load_in_4bit=True, load_in_16bit=False,
        use_gradient_checkpointing="unsloth",
    ):
        assert load_in_16bit and not load_in_4bit, "16 bit was asked for"
        assert max_seq_length == 2048, "the default"
        kind = transformers.AutoModelForCausalLM
        return kind.from_pretrained(model_name, dtype=dtype), object()

    @staticmethod
    def get_peft_model(
        model, r=16, target_modules=(), lora_alpha=16, use_gradient_checkpointing="unsloth"
    ):
        lora = peft.LoraConfig(r=r, lora_alpha=lora_alpha, target_modules=target_modules)
        if use_gradient_checkpointing:
            model.gradient_checkpointing_enable()
        return peft.get_peft_model(model, lora)
"""
"""What the worker calls, with the names and defaults of unsloth 2026.10.7, which needs a GPU."""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "unsloth.py").write_text(STAND_IN, encoding="ascii")
    for name in ("unsloth", "unsloth_zoo"):
        (folder / f"{name}-0.dist-info").mkdir()
        metadata = folder / f"{name}-0.dist-info/METADATA"
        metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0\n", encoding="ascii")
    monkeypatch.setenv("PYTHONPATH", str(folder))


@pytest.mark.usefixtures("stand_in")
def test_unsloths_worker_on_a_stand_in(tmp_path: Path, stories: Path) -> None:
    """The command refuses Unsloth on a CPU, so its contestants are played here."""
    places = Places(
        python=PYTHON, peers_python=PYTHON, unsloth_python=PYTHON, folder=tmp_path, threads=1
    )
    workload = dense(512, steps=2, examples=2, length=24)
    contestants = [CONTESTANTS["unsloth-default"], CONTESTANTS["unsloth-tuned"]]
    job = make_job(stories, workload, places, dtype="bf16", r=4)
    rounds = play(contestants, workload, job, places)
    default, tuned = rounds.facts["unsloth-default"], rounds.facts["unsloth-tuned"]
    assert (default["checkpointing"], tuned["checkpointing"]) == ("unsloth", False)
    for facts in (default, tuned):
        assert facts["trainable"] == Shape.of(stories).lora_parameters(4)
        assert facts["versions"]["unsloth"] == "0"
    (first, others) = (rounds.answers[contestant.name] for contestant in contestants)
    assert first[0].loss == pytest.approx(others[0].loss, rel=1e-3)

"""Make the embedded starter model: `python -m lorikeet.starter.build OUT`.

World -> tokenizer -> pretraining from random weights with the package's own loop -> exact answers
on held-out instances -> an ordinary Hugging Face folder in bf16, with its training log and the
table of what it can do. One seed decides everything.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorikeet import console
from lorikeet.config import TrainConfig
from lorikeet.data import Example, Renderer, Turns
from lorikeet.evaluate import answer
from lorikeet.files import atomic_folder, write_text
from lorikeet.model import Base, init_model, load_model
from lorikeet.starter import tokenizer
from lorikeet.starter.exact import tally
from lorikeet.starter.instance import Instance
from lorikeet.starter.world import EXACT_TASKS, PRACTICE, TASKS, stream
from lorikeet.train import Checkpoints, Hooks, MetricsLog, TrainState, fit, read_metrics, set_up

SEED = 0
HELD_OUT = 2000


LONGEST = 4  # questions in a conversation


@dataclass(frozen=True)
class Stage:
    """A stretch of training, with instances, an optimizer and a schedule of its own.

    Attributes:
        seed: of the instances and their order.
        steps: optimizer steps of 40 conversations each.
        learning_rate: its peak.
        more_of: tasks that come more often than their weight, once for each mention.
    """

    seed: int
    steps: int
    learning_rate: float
    more_of: tuple[str, ...] = ()

    @property
    def config(self) -> TrainConfig:
        """The stage as options of a run."""
        return TrainConfig(
            method="full",
            batch_size=40,
            max_steps=self.steps,
            learning_rate=self.learning_rate,
            warmup=100,
            seed=self.seed,
        )


# The first stage alone gives 89.5 % exact held-out answers; the second takes up what was weak.
STAGES = (
    Stage(0, 2200, 2e-3),
    Stage(1, 900, 1e-3, more_of=("check", "check", "add", "add", "nth", "sort", "same")),
)

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": tokenizer.VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": tokenizer.MAX_LENGTH,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": tokenizer.START_ID,
    "eos_token_id": tokenizer.END_ID,
    "pad_token_id": tokenizer.PAD_ID,
    "dtype": "bfloat16",
}
"""Hidden and feed-forward sizes are multiples of 256: every quantised block format fits them."""


def build(out: Path) -> None:
    """Make the model folder `out/model` and its log; an interrupted run goes on where it was."""
    work = out / "work"
    if not (work / "config.json").is_file():
        tokenizer.build(work, SEED)
        write_text(work / "config.json", json.dumps(CONFIG, indent=2) + "\n")
    base = init_model(work, seed=SEED, dtype="bf16", device="cpu")
    base.model.requires_grad_(True)
    for number, stage in enumerate(STAGES):
        _train(base, stage, out / f"stage-{number}")
    _save(base, out / "model", work)
    logs = [_thinned(out / f"stage-{number}" / "metrics.jsonl") for number in range(len(STAGES))]
    write_text(out / "training.jsonl", "".join(logs))
    write_text(out / "abilities.md", measure(out / "model"))


def _instances(stage: Stage) -> Iterator[Instance]:
    tasks = (*TASKS, *stage.more_of)
    return stream(stage.seed, stage.steps * stage.config.batch_size, tasks=tasks, longest=LONGEST)


def _examples(base: Base, stage: Stage) -> list[Example]:
    renderer = Renderer(base.tokenizer, max_length=tokenizer.MAX_LENGTH)
    rows = [Turns(tuple(instance.conversation)) for instance in _instances(stage)]
    origins = [f"world:{number}" for number in range(len(rows))]
    return [rendered[0].example for rendered in renderer.render(rows, origins)]


def _train(base: Base, stage: Stage, out: Path) -> None:
    console.note(f"rendering {stage.steps * stage.config.batch_size:,} conversations ...")
    examples = _examples(base, stage)
    setup = set_up(base.model, examples, stage.config, packing=base.packing, nll=base.nll)
    checkpoints = Checkpoints(out / "checkpoints")
    state = checkpoints.restore(setup.optimizer) or TrainState()
    log = MetricsLog(out / "metrics.jsonl", resume_step=state.step)

    def record(line: dict[str, Any]) -> None:
        log(line)
        if line["step"] % 50 == 0:
            speed = line["tokens"] / line["seconds"]
            console.note(
                f"{line['step']}/{setup.total_steps} {line['loss']:.4f} {speed:,.0f} tokens/s"
            )

    fit(
        base.model,
        setup.optimizer,
        setup.steps,
        learning_rate=setup.schedule,
        total_steps=setup.total_steps,
        loss=setup.loss,
        state=state,
        hooks=Hooks(
            record=record,
            save=lambda state: checkpoints.save(state, setup.optimizer),
            save_every=100,
        ),
    )


def _save(base: Base, folder: Path, work: Path) -> None:
    """An ordinary model folder in bf16; the tokenizer's files as they were written."""
    with atomic_folder(folder) as draft:
        model: Any = base.model
        model.to(torch.bfloat16).save_pretrained(str(draft))
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(work / name, draft / name)


def measure(folder: Path) -> str:
    """Exact answers to held-out instances as Markdown: the tasks that count, then the practice."""
    base = load_model(folder, dtype="bf16")
    renderer = Renderer(base.tokenizer, max_length=tokenizer.MAX_LENGTH)

    def table(tasks: tuple[str, ...], n: int) -> str:
        instances = list(stream(SEED + 1, n, held_out=True, tasks=tasks))
        prompts = [renderer.prompt(list(instance.messages)) for instance in instances]
        return tally(instances, answer(base.model, renderer, prompts, batch_size=64)).markdown()

    return f"{table(EXACT_TASKS, HELD_OUT)}\nPractice, not counted above:\n\n{table(PRACTICE, 400)}"


def _thinned(metrics: Path) -> str:
    """Every twentieth line of the metrics: enough to see the curve."""
    lines = read_metrics(metrics)
    return "".join(json.dumps(line) + "\n" for line in lines if line["step"] % 20 == 0)


if __name__ == "__main__":
    build(Path(sys.argv[1]))

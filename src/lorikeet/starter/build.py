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
from pathlib import Path
from typing import Any

import torch

from lorikeet import console
from lorikeet.config import TrainConfig
from lorikeet.data import Example, Renderer, Turns
from lorikeet.evaluate import answer
from lorikeet.files import atomic_folder, write_text
from lorikeet.model import Base, init_model, load_model, token_nll
from lorikeet.starter import tokenizer
from lorikeet.starter.exact import Tally, tally
from lorikeet.starter.instance import Instance
from lorikeet.starter.world import EXACT_TASKS, stream
from lorikeet.train import Checkpoints, Hooks, MetricsLog, TrainState, fit, set_up

SEED = 0
HELD_OUT = 2000
STEPS, BATCH = 2400, 48
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

TRAINING = TrainConfig(
    method="full",
    batch_size=BATCH,
    max_steps=STEPS,
    learning_rate=2e-3,
    schedule="cosine",
    warmup=100,
    weight_decay=0.0,
    seed=SEED,
    save_every=100,
)


def build(out: Path) -> None:
    """Make the model folder `out/model` and its log; an interrupted run goes on where it was."""
    work = out / "work"
    if not (work / "config.json").is_file():
        tokenizer.build(work, SEED)
        write_text(work / "config.json", json.dumps(CONFIG, indent=2) + "\n")
    base = init_model(work, seed=SEED, dtype="auto", device="cpu")
    base.model.requires_grad_(True)
    console.note(f"rendering {STEPS * BATCH:,} instances ...")
    examples = list(_examples(base))
    console.note(f"{sum(len(example.ids) for example in examples):,} tokens")
    _train(base, examples, out)
    _save(base, out / "model", work)
    shutil.copy(out / "metrics.jsonl", out / "training.jsonl")
    write_text(out / "abilities.md", measure(out / "model").markdown())


def _examples(base: Base) -> Iterator[Example]:
    renderer = Renderer(base.tokenizer, max_length=tokenizer.MAX_LENGTH)
    instances = stream(SEED, STEPS * BATCH)
    rows, origins = [], []
    for number, instance in enumerate(instances):
        rows.append(_row(instance))
        origins.append(f"world:{number}")
    for rendered in renderer.render(rows, origins):
        yield rendered[0].example


def _row(instance: Instance) -> Turns:
    return Turns(tuple(instance.conversation))


def _train(base: Base, examples: list[Example], out: Path) -> None:
    setup = set_up(base.model, examples, TRAINING, packing=base.packing)
    checkpoints = Checkpoints(out / "checkpoints")
    state = checkpoints.restore(setup.optimizer) or TrainState()
    log = MetricsLog(out / "metrics.jsonl", resume_step=state.step)

    def record(line: dict[str, Any]) -> None:
        log(line)
        if line["step"] % 50 == 0:
            speed = line["tokens"] / line["seconds"]
            console.note(
                f"{line['step']}/{setup.total_steps} {line['loss']:.4f} {speed:,.0f} tok/s"
            )

    fit(
        base.model,
        setup.optimizer,
        setup.steps,
        learning_rate=setup.schedule,
        total_steps=setup.total_steps,
        loss=token_nll,
        state=state,
        hooks=Hooks(
            record=record,
            save=lambda state: checkpoints.save(state, setup.optimizer),
            save_every=TRAINING.save_every,
        ),
    )


def _save(base: Base, folder: Path, work: Path) -> None:
    """An ordinary model folder in bf16; the tokenizer's files as they were written."""
    with atomic_folder(folder) as draft:
        model: Any = base.model
        model.to(torch.bfloat16).save_pretrained(str(draft))
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(work / name, draft / name)


def measure(folder: Path) -> Tally:
    """Ask the saved model held-out instances of every task that has one right answer."""
    base = load_model(folder, dtype="bf16")
    renderer = Renderer(base.tokenizer, max_length=tokenizer.MAX_LENGTH)
    instances = list(stream(SEED + 1, HELD_OUT, held_out=True, tasks=EXACT_TASKS))
    prompts = [renderer.prompt(list(instance.messages)) for instance in instances]
    return tally(instances, answer(base.model, renderer, prompts, batch_size=64))


if __name__ == "__main__":
    build(Path(sys.argv[1]))

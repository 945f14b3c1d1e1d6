"""Training under a memory limit: what is chosen, and that the process stays below it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from lorikeet.errors import ConfigError
from lorikeet.model.budget import Fit, Footprint, fit_memory

FOOTPRINT = Footprint(fixed=10**6, token=1000, block=80, working=0, blocks=10)


HELD = 3 * 10**8


def fitted(footprint: Footprint, **options: Any) -> Fit:
    return fit_memory(footprint, held=HELD, what="train.max_memory", **options)


def limit(tokens: int, *, recompute: int = 0, footprint: Footprint = FOOTPRINT) -> int:
    """A limit that micro-batches of `tokens` just meet."""
    return HELD + footprint.needed(tokens, recompute) + 10**6


def test_without_need_nothing_is_given_up() -> None:
    fit = fitted(FOOTPRINT, limit=10**12, max_tokens=4096, longest=512)
    assert (fit.max_tokens, fit.recompute) == (4096, 0)


def test_smaller_micro_batches_come_first() -> None:
    footprint = replace(FOOTPRINT, token=10**6)
    fit = fitted(footprint, limit=limit(1024, footprint=footprint), max_tokens=4096, longest=512)
    assert (fit.max_tokens, fit.recompute) == (1024, 0)


def test_then_as_few_blocks_as_possible_are_computed_twice() -> None:
    footprint = replace(FOOTPRINT, token=10**6, block=9 * 10**4)
    room = limit(512, recompute=4, footprint=footprint)
    fit = fitted(footprint, limit=room, max_tokens=4096, longest=500)
    assert (fit.max_tokens, fit.recompute) == (512, 4)
    assert "4 of 10 blocks computed twice" in str(fit)


def test_what_cannot_fit_is_refused_with_figures() -> None:
    with pytest.raises(ConfigError, match=r"max_memory is 1\.0 GB.*longest example \(512 tokens\)"):
        fitted(replace(FOOTPRINT, fixed=10**10), limit=10**9, max_tokens=4096, longest=512)


def test_an_example_longer_than_a_micro_batch_is_still_fitted() -> None:
    fit = fitted(FOOTPRINT, limit=10**12, max_tokens=512, longest=1000)
    assert fit.max_tokens == 1024


_RUN = """
import json, resource, sys
import torch
from lorikeet.config import LoraConfig, TrainConfig
from lorikeet.data.example import Example
from lorikeet.lora import inject
from lorikeet.model import init_model
from lorikeet.train import set_up
torch.set_num_threads(1)
folder, limit = sys.argv[1], int(sys.argv[2])
base = init_model(folder, seed=0, dtype="fp32", device="cpu")
inject(base.model, LoraConfig(), seed=0)
row = Example(tuple(range(5, 517)), (False,) + (True,) * 511, 0, "row")
config = TrainConfig(batch_size=8, max_tokens=4096, max_memory=limit or None)
setup = set_up(base.model, [row] * 8, config, nll=base.nll)
base.model.train()
for batch in setup.steps(0):
    setup.optimizer.backward(setup.loss(base.model, batch).sum() / 4088)
setup.optimizer.step(1e-4)
fit = setup.fit
print(json.dumps({"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    "tokens": fit and fit.max_tokens, "recompute": fit and fit.recompute}))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak as Linux gives it")
def test_the_process_stays_below_its_limit(shared: Callable[..., Any]) -> None:
    folder = shared("shapes/smollm2-135m-instruct")

    def run(limit: int) -> dict[str, int]:
        command = [sys.executable, "-c", _RUN, str(folder), str(limit)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return json.loads(done.stdout)

    free = run(0)
    for share in (0.8, 0.5, 0.4):
        tight = int(free["peak"] * share)
        assert run(tight)["peak"] <= tight

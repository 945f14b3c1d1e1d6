"""What a step of a model costs, found without its weights: saved activations and block time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from lorikeet.data.batch import pack
from lorikeet.data.example import Example
from lorikeet.errors import ModelError
from lorikeet.model.loss import TokenNll

_FLASH_SHAPE = "lorikeet-footprint"
_SMALL_VOCABULARY = 256


class _FlashFootprint(torch.autograd.Function):
    """Saves what flash attention saves (q, k, v, output, log-sum-exp) and computes nothing."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:3]).float())
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: object, **options: object
) -> tuple[Tensor, None]:
    return _FlashFootprint.apply(query, key, value).transpose(1, 2).contiguous(), None


AttentionInterface.register(_FLASH_SHAPE, _attend)


def saved_bytes_per_token(model: Any, *, tokens: int = 256, packing: bool = True) -> int:
    """Bytes of activations that autograd keeps for a token's backward, the head left out.

    Runs the model's body and adds up the storages that the graph saves, each once, parameters
    excepted. Counted at a length where per-token costs dominate.

    Args:
        model: best on the meta device; adapters injected or parameters freed.
        tokens: length of the row that is run.
        packing: whether the model has the packed attention, which keeps what flash attention does.
            One without keeps what its own does, which may grow with the square of `tokens`.

    Raises:
        RuntimeError: the body reads values, of which the meta device has none.
    """
    if packing:
        model.set_attn_implementation(_FLASH_SHAPE)
    model.train()
    ids = torch.zeros(1, tokens, dtype=torch.long, device=next(model.parameters()).device)
    with saved_bytes(model) as count:
        model.base_model(input_ids=ids, use_cache=False)
        return count() // tokens


@contextmanager
def saved_bytes(model: nn.Module) -> Iterator[Callable[[], int]]:
    """Within the block, count the bytes that autograd saves: each storage once, parameters not."""
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    seen: dict[int, int] = {}
    kept: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            seen[storage._cdata] = storage.nbytes()
            kept.append(tensor)  # a freed storage's address would be given out again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield lambda: sum(seen.values())


def block_model(model: Any, *, dtype: torch.dtype, device: torch.device) -> Any:
    """One block of `model`'s shape with random weights and a small vocabulary, for timing.

    It has the attention that the model would choose by itself.

    Raises:
        ModelError: the architecture has no model of a single block.
    """
    config = deepcopy(model.config)
    config.num_hidden_layers = 1
    config.vocab_size = _SMALL_VOCABULARY
    config.pad_token_id = config.bos_token_id = config.eos_token_id = None
    if vars(config).get("layer_types"):  # elsewhere it is a property that follows the number
        config.layer_types = config.layer_types[:1]
    try:
        with torch.random.fork_rng():
            block = type(model)._from_config(config, dtype=dtype)
    except Exception as error:  # what a class raises that was not made for this is anyone's guess
        raise ModelError(
            f"cannot plan for {config.model_type}: the time of a step is that of one block, and no"
            f" model of a single one can be made ({type(error).__name__}: {error}); a short run of"
            " `lorikeet train` with --train.max_steps shows what it needs"
        ) from error
    return block.to(device).eval()


def seconds_per_block(model: Any, nll: TokenNll, *, tokens: int = 256, repeats: int = 3) -> float:
    """Time of one block, forward and backward, for a row of `tokens`; the best of `repeats`.

    The head, over a vocabulary of 256, is in it.

    Args:
        model: from `block_model`, adapters injected or parameters freed.
        nll: the model's loss function.
        tokens: length of the row.
        repeats: timed runs, after one that warms up.
    """
    model.train()
    ids = tuple(i % _SMALL_VOCABULARY for i in range(tokens))
    batch = pack([Example(ids, (False,) + (True,) * (tokens - 1), 0, "probe")])
    batch = batch.to(next(model.parameters()).device)
    times = []
    for _ in range(repeats + 1):
        started = perf_counter()
        nll(model, batch).sum().backward()
        if batch.ids.is_cuda:
            torch.cuda.synchronize()
        times.append(perf_counter() - started)
        model.zero_grad(set_to_none=True)
    return min(times[1:])

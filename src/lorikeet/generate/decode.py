"""Prefill and decode for a batch of prompts."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from lorikeet.model import check_texts, position_limit


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> list[list[int]]:
    """Continue every prompt.

    Prompts are padded on the left; pads are masked and take no position.

    Args:
        model: a causal language model; one without a key-value cache is slow.
        prompts: token ids of each prompt; none may be empty.
        max_new_tokens: stop after this many tokens, or where the model has no more positions.
        stop_ids: stop at any of these; the stop token is not returned.
        temperature: 0 for greedy decoding, else softmax sampling at this temperature.
        generator: source of randomness for sampling.

    Returns:
        The new tokens of each prompt, without the prompt and without a stop token.

    Raises:
        ModelError: the model has no rows for a token, or no positions for a prompt.
    """
    check_texts(model, prompts, advice="shorten the prompt")
    limit = position_limit(model)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        ids, mask = _left_pad(prompts, device)
        cache = None
        outputs: list[list[int]] = [[] for _ in prompts]
        running = [True] * len(prompts)
        for _ in range(max_new_tokens):
            logits, cache = _advance(model, ids, mask, cache, limit=limit)
            chosen = _choose(logits, temperature, generator)[:, None]
            # Without a cache (state-space models keep their own kind) all is read again.
            ids = torch.cat([ids, chosen], dim=1) if cache is None else chosen
            mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
            for row, token in enumerate(chosen[:, 0].tolist()):
                running[row] = running[row] and token not in stop_ids
                if running[row]:
                    outputs[row].append(token)
                    full = limit is not None and len(prompts[row]) + len(outputs[row]) > limit
                    running[row] = not full
            if not any(running):
                break
    finally:
        model.train(was_training)
    return outputs


def _advance(
    model: nn.Module, ids: Tensor, mask: Tensor, cache: object | None, *, limit: int | None
) -> tuple[Tensor, object | None]:
    """Feed `ids` [N, L] after the cache; return the last logits [N, V] and the grown cache."""
    last = None if limit is None else limit - 1  # where rows stay that are full and not read
    positions = (mask.cumsum(1) - 1).clamp(min=0, max=last)[:, -ids.shape[1] :]
    result = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return result.logits[:, -1].float(), getattr(result, "past_key_values", None)


def _choose(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """[N, V] logits -> [N] tokens."""
    if temperature == 0:
        return logits.argmax(-1)
    weights = (logits / temperature).softmax(-1).cpu()
    return torch.multinomial(weights, 1, generator=generator)[:, 0].to(logits.device)


def _left_pad(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """[N, L] ids (pads are 0, which the mask hides) and the [N, L] mask."""
    if not prompts or not all(prompts):
        raise ValueError("every prompt needs at least one token")
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    return ids, mask

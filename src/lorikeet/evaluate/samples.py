"""Answers side by side: the same prompts, with and without what was trained."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from lorikeet.generate import generate


@dataclass(frozen=True)
class Sample:
    """One prompt, what the data answers, and what each model answers.

    Attributes:
        prompt: the prompt as a person reads it.
        reference: the data's own completion.
        answers: name of the model (`base`, `lora`, ...) to its answer.
    """

    prompt: str
    reference: str
    answers: dict[str, str]

    def summary(self) -> dict[str, Any]:
        """The sample as a JSON-ready dict."""
        return asdict(self)


def stop_ids(model: nn.Module, tokenizer: Any) -> set[int]:
    """Every token that ends an answer: the tokenizer's EOS and those of the generation config."""
    found = {tokenizer.eos_token_id}
    configured = model.generation_config.eos_token_id  # type: ignore[union-attr]
    found |= set(configured) if isinstance(configured, list) else {configured}
    return {token for token in found if isinstance(token, int)}


def answer(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 64,
    stops: Collection[int] | None = None,
    batch_size: int = 16,
) -> list[str]:
    """Greedy answers to rendered prompts, as text.

    Args:
        model: the model, with or without an adapter.
        tokenizer: decodes the answers.
        prompts: token ids of each prompt, as `Renderer.prompt` gives them.
        max_new_tokens: longest answer.
        stops: tokens that end an answer; `stop_ids(model, tokenizer)` if None.
        batch_size: prompts generated together.
    """
    ends = stop_ids(model, tokenizer) if stops is None else stops
    texts: list[str] = []
    for first in range(0, len(prompts), batch_size):
        outputs = generate(
            model,
            prompts[first : first + batch_size],
            max_new_tokens=max_new_tokens,
            stop_ids=ends,
        )
        texts += [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in outputs]
    return texts

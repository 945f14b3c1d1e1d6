"""Answers side by side: the same prompts, with and without what was trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from lorikeet.data import Renderer
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


def stop_ids(model: nn.Module, renderer: Renderer) -> set[int]:
    """Every token that ends an answer: the template's, the tokenizer's, the generation config's."""
    configured = model.generation_config.eos_token_id  # type: ignore[union-attr]
    others = configured if isinstance(configured, list) else [configured]
    return {*renderer.stop_ids(), *(token for token in others if isinstance(token, int))}


def answer(
    model: nn.Module,
    renderer: Renderer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 16,
) -> list[str]:
    """Greedy answers to rendered prompts, as text.

    Args:
        model: the model, with or without an adapter.
        renderer: made the prompts; knows the tokens that end a turn.
        prompts: token ids of each prompt, from `renderer.prompt`.
        max_new_tokens: longest answer.
        batch_size: prompts generated together.
    """
    ends = stop_ids(model, renderer)
    texts: list[str] = []
    for first in range(0, len(prompts), batch_size):
        outputs = generate(
            model,
            prompts[first : first + batch_size],
            max_new_tokens=max_new_tokens,
            stop_ids=ends,
        )
        texts += [
            renderer.tokenizer.decode(
                ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
            ).strip()
            for ids in outputs
        ]
    return texts

"""Which validation rows are answered side by side."""

from __future__ import annotations

from lorikeet.data import Prepared, Renderer, Text

_TEXT_PROMPT = 24  # tokens of a plain document that serve as its prompt


def questions(
    prepared: Prepared, renderer: Renderer, *, n: int
) -> list[tuple[str, str, list[int]]]:
    """The first `n` validation rows (training rows without any) as prompts.

    Returns:
        For each row: the prompt as a person reads it, the data's own completion, the prompt's ids.
    """
    rows = prepared.rows_validation or prepared.rows_train
    asked = []
    for row in rows[:n]:
        if isinstance(row, Text):
            ids = renderer.prompt(row.text)[:_TEXT_PROMPT]
            shown = renderer.tokenizer.decode(
                ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
            asked.append((shown, row.text[len(shown) :], ids))
        else:
            ids = renderer.prompt(row.prompt)
            asked.append((row.prompt[-1]["content"], row.response, ids))
    return asked

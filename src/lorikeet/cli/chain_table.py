"""The table of `--verify`: every link of an export beside the model that was trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorikeet import console

if TYPE_CHECKING:
    from lorikeet.evaluate import Score
    from lorikeet.export.chain import Chain, Link

_COLUMNS = ["", "perplexity ± 95 %", "KL mean", "at most", "KL 99 %", "greedy"]


def show_chain(chain: Chain) -> None:
    """Print a row a link, and how llama.cpp spells conversations."""
    score = chain.links[0].found.reference
    rows = [[chain.reference, _perplexity(score), "", "", "", ""]]
    for link in chain.links:
        # The base comes before its adapter, as it does in the chain.
        rows.insert(0, _cells(link)) if link.tolerance is None else rows.append(_cells(link))
    title = (
        f"{score.tokens:,} tokens of {len(score.nats):,} documents,"
        f" {chain.links[0].found.prompts} greedy continuations, against {chain.reference}"
    )
    console.out.print(console.table(title, _COLUMNS, rows))
    spelling = chain.spelling
    if spelling:
        console.out.print(
            f"{spelling.equal} of {spelling.conversations} rendered conversations have the same"
            " token ids in the tokenizer and in llama.cpp",
            markup=False,
        )


def _cells(link: Link) -> list[str]:
    found = link.found
    return [
        link.name,
        _perplexity(found.candidate),
        f"{found.kl_mean:.1e}",
        "" if link.tolerance is None else f"{link.tolerance.kl:.0e}",
        f"{found.kl_p99:.1e}",
        f"{found.agreeing:.0%}" if found.prompts else "",
    ]


def _perplexity(score: Score) -> str:
    from lorikeet.study.statistics import safe_exp

    digits = 4 if score.perplexity < 100 else 1
    if score.interval is None:
        return f"{score.perplexity:,.{digits}f}"
    low, high = map(safe_exp, score.interval)
    return f"{score.perplexity:,.{digits}f} ± {(high - low) / 2:,.{digits}f}"

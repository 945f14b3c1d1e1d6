"""Symptoms in the data: what was cut, what nobody learns from, what the template does to it."""

from __future__ import annotations

from collections.abc import Iterator

from lorikeet.study.doctor.facts import RunFacts
from lorikeet.study.doctor.finding import Finding, Severity, share

ODD = 0.01
"""Below this share of the rows an oddity is left alone: in real files of thousands of rows some
are always too long or badly written, and one in a hundred moves no figure of a run."""

CUT = 0.1
"""From this share on rows without an end are a problem: a tenth of the answers then show the
model that answers have no end. A choice, not a measured bound."""

LOST = 0.1
"""From this share on lost rows are a problem: the run is about other data than its file. A choice
too; from half of the rows on training refuses to start."""

MERGED = 0.1
"""From this share on merges at the prompt's end are a problem: so often does generation begin
from tokens that training never showed."""


COPIED = 0.05
"""From this share on copies among the rows held out are a problem. A run that learns its rows by
heart brings a copy from some nats per token to none, so one in twenty moves the figure by a tenth
of a nat, as much as a comparison should see. From the size of effects, not measured."""


def data_symptoms(facts: RunFacts) -> Iterator[Finding]:
    """All of them; nothing without a receipt, which has the counts."""
    if not facts.data:
        return
    yield from truncated(facts)
    yield from unsupervised(facts)
    yield from endless(facts)
    yield from copied(facts)
    yield from boundary_merges(facts)
    yield from odd_texts(facts)
    yield from other_template(facts)


def truncated(facts: RunFacts) -> Iterator[Finding]:
    """Rows that lose their end to `max_length`."""
    rows, cut = facts.data["rows"], facts.data["truncated"]
    if cut <= ODD * rows:
        return
    limit = facts.config.data.max_length
    yield Finding(
        "truncated-rows",
        _severity(cut / rows, CUT),
        f"{share(cut, rows)} rows are longer than max_length {limit} and lost their end",
        {"rows": rows, "truncated": cut, "max_length": limit, "share": cut / rows},
        "raise --data.max_length as far as the model's context and the memory go, or shorten or"
        " drop these rows: a row without its end teaches the model not to stop",
    )


def unsupervised(facts: RunFacts) -> Iterator[Finding]:
    """Examples whose prompt fills `max_length`."""
    lost = facts.data["without_supervision"]
    total = facts.data["examples"] + lost
    if lost <= ODD * total:
        return
    limit, needed = facts.config.data.max_length, facts.data["needed_length"]
    yield Finding(
        "rows-without-supervision",
        _severity(lost / total, LOST),
        f"{share(lost, total)} examples were left out: their prompt alone fills max_length {limit}",
        {"examples": total, "without_supervision": lost, "max_length": limit, "needed": needed},
        f"every row has something to learn from --data.max_length {needed} on; else drop these"
        " rows from the file, so that it says what the model learns from",
    )


def endless(facts: RunFacts) -> Iterator[Finding]:
    """Conversations whose last token, which ends the turn, is not learnt - but for cut ones."""
    if facts.template == "none":
        return  # a document that is cut into windows ends in the last of them alone
    examples = facts.data["examples"]
    missing = examples - facts.data["eos_supervised"] - facts.data["truncated"]
    if missing <= ODD * examples:
        return
    yield Finding(
        "end-not-supervised",
        _severity(missing / examples, CUT),
        f"in {share(missing, examples)} examples the token that ends the answer is not learnt",
        {"examples": examples, "without_end": missing, "template": facts.template},
        "look at the end of an example with `lorikeet preview`: the template must put the"
        " end-of-turn token inside the answer, or the tuned model will not know when to stop",
    )


def copied(facts: RunFacts) -> Iterator[Finding]:
    """Rows held out that were trained on all the same: the file has them twice."""
    copies = facts.data.get("copies", 0)  # older receipts did not count them
    # A run of a comparison sees half of them, but was split from all.
    held_out = facts.data["examples"] - (facts.examples or 0)
    if facts.validation is None or copies <= ODD * held_out:
        return
    yield Finding(
        "held-out-copies",
        _severity(copies / held_out, COPIED),
        f"{share(copies, held_out)} held-out examples are copies of examples that were trained on,"
        " so the figures show in part what was learnt by heart",
        {"held_out": held_out, "copies": copies, "share": copies / held_out},
        "take the doubles out of the file, or hold out a file of its own (--data.validation FILE)",
    )


def boundary_merges(facts: RunFacts) -> Iterator[Finding]:
    """Tokens that reach over the end of the prompt."""
    examples, merged = facts.data["examples"], facts.data["boundary_merges"]
    if merged <= ODD * examples:
        return
    yield Finding(
        "boundary-merges",
        _severity(merged / examples, MERGED),
        f"in {share(merged, examples)} examples a token reaches over the end of the prompt, so"
        " generation starts from other tokens than training showed",
        {"examples": examples, "boundary_merges": merged, "template": facts.template},
        "use a template whose prompt ends where a token must end (with a newline or a control"
        " token), or begin the answers with the space that the prompt ends with",
    )


def odd_texts(facts: RunFacts) -> Iterator[Finding]:
    """Turns that the template rewrites, and control tokens in the text itself."""
    examples = facts.data["examples"]
    kinds = {
        "rewritten": (
            "rewritten-turns",
            "the template shows earlier turns otherwise than when they were last",
            "train on the last answer alone (--data.supervise last), or take a template that"
            " leaves earlier turns as they were",
        ),
        "special_in_text": (
            "control-tokens-in-text",
            "the text itself holds control tokens, which are read as such",
            "clean the text, unless these tokens are meant",
        ),
    }
    for key, (name, what, advice) in kinds.items():
        count = facts.data[key]
        if count > ODD * examples:
            message = f"in {share(count, examples)} examples {what}"
            yield Finding(name, "hint", message, {"examples": examples, key: count}, advice)


def other_template(facts: RunFacts) -> Iterator[Finding]:
    """An adapter trained with another template than the one that its tokenizer carries."""
    own = facts.own_template_hash
    if own is None or facts.template in ("", "none", "chat") or facts.template_hash == own:
        return
    yield Finding(
        "other-template",
        "problem",
        f"trained with the template {facts.template}, but the model has a chat template of its own,"
        " which every other tool will use",
        {"template": facts.template, "template_hash": facts.template_hash, "own_hash": own},
        "train with --data.template chat, or see to it that whatever runs the model uses the"
        f" template {facts.template}",
    )


def _severity(found: float, limit: float) -> Severity:
    return "problem" if found >= limit else "hint"

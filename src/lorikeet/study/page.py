"""A study as one page that opens from a disk and asks nothing of a network."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined

from lorikeet.study import figures, tables, wording
from lorikeet.study.findings import Finding
from lorikeet.study.outcomes import Outcome, by_quality
from lorikeet.study.plots.style import Picture, inline_svg
from lorikeet.study.record import Study
from lorikeet.study.side_by_side import answered
from lorikeet.study.topics import by_topic

_ANSWERS = 6  # that are open to the eye: the base and the best groups
_HEADLINES = 3  # topics of findings that are open to the eye
_LONG = 600  # characters of an answer that is folded

WITHOUT_PICTURES = (
    "There are no pictures: matplotlib is not installed (pip install 'lorikeet[plots]')."
)
"""What a report without pictures says of that."""


def page(
    study: Study,
    outcomes: Sequence[Outcome],
    found: Sequence[Finding],
    pictures: Sequence[Picture] | None,
) -> str:
    """The whole page as HTML.

    Args:
        study: the study.
        outcomes: from `outcomes(study)`.
        found: from `findings(study)`.
        pictures: None if they could not be drawn.
    """
    best = by_quality(outcomes)[:1]
    here = {key: study.receipt[key] for key in wording.MEASURED_HERE if key in study.receipt}
    template = _environment().from_string(_template())
    return template.render(
        title=wording.title(study),
        lead=wording.lead(study, outcomes),
        findings=by_topic(found, measured=False),
        headlines=_HEADLINES,
        measured=by_topic(found, measured=True),
        notes=[*study.notes, *([WITHOUT_PICTURES] if pictures is None else [])],
        results=tables.results(study, outcomes) if outcomes else None,
        best_row=outcomes.index(best[0]) if best else None,
        reading=wording.reading(outcomes),
        pictures=[_drawn(picture) for picture in pictures or ()],
        rates=tables.learning_rates(study) if study.candidates else None,
        costs=tables.costs(outcomes),
        machine=wording.as_yaml(here) if here else "",
        samples=answered(study, outcomes),
        shown_answers=_ANSWERS,
        long=_LONG,
        failed=[(t.name, tables.last_line(t), t.error or "") for t in study.failed],
        again=wording.again(study),
        kind=study.kind,
        config=wording.as_yaml(study.config),
        varied=wording.as_yaml(study.varied),
        receipt=wording.as_yaml(wording.stood_on(study)),
        none=figures.NONE,
    )


def _drawn(picture: Picture) -> dict[str, Any]:
    return {
        "name": picture.name,
        "title": picture.title,
        "caption": picture.caption,
        "svg": inline_svg(picture),
    }


def _environment() -> Environment:
    return Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )


def _template() -> str:
    return files("lorikeet.study").joinpath("report.html.j2").read_text(encoding="utf-8")

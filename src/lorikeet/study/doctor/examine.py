"""From a folder to findings: of a run, or of every run of a study."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lorikeet.errors import ConfigError, InputError
from lorikeet.study.doctor.course import course_symptoms
from lorikeet.study.doctor.data import data_symptoms
from lorikeet.study.doctor.facts import RunFacts, is_run, read_facts
from lorikeet.study.doctor.finding import Diagnosis, Finding
from lorikeet.study.doctor.learning import learning_symptoms, undecided
from lorikeet.study.doctor.outcome import find_gap, outcome_symptoms
from lorikeet.study.doctor.rank import rank_symptoms


def diagnose(facts: RunFacts) -> list[Finding]:
    """Look for every symptom; problems come first."""
    findings = [
        *course_symptoms(facts),
        *learning_symptoms(facts),
        *outcome_symptoms(facts),
        *rank_symptoms(facts),
        *data_symptoms(facts),
    ]
    return sorted(findings, key=lambda finding: finding.severity != "problem")


def examine_folder(path: Path) -> list[Diagnosis]:
    """Examine a run folder, or every run in the folder of a study.

    Returns:
        One diagnosis for a run; for a study one for each, by name.

    Raises:
        ConfigError: the folder holds neither, or files that cannot be read.
        AdapterError: an adapter in it cannot be read.
    """
    if is_run(path):
        return [_examined(path)]
    runs = sorted(p for p in (path / "runs").glob("*") if is_run(p))
    if not runs:
        raise ConfigError(
            f"{path} holds no run: expected config.yaml, as `lorikeet train --out FOLDER` writes"
            " it, or a folder runs/ with such folders, as of a comparison or a sweep"
        )
    return [_examined_beside_others(run) for run in runs]


def _examined(path: Path) -> Diagnosis:
    facts = read_facts(path)
    return Diagnosis(path, tuple(diagnose(facts)), tuple(_unexamined(facts)))


def _examined_beside_others(path: Path) -> Diagnosis:
    """A run that cannot be read is a finding, so that the others are still examined."""
    try:
        return _examined(path)
    except InputError as error:
        advice = "do the run again, or remove its folder"
        return Diagnosis(path, (Finding("unreadable", "problem", str(error), {}, advice),))


def _unexamined(facts: RunFacts) -> Iterator[str]:
    """What the folder has no figures for."""
    if not facts.finished:
        return  # which is a finding of its own
    reason = undecided(facts)
    if reason:
        yield f"whether the loss was still falling: {reason}"
    if facts.validation is not None and find_gap(facts) is None:
        yield f"over-fitting: too few documents were scored, or {_OLDER}"
    if facts.anatomy is not None and facts.moved is None:
        yield f"how far the weights moved: packed weights, or {_OLDER}"


_OLDER = "the run was made by an older version"

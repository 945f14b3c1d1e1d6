"""What is wrong with a run, or could be better: symptoms in its folder, each with its figures."""

from lorikeet.study.doctor.examine import diagnose, examine_folder
from lorikeet.study.doctor.facts import RunFacts, is_run, read_facts
from lorikeet.study.doctor.finding import Diagnosis, Finding

__all__ = [
    "Diagnosis",
    "Finding",
    "RunFacts",
    "diagnose",
    "examine_folder",
    "is_run",
    "read_facts",
]

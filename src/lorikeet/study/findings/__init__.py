"""What a study shows, in sentences that are computed."""

from lorikeet.study.findings.finding import Finding
from lorikeet.study.findings.of_study import findings

__all__ = ["Finding", "findings"]

"""What the doctor says of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

Severity = Literal["problem", "hint"]


@dataclass(frozen=True)
class Finding:
    """Something that is wrong with a run, or could be better.

    Attributes:
        id: what kind it is; the same in every version.
        severity: a `problem` spoils the result or leaves it unknown; a `hint` may cost some of it.
        message: what was found, one sentence with figures.
        evidence: the figures by name, JSON-ready.
        advice: what to do.
    """

    id: str
    severity: Severity
    message: str
    evidence: Mapping[str, Any]
    advice: str

    def summary(self) -> dict[str, Any]:
        """The finding as a JSON-ready dict; figures that are not finite become None."""
        return {**asdict(self), "evidence": {k: _finite(v) for k, v in self.evidence.items()}}


def share(count: int, total: int) -> str:
    """`12 of 300 (4.0 %)`."""
    return f"{count:,} of {total:,} ({percent(count / total)})"


def percent(part: float) -> str:
    """`4.0 %`; two digits below one."""
    return f"{100 * part:.1f} %" if part >= 0.01 else f"{100 * part:.2g} %"


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class Diagnosis:
    """All findings about a run.

    Attributes:
        run: its folder.
        findings: problems first.
        unexamined: what could not be looked for, and why.
    """

    run: Path
    findings: Sequence[Finding]
    unexamined: Sequence[str] = ()

    @property
    def healthy(self) -> bool:
        """Whether there is nothing to say."""
        return not self.findings

    @property
    def problems(self) -> int:
        """How many findings are problems."""
        return sum(finding.severity == "problem" for finding in self.findings)

    def summary(self) -> dict[str, Any]:
        """The diagnosis as a JSON-ready dict."""
        return {
            "run": str(self.run),
            "healthy": self.healthy,
            "findings": [finding.summary() for finding in self.findings],
            "unexamined": list(self.unexamined),
        }

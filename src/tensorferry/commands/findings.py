"""What a diagnosis is made of: findings, each with how bad it is and what helps."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Severity(StrEnum):
    """`problem`: something that should work does not. `warning`: it works, and somebody should look at it. `note`:
    worth knowing, and may be meant so. `ok`: looked at."""

    OK = "ok"
    NOTE = "note"
    WARNING = "warning"
    PROBLEM = "problem"

    @property
    def weight(self) -> int:
        return list(Severity).index(self)


@dataclass(frozen=True, slots=True)
class Finding:
    severity: Severity
    about: str
    """A transport's name, or an area of the host: stable, for programs."""
    what: str
    remedy: str = ""

    def as_dict(self) -> dict[str, Any]:
        return {"severity": str(self.severity), "about": self.about, "what": self.what, "remedy": self.remedy}


def worst(findings: Iterable[Finding]) -> Severity:
    return max((f.severity for f in findings), key=lambda s: s.weight, default=Severity.OK)


def worst_first(findings: Iterable[Finding]) -> list[Finding]:
    return sorted(findings, key=lambda f: -f.severity.weight)

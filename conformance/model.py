"""What a run is made of: findings with their verdicts, and the checks that stand behind the rules.

A check is a function that takes a Stage and raises `Violation` where the rule is broken. It is registered under its
rule's id by `@check("XFR-2")`. Nothing is returned: a check that comes to its end has passed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import TYPE_CHECKING

from tensorferry.conformance.rules import Level, rules

if TYPE_CHECKING:
    from tensorferry.conformance.stage import Stage

SUITE_VERSION = 1


class Verdict(StrEnum):
    PASS = "pass"
    FAIL = "fail"
    NOT_APPLICABLE = "not applicable"  # the capability is not declared, and what needs it is refused as it should be
    KNOWN_FAILURE = "known failure"  # failed, and the third party's own file says that it does
    UNTESTED = "untested"  # no assertion stands behind the rule here
    INCONCLUSIVE = "inconclusive"  # asked, and there was no way to find out: the evidence says what was missing


class Tier(IntEnum):
    """How much is tried: counts and sizes grow, rules stay the same."""

    QUICK = 0
    VERIFY = 1
    ALL = 2


class Violation(AssertionError):
    """A rule is broken. The message says what was found and what was expected."""


class Inconclusive(Exception):
    """The check could not find out: what it needed could not be had (a hook, a second process, a race that came)."""


class NotApplicable(Exception):
    """The rule does not concern this transport."""


class SuiteError(Exception):
    """A defect of the suite itself: kept apart from what it says about transports."""


@dataclass(frozen=True)
class Finding:
    """What the suite says about one rule."""

    rule: str
    verdict: Verdict
    message: str = ""
    evidence: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def level(self) -> Level:
        return rules()[self.rule].level

    def as_dict(self) -> dict[str, object]:
        return {
            "rule": self.rule,
            "level": self.level.name,
            "verdict": str(self.verdict),
            "message": self.message,
            "evidence": self.evidence,
            "seconds": round(self.seconds, 3),
        }


CheckFunction = Callable[["Stage"], None]


@dataclass(frozen=True)
class Check:
    rule: str
    function: CheckFunction
    seconds: float
    """Longest time at tier verify; the tier's factor goes on top."""
    joined: bool
    """Needs two instances that can write to each other: without LIF-1 it would only find the same thing again."""


_checks: dict[str, Check] = {}


def check(rule: str, *, seconds: float = 30.0, joined: bool = True) -> Callable[[CheckFunction], CheckFunction]:
    """Register the check of a rule."""

    def register(function: CheckFunction) -> CheckFunction:
        known = rules().get(rule)
        if known is None or known.by or known.kind == "untested":
            raise SuiteError(f"{function.__name__} checks {rule}, which rules.toml does not have to be checked")
        if rule in _checks:
            raise SuiteError(f"{rule} has two checks: {_checks[rule].function.__name__} and {function.__name__}")
        _checks[rule] = Check(rule, function, seconds, joined)
        return function

    return register


def checks() -> dict[str, Check]:
    """Every check by its rule's id."""
    from tensorferry.conformance import suite

    suite.load()
    return _checks

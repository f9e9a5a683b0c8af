"""The known failures of a transport, kept in its own repository: a line each, a rule's id and the reason.

    # ferry-known-failures.txt
    CAN-4   cancels the connection: https://example.org/issues/12

Strict: an id that no rule has is an error, and a listed rule that passes, or does not apply, fails the run. Only where
a rule is stochastic may it pass now and then.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tensorferry.conformance.model import Finding, Verdict
from tensorferry.conformance.rules import Kind, rules
from tensorferry.core.errors import ConfigError


def read(path: str | Path) -> dict[str, str]:
    """Rule ids and reasons. Raises ConfigError for a file that cannot be read, an unknown id, one without a reason."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the known failures {str(path)!r} cannot be read: {error}") from error
    found: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split("#", 1)[0].split(maxsplit=1)
        if not words:
            continue
        name = words[0]
        if name not in rules():
            raise ConfigError(f"{path}:{number}: no rule is called {name!r}", hint="It is stale: take it off")
        if len(words) == 1:
            raise ConfigError(f"{path}:{number}: {name} is listed without a reason")
        if name in found:
            raise ConfigError(f"{path}:{number}: {name} is listed twice")
        found[name] = words[1].strip()
    return found


def apply(finding: Finding, known: dict[str, str]) -> Finding:
    """The finding in the light of what is known to fail."""
    reason = known.get(finding.rule)
    if reason is None:
        return finding
    if finding.verdict is Verdict.FAIL:
        evidence = {**finding.evidence, "found": finding.message}
        return replace(finding, verdict=Verdict.KNOWN_FAILURE, message=f"known: {reason}", evidence=evidence)
    if finding.verdict is Verdict.INCONCLUSIVE:
        return finding
    if finding.verdict is Verdict.PASS and rules()[finding.rule].kind is Kind.STOCHASTIC:
        return replace(finding, message=f"listed as a known failure ({reason}), and not seen to fail this time")
    said = f"the verdict is: {finding.verdict}. Take it off the list"
    return replace(finding, verdict=Verdict.FAIL, message=f"listed as a known failure ({reason}), and {said}")

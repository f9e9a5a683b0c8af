"""Write docs/conformance-rules.md from conformance/rules.toml. `--check` says whether it is in step (exit 1 if not)."""

from __future__ import annotations

import sys
from pathlib import Path

from tensorferry.conformance.model import checks
from tensorferry.conformance.rules import FAMILIES, PROTOCOL, Rule, rules

PAGE = Path(__file__).resolve().parent.parent / "docs" / "conformance-rules.md"

INTRODUCTION = """\
# The rules

<!-- Written by scripts/write_conformance_doc.py from conformance/rules.toml: change the rules there, then run it. -->

What every transport has to do, by number. [conformance.md](conformance.md) says how they are tested and what the
verdicts mean. All hold since version 1 of the transport contract, unless another is named.

Kinds: *required*; *optional*, only where a capability is declared (`!` before it: not declared); *stochastic*, a race
that a run may miss, so that a pass is no proof; *untested*, no assertion stands behind it here. A rule that is answered
*by* others has their verdict.
"""


def row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def how(rule: Rule) -> str:
    """Kind, capability and what it takes."""
    if rule.by:
        return "by " + ", ".join(rule.by)
    if rule.kind == "untested" or rule.id not in checks():
        return "untested" + (f" ({rule.where})" if rule.where else "")
    parts = [str(rule.kind), *(f"`{need}`" for need in rule.needs), *(f"uses {use}" for use in rule.uses)]
    return ", ".join(parts + ([f"since {rule.since}"] if rule.since > 1 else []))


def page() -> str:
    lines = [INTRODUCTION]
    for part, families in (
        ("The transport contract", [f for f in FAMILIES if f not in PROTOCOL]),
        ("The protocol over the transport", [f for f in FAMILIES if f in PROTOCOL]),
    ):
        lines += [f"## {part}", ""]
        for family in families:
            of_family = [rule for rule in rules().values() if rule.family == family]
            if of_family:
                lines += [f"### {family}: {FAMILIES[family]}", "", row("rule", "level", "kind", "text", "intent")]
                lines += ["|---|---|---|---|---|"]
                lines += [row(r.id, r.level.name, how(r), r.text, r.intent) for r in of_family]
                lines += [""]
    return "\n".join(lines)


def main() -> int:
    if "--check" in sys.argv[1:]:
        return int(not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != page())
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

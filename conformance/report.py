"""A run written down: JSON for programs, JUnit XML for CI, and a Markdown table for the third party's README."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import sys
from collections import Counter
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from tensorferry._version import __version__
from tensorferry.conformance.model import SUITE_VERSION, Finding, Verdict
from tensorferry.conformance.rules import FAMILIES, rules
from tensorferry.conformance.runner import Report
from tensorferry.core.transport import CONTRACT_VERSION

SCHEMA_VERSION = 1

ENGINES = ("mooncake-transfer-engine", "mooncake-transfer-engine-non-cuda", "nixl")
"""Distributions whose version bears on a result; those that are installed stand among the host's facts."""

MARKS = {
    Verdict.PASS: "✅",
    Verdict.FAIL: "❌",
    Verdict.KNOWN_FAILURE: "⚠️",
    Verdict.NOT_APPLICABLE: "·",
    Verdict.UNTESTED: "○",
    Verdict.INCONCLUSIVE: "?",
}


def as_dict(report: Report, *, strict: bool = False) -> dict[str, Any]:
    """The whole report as JSON-ready data; report.schema.json describes it."""
    code = report.exit_code(strict=strict)
    target = report.target
    return {
        "schema": SCHEMA_VERSION,
        "status": {0: "ok", 1: "failed"}.get(code, "suite error"),
        "exit": code,
        "transport": {
            "name": target.name,
            "distribution": target.distribution,
            "version": target.version,
            "class": f"{target.cls.__module__}:{target.cls.__qualname__}" if target.cls else "",
            "options": {name: str(value) for name, value in target.options.items()},
            "capabilities": _capabilities(report),
        },
        "suite": {"version": SUITE_VERSION, "tensorferry": __version__, "contract": CONTRACT_VERSION},
        "date": datetime.now(UTC).date().isoformat(),
        "host": host(),
        "tier": report.tier.name.lower(),
        "seed": report.seed,
        "seconds": round(report.seconds, 3),
        "summary": summary(report),
        "findings": [_finding(finding) for finding in report.findings],
        "defects": report.defects,
    }


def summary(report: Report) -> dict[str, int]:
    """How many rules got each verdict."""
    counted = Counter(finding.verdict for finding in report.findings)
    return {str(verdict): counted[verdict] for verdict in Verdict}


def host() -> dict[str, str]:
    """Where the run took place, as far as it bears on the result."""
    return {
        "python": platform.python_version(),
        "implementation": sys.implementation.name,
        "system": platform.system(),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "cpus": str(os.cpu_count() or 0),
    } | _engines()


def _engines() -> dict[str, str]:
    found = {}
    for name in ENGINES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _finding(finding: Finding) -> dict[str, Any]:
    rule = rules()[finding.rule]
    return finding.as_dict() | {"kind": str(rule.kind), "text": rule.text}


def _capabilities(report: Report) -> dict[str, Any]:
    declared = getattr(report.target.cls, "capabilities", None)
    if not dataclasses.is_dataclass(declared) or isinstance(declared, type):
        return {}
    values = {field.name: getattr(declared, field.name) for field in dataclasses.fields(declared)}
    return {n: sorted(map(str, v)) if isinstance(v, frozenset | set) else v for n, v in values.items()}


def junit(report: Report, *, strict: bool = False) -> str:
    """JUnit XML: one test case a rule; what was not tested, or does not apply, is skipped with its reason."""
    failed = {finding.rule for finding in report.failed(strict=strict)}
    skipped = [f for f in report.findings if f.rule not in failed and f.verdict is not Verdict.PASS]
    root = ElementTree.Element(
        "testsuite",
        name=f"tensorferry.conformance.{report.target.name}",
        tests=str(len(report.findings)),
        failures=str(len(failed)),
        errors=str(len(report.defects)),
        skipped=str(len(skipped)),
        time=f"{report.seconds:.3f}",
    )
    for finding in report.findings:
        family = FAMILIES[rules()[finding.rule].family]
        case = ElementTree.SubElement(
            root, "testcase", classname=family, name=finding.rule, time=f"{finding.seconds:.3f}"
        )
        if finding.rule in failed:
            node = ElementTree.SubElement(case, "failure", message=_xml(finding.message))
            node.text = _xml("\n".join(f"{name}: {value}" for name, value in finding.evidence.items()))
        elif finding.verdict is not Verdict.PASS:
            ElementTree.SubElement(case, "skipped", message=_xml(f"{finding.verdict}: {finding.message}"))
    for defect in report.defects:
        case = ElementTree.SubElement(root, "testcase", classname="suite", name=defect.partition(":")[0])
        ElementTree.SubElement(case, "error", message=_xml(defect))
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _xml(text: str) -> str:
    """Without the characters that XML cannot hold."""
    return "".join(char if char in "\t\n" or ord(char) >= 32 else "�" for char in text)


def markdown(report: Report) -> str:
    """A section for the third party's README."""
    target, counts = report.target, summary(report)
    made_by = f"{target.distribution} {target.version}".strip() or "unpackaged"
    lines = [
        f"## Conformance of `{target.name}` ({made_by})",
        "",
        f"tensorferry {__version__}, conformance suite {SUITE_VERSION}, contract {CONTRACT_VERSION}, tier "
        f"{report.tier.name.lower()}, seed {report.seed}: "
        + ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count),
        "",
        "| rule | level | verdict | |",
        "|---|---|---|---|",
    ]
    for finding in report.findings:
        text = finding.message or rules()[finding.rule].text
        cell = text.replace("|", "\\|").replace("\n", " ")
        lines.append(f"| {finding.rule} | {finding.level.name} | {MARKS[finding.verdict]} {finding.verdict} | {cell} |")
    return "\n".join(lines) + "\n"


def write(report: Report, folder: str | Path, *, strict: bool = False) -> list[Path]:
    """report.json, junit.xml and report.md in the folder, which is made where it is missing."""
    where = Path(folder)
    where.mkdir(parents=True, exist_ok=True)
    written = {
        "report.json": json.dumps(as_dict(report, strict=strict), indent=2) + "\n",
        "junit.xml": junit(report, strict=strict),
        "report.md": markdown(report),
    }
    for name, text in written.items():
        (where / name).write_text(text, encoding="utf-8")
    return [where / name for name in written]

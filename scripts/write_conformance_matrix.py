"""Write docs/conformance-matrix.md: every rule against every transport, from reports of the conformance suite.

    tensorferry conformance run tcp --tier verify --report build/conformance/tcp       one at a time, then
    scripts/write_conformance_matrix.py build/conformance/*                            folders, or report.json files

`make conformance-matrix` does both. A column is a transport, or a transport over RDMA verbs where its report was made
with require=rdma; of two reports for one column the later named counts. What has no report was not run, and the page
says so. `--check` says whether the page lists the rules of conformance/rules.toml, in their order (exit 1 if not): the
verdicts are those of the reports and grow old with them. `--rules` gives the page the rules of today, the new ones as
not run, and leaves the verdicts as they are.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tensorferry.conformance.model import Verdict
from tensorferry.conformance.report import ENGINES, MARKS
from tensorferry.conformance.rules import FAMILIES, rules

PAGE = Path(__file__).resolve().parent.parent / "docs" / "conformance-matrix.md"

OVER_VERBS = " over RDMA verbs"

COLUMNS = ("memory", "shm", "tcp", "mooncake", "nixl", f"mooncake{OVER_VERBS}", f"nixl{OVER_VERBS}")
"""What this repository ships, and how."""

NOT_RUN = "-"

NOT_PASSED = "## What did not pass"

INTRODUCTION = f"""\
# Rules by transports

<!-- Written by scripts/write_conformance_matrix.py from reports of the suite: `make conformance-matrix`. -->

What the [conformance suite](conformance.md) found when these reports were made. [The rules](conformance-rules.md) have
the texts.

{", ".join(f"{mark} {verdict}" for verdict, mark in MARKS.items())}, {NOT_RUN} not run. *Not applicable* is seen, too:
the capability is not declared, and what needs it is refused as it should be. *Untested* says that no assertion stands
behind the rule in the suite, *inconclusive* that there was no way to find out; neither is a pass. A pass of a
stochastic rule is no proof.
"""

Report = dict[str, Any]


def main() -> int:
    words = sys.argv[1:]
    if words == ["--check"]:
        return int(not PAGE.is_file() or listed(PAGE.read_text(encoding="utf-8")) != list(rules()))
    if words == ["--rules"]:
        PAGE.write_text(with_todays_rules(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
        return 0
    if not words:
        print(__doc__, file=sys.stderr)
        return 2
    reports: dict[str, Report] = {}
    for word in words:
        path = Path(word)
        path = path / "report.json" if path.is_dir() else path
        if not path.is_file():  # a run that was interrupted leaves its folder
            print(f"{path}: not there, left out", file=sys.stderr)
            continue
        report = json.loads(path.read_text(encoding="utf-8"))
        reports[column(report)] = report
    PAGE.write_text(page(reports), encoding="utf-8")
    return 0


def column(report: Report) -> str:
    over = OVER_VERBS if report["transport"]["options"].get("require") == "rdma" else ""
    return f"{report['transport']['name']}{over}"


def listed(text: str) -> list[str]:
    """The rules of a page, in its order."""
    return re.findall(r"^\| ([A-Z]{2,3}-\d+) \|", text, flags=re.MULTILINE)


def row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def page(reports: dict[str, Report]) -> str:
    columns = [*COLUMNS, *(name for name in reports if name not in COLUMNS)]
    verdicts = {name: {f["rule"]: Verdict(f["verdict"]) for f in r["findings"]} for name, r in reports.items()}

    def marks(rule: str) -> list[str]:
        found = (verdicts.get(name, {}).get(rule) for name in columns)
        return [MARKS[verdict] if verdict else NOT_RUN for verdict in found]

    lines = [INTRODUCTION, "## The runs", "", *runs(columns, reports), "", *tables(columns, marks)]
    told = [
        row(name, finding["rule"], finding["verdict"], without_paths(finding["message"]))
        for name in columns
        for finding in reports.get(name, {"findings": []})["findings"]
        if finding["verdict"] in (Verdict.FAIL, Verdict.KNOWN_FAILURE, Verdict.INCONCLUSIVE)
    ]
    if told:
        # The rule is not the first cell: a line of these is no line of the matrix.
        lines += [NOT_PASSED, "", row("transport", "rule", "verdict", "why"), "|---|---|---|---|", *told, ""]
    return "\n".join(lines).rstrip() + "\n"


def tables(columns: list[str], marks: Callable[[str], list[str]]) -> list[str]:
    lines = []
    for family, title in FAMILIES.items():
        of_family = [rule for rule in rules().values() if rule.family == family]
        if of_family:
            lines += [f"## {family}: {title}", "", row("rule", "level", *columns), "|---|---|" + "---|" * len(columns)]
            lines += [row(rule.id, rule.level.name, *marks(rule.id)) for rule in of_family] + [""]
    return lines


def with_todays_rules(text: str) -> str:
    """The page with a line for each rule that there is; the marks that it has stay."""
    start = text.index(f"## {next(iter(FAMILIES))}: ")
    end = text.find(NOT_PASSED) if NOT_PASSED in text else len(text)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text[start:end].splitlines()]
    columns = next(line[2:] for line in cells if line[0] == "rule")
    known = {line[0]: line[2:] for line in cells if len(line) > 2}
    made = tables(columns, lambda rule: known.get(rule, [NOT_RUN] * len(columns)))
    return text[:start] + "\n".join([*made, text[end:]]).rstrip() + "\n"


def runs(columns: list[str], reports: dict[str, Report]) -> list[str]:
    lines = [
        row("transport", "counts", "tensorferry, suite, contract", "engine", "tier, seed", "date (UTC)", "host"),
        "|---|---|---|---|---|---|---|",
    ]
    for name in columns:
        report = reports.get(name)
        if report is None:
            lines.append(row(name, "not run", *[NOT_RUN] * 5))
            continue
        suite, host = report["suite"], report["host"]
        kernel = re.match(r"[\d.]*\d", host["kernel"])  # without what a distribution or a cloud puts behind it
        counted = Counter(finding["verdict"] for finding in report["findings"])
        counts = [f"{counted[v]} {v}" for v in Verdict if counted[v]]
        engine = [f"{e} {host[e]}" for e in ENGINES if e in host and e.startswith(report["transport"]["name"])]
        options = [f"{n}={v}" for n, v in report["transport"]["options"].items()]
        lines.append(
            row(
                name,
                ", ".join(counts),
                f"{suite['tensorferry']}, {suite['version']}, {suite['contract']}",
                ", ".join(engine) or "none",
                ", ".join([report["tier"], str(report["seed"]), *options]),
                report.get("date", NOT_RUN),
                f"{host['system']} {kernel[0] if kernel else ''} {host['machine']}, {host['cpus']} CPUs, "
                f"Python {host['python']}",
            )
        )
    return lines


def without_paths(text: str) -> str:
    """Where things lay on the machine of the run is nobody's business, and only the first line is for a table."""
    first = text.strip().splitlines()[0] if text.strip() else ""
    return re.sub(r"(?<![\w.:/])/[\w.+@-]+(/[\w.+@-]+)+", "…", first)[:300]


if __name__ == "__main__":
    sys.exit(main())

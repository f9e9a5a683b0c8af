"""The page of rules by transports: made from reports, and in step with the rules."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

from tensorferry.conformance import report as writing
from tensorferry.conformance import run
from tensorferry.conformance.rules import rules

SCRIPT = Path(__file__).parent.parent.parent / "scripts" / "write_conformance_matrix.py"


@pytest.fixture
def matrix(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Runs the script with arguments on a page of its own: (exit status, the page's text)."""
    script = runpy.run_path(str(SCRIPT))
    page = tmp_path / "page.md"
    script["main"].__globals__["PAGE"] = page

    def call(*args: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *args])
        return script["main"](), page.read_text(encoding="utf-8") if page.exists() else ""

    return call


@pytest.fixture(scope="module")
def real() -> dict:
    return writing.as_dict(run("memory", rules="XFR-14,CAN-1", tier="quick"))


def written(folder: Path, report: dict) -> str:
    folder.mkdir()
    (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")
    return str(folder)


def line(page: str, rule: str) -> list[str]:
    found = next(one for one in page.splitlines() if one.startswith(f"| {rule} |"))
    return [cell.strip() for cell in found.strip("|").split("|")]


def test_the_page_in_the_docs_lists_the_rules_that_there_are() -> None:
    script = runpy.run_path(str(SCRIPT))
    page = script["PAGE"].read_text(encoding="utf-8")
    assert script["listed"](page) == list(rules()), (
        f"run `make conformance-matrix`, or {SCRIPT.name} --rules, which shows new rules as not run"
    )


def test_what_was_run_is_shown_and_what_was_not_is_never_a_pass(matrix, real: dict, tmp_path: Path) -> None:
    rdma = json.loads(json.dumps(real))
    rdma["transport"] |= {"name": "nixl", "options": {"require": "rdma"}}
    rdma["host"] |= {"nixl": "1.5.1", "mooncake-transfer-engine": "9"}
    rdma["findings"] = [
        {**rdma["findings"][0], "rule": "XFR-14", "verdict": "fail", "message": "lost | in /tmp/some.where/x\nmore"}
    ]
    status, page = matrix(written(tmp_path / "a", real), written(tmp_path / "b", rdma))
    assert status == 0
    verdicts = {finding["rule"]: finding["verdict"] for finding in real["findings"]}
    assert verdicts["XFR-14"] == "pass"
    assert line(page, "XFR-14") == ["XFR-14", rules()["XFR-14"].level.name, "✅", "-", "-", "-", "-", "-", "❌"]
    assert set(line(page, "LIF-1")[2:]) == {"-"}
    assert line(page, "memory")[1].startswith(f"{list(verdicts.values()).count('pass')} pass")
    assert line(page, "shm")[1] == "not run"
    assert line(page, "nixl over RDMA verbs")[3] == "nixl 1.5.1"
    assert "| nixl over RDMA verbs | XFR-14 | fail | lost \\| in … |" in page
    assert "/tmp" not in page
    assert matrix("--check")[0] == 0


def test_a_run_that_left_no_report_is_told_and_the_others_count(matrix, real: dict, tmp_path: Path, capsys) -> None:
    (tmp_path / "interrupted").mkdir()
    status, page = matrix(str(tmp_path / "interrupted"), written(tmp_path / "whole", real))
    assert status == 0
    assert line(page, "XFR-14")[2] == "✅"
    assert "interrupted" in capsys.readouterr().err


def test_a_page_that_lacks_a_rule_is_out_of_step(matrix, real: dict, tmp_path: Path) -> None:
    assert matrix("--check")[0] == 1
    _, page = matrix(written(tmp_path / "a", real))
    (tmp_path / "page.md").write_text(page.replace("| XFR-13 |", "| XFR-130 |"), encoding="utf-8")
    assert matrix("--check")[0] == 1
    assert matrix("--rules") == (0, page)  # it had not been run, and nothing else has changed
    assert matrix("--check")[0] == 0


def test_without_reports_it_says_how(matrix, capsys: pytest.CaptureFixture[str]) -> None:
    assert matrix()[0] == 2
    assert "--report" in capsys.readouterr().err

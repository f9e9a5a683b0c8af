"""`tensorferry conformance`, the reports, the pytest plugin, and what is generated and shipped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from command_kit import environment, tensorferry
from jsonschema import Draft202012Validator

from tensorferry.conformance import report as writing
from tensorferry.conformance import run
from tensorferry.conformance.rules import rules

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
SCHEMA = json.loads((ROOT / "conformance" / "report.schema.json").read_text(encoding="utf-8"))


def conformance(*args: str, cwd: Path | None = None) -> Any:
    """With the transports of this folder to be found."""
    return tensorferry("conformance", *args, env=environment(PYTHONPATH=str(HERE)), cwd=cwd)


def valid(report: Any) -> Any:
    Draft202012Validator(SCHEMA).validate(report)
    return report


# ---- the command ---------------------------------------------------------------------------------------------


def test_a_transport_that_conforms_exits_0_and_writes_its_reports(tmp_path: Path) -> None:
    flags = ("--rules", "XFR-1,CAN-1,CON-7", "--tier", "quick", "--seed", "7", "--report", "r")
    done = conformance("run", "memory", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "memory: tier quick, seed 7" in done.stdout
    assert "CON-7   inconclusive" in done.stdout
    assert "conforms" in done.stdout
    told = valid(json.loads((tmp_path / "r" / "report.json").read_text()))
    assert (told["seed"], told["tier"], told["exit"]) == (7, "quick", 0)
    assert told["transport"]["distribution"] == "tensorferry"
    assert told["transport"]["capabilities"]["cancellable"] is True
    assert told["summary"]["pass"] == 2
    assert "| XFR-1 | MUST | ✅ pass |" in (tmp_path / "r" / "report.md").read_text()
    suite = ElementTree.parse(tmp_path / "r" / "junit.xml").getroot()
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("3", "0", "1")


def test_a_transport_that_fails_exits_1_and_says_what_was_found(tmp_path: Path) -> None:
    done = conformance("run", "misbehaving:Raising", "--rules", "XFR-14", "--format", "json", "--seed", "7")
    assert done.returncode == 1, done.stderr
    told = valid(json.loads(done.stdout))
    assert told["status"] == "failed"
    [finding] = told["findings"]
    assert "ZeroDivisionError" in finding["message"]
    shown = conformance("run", "misbehaving:Raising", "--rules", "XFR-14", "--seed", "7")
    assert "does not conform. Again:" in shown.stdout
    assert "--rules XFR-14 --seed 7" in shown.stdout


def test_known_failures_are_read_from_the_third_partys_file(tmp_path: Path) -> None:
    (tmp_path / "known.txt").write_text("XFR-14 issue 3\n")
    flags = ("--rules", "XFR-14", "--known-failures", "known.txt")
    assert conformance("run", "misbehaving:Raising", *flags, cwd=tmp_path).returncode == 0
    assert conformance("run", "memory", *flags, cwd=tmp_path).returncode == 1
    (tmp_path / "known.txt").write_text("XFR-99 issue 3\n")
    done = conformance("run", "memory", *flags, cwd=tmp_path)
    assert done.returncode == 2
    assert "known.txt:1" in done.stderr


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("run", "memory", "--rules", "XFR-99"), "XFR-99"),
        (("run", "memory", "--level", "OUGHT"), "OUGHT"),
        (("run", "memory", "-o", "speed"), "KEY=VALUE"),
        (("run", "memory", "-o", "speed=9"), "no option 'speed'"),
        (("run", "memory", "--hooks", "no.such:Hooks"), "cannot be loaded"),
        (("run", "no-such-transport"), "no-such-transport"),
        (("run", "misbehaving:Nothing"), "Nothing"),
        (("rules", "--rules", "XFR-99"), "XFR-99"),
    ],
)
def test_wrong_usage_exits_2(args: tuple[str, ...], says: str) -> None:
    done = conformance(*args)
    assert done.returncode == 2, done.stdout + done.stderr
    assert says in done.stderr


@pytest.mark.parametrize("name", ["misbehaving:Absent", "no_such_module:Class"])
def test_what_cannot_run_here_exits_3(name: str) -> None:
    done = conformance("run", name)
    assert done.returncode == 3, done.stdout + done.stderr


def test_the_rules_are_listed() -> None:
    shown = conformance("rules", "--rules", "FEN", "--level", "MUST")
    assert shown.returncode == 0
    assert "FEN-1" in shown.stdout
    told = json.loads(conformance("rules", "--format", "json").stdout)
    assert [rule["id"] for rule in told["rules"]] == list(rules())


def test_the_transports_rules_need_no_torch(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('there is no torch here')\n")
    env = environment(PYTHONPATH=os.pathsep.join([str(tmp_path), str(HERE)]))
    done = tensorferry("conformance", "run", "shm", "--rules", "XFR-1,VIS-2,HYG-3", "--tier", "quick", env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" pass") >= 3


# ---- pytest --------------------------------------------------------------------------------------------------


def in_pytest(*args: str, cwd: Path) -> Any:
    command = [Path(sys.executable).with_name("pytest"), "-p", "tensorferry.conformance.plugin", "--pyargs"]
    return subprocess.run(
        [*command, "tensorferry.conformance", "-p", "no:cacheprovider", "-v", "-rsx", *args],
        env=environment(PYTHONPATH=str(HERE)), cwd=cwd, capture_output=True, text=True, check=False, timeout=100,
    )  # fmt: skip


def test_in_pytest_each_rule_is_an_item(tmp_path: Path) -> None:
    flags = ("--transport=memory", "--ferry-rules=XFR-1,XFR-2,REG-8,FO-1,CON-7", "--ferry-tier=quick")
    done = in_pytest(*flags, "--ferry-report=r", cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert "2 passed, 3 skipped" in done.stdout
    assert "not applicable: does not declare allocates_targets" in done.stdout
    assert "untested: scenario tests" in done.stdout
    valid(json.loads((tmp_path / "r" / "report.json").read_text()))


def test_in_pytest_a_broken_rule_fails_by_its_message(tmp_path: Path) -> None:
    (tmp_path / "known.txt").write_text("XFR-14 issue 3\n")
    flags = ("--transport=misbehaving:Raising", "--ferry-rules=XFR-14,XFR-7", "--ferry-tier=quick")
    done = in_pytest(*flags, cwd=tmp_path)
    assert done.returncode == 1
    assert "XFR-14: a post of no copies raised ZeroDivisionError" in done.stdout
    assert "1 failed, 1 passed" in done.stdout
    done = in_pytest(*flags, "--ferry-known-failures=known.txt", cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert "1 passed, 1 xfailed" in done.stdout


@pytest.mark.parametrize(("name", "code"), [("misbehaving:Absent", 3), ("no-such-transport", 4), ("", 4)])
def test_in_pytest_what_cannot_run_says_so(name: str, code: int, tmp_path: Path) -> None:
    done = in_pytest(f"--transport={name}", cwd=tmp_path)
    assert done.returncode == code, done.stdout + done.stderr


# ---- what is written and shipped -----------------------------------------------------------------------------


def test_a_report_with_control_characters_is_still_xml() -> None:
    report = run("memory", rules="XFR-14", tier="quick")
    object.__setattr__(report.findings[0], "message", "\x00\x1b[31mred")
    report.findings[0].evidence["stderr"] = "\x07"
    for strict in (False, True):
        ElementTree.fromstring(writing.junit(report, strict=strict))


def test_the_rule_table_of_the_docs_is_in_step() -> None:
    script = ROOT / "scripts" / "write_conformance_doc.py"
    done = subprocess.run([sys.executable, str(script), "--check"], check=False, timeout=60)
    assert done.returncode == 0, f"run {script.name}"


def test_the_data_files_are_declared_to_be_shipped() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    assert {"*.json", "*.toml"} <= set(project["package-data"]["*"])
    assert {"tensorferry.conformance", "tensorferry.conformance.suite"} <= set(project["packages"])
    assert (ROOT / "conformance" / "rules.toml").is_file()

"""Verdicts, crashes, time-outs, known failures, seeds and exit codes of the suite."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import misbehaving
import pytest

from tensorferry.backends.memory import MemoryOptions, MemoryTransport
from tensorferry.conformance import Finding, Verdict, known, model, run
from tensorferry.conformance.hooks import Hooks, load
from tensorferry.conformance.judge import Setup, judge
from tensorferry.conformance.model import Check, SuiteError, Tier, check, checks
from tensorferry.conformance.patterns import difference, pattern
from tensorferry.conformance.rules import Kind, Level, rules, select
from tensorferry.conformance.suite.hygiene import _stacks
from tensorferry.conformance.target import child_environment, resolve
from tensorferry.core.errors import ConfigError, TransportUnavailable, UnknownOption, UnknownTransport


def verdicts(report: Any) -> dict[str, Verdict]:
    return {finding.rule: finding.verdict for finding in report.findings}


# ---- the rules -----------------------------------------------------------------------------------------------


def test_every_rule_that_is_not_untested_has_a_check_or_is_answered_by_others() -> None:
    for rule in rules().values():
        assert (rule.id in checks()) == (rule.kind is not Kind.UNTESTED and not rule.by), rule.id
        assert all(name in checks() for name in rule.by), rule.id
        assert rule.text.endswith("."), rule.id
        assert rule.intent, rule.id


def test_the_protocols_59_rules_are_there() -> None:
    assert len([rule for rule in rules().values() if rule.part == "protocol"]) == 59


def test_a_rule_that_needs_a_capability_says_which_and_no_other_is_optional() -> None:
    for rule in rules().values():
        if rule.kind is Kind.OPTIONAL:
            assert rule.needs or rule.uses, rule.id


def test_rules_are_chosen_by_id_family_part_and_level() -> None:
    assert [rule.id for rule in select("XFR-2,ORD")] == ["XFR-2", "ORD-1", "ORD-2"]
    assert {rule.part for rule in select("protocol")} == {"protocol"}
    assert {rule.level for rule in select("", "must")} == {Level.MUST}
    with pytest.raises(ConfigError, match="XFR-999"):
        select("XFR-999")
    with pytest.raises(ConfigError, match="OUGHT"):
        select("", "OUGHT")


def test_a_check_of_an_unknown_or_a_checked_rule_is_a_defect() -> None:
    for name in ("NO-1", "XFR-1", "TR-1", "ORD-2"):
        checks()
        with pytest.raises(SuiteError):
            check(name)(lambda stage: None)


# ---- verdicts ------------------------------------------------------------------------------------------------


def setup() -> Setup:
    return Setup(resolve(MemoryTransport), Hooks(), 1, Tier.QUICK)


def test_what_a_check_itself_raises_is_a_defect_of_the_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    def defective(stage: Any) -> None:
        raise KeyError("mine")

    # The suite is told from a transport by where its files lie.
    monkeypatch.setattr("tensorferry.conformance.judge.HERE", str(Path(__file__).resolve().parent))
    with pytest.raises(SuiteError, match="mine"):
        judge(setup(), Check("XFR-1", defective, 5, True))


def test_what_the_transport_raises_is_a_finding() -> None:
    report = run(misbehaving.Raising, rules="XFR-14", tier="quick")
    [finding] = report.findings
    assert finding.verdict is Verdict.FAIL
    assert "ZeroDivisionError: no copies; expected BadCall" in finding.message


def test_what_ends_the_program_is_a_finding_as_well() -> None:
    report = run(misbehaving.Exiting, rules="XFR-14", tier="quick")
    [finding] = report.findings
    assert (report.defects, finding.verdict) == ([], Verdict.FAIL)
    assert "post (called as" in finding.message
    assert "raised SystemExit" in finding.message


def test_a_crash_fails_the_run_whatever_the_rules_level() -> None:
    report = run("misbehaving:CrashingOverNothing", rules="XFR-15", tier="quick")
    [finding] = report.findings
    assert finding.level is Level.SHOULD
    assert report.exit_code() == 1


def test_without_the_smoke_test_the_rest_is_inconclusive() -> None:
    report = run(misbehaving.Dead, rules="LIF-1,LIF-2,XFR,HYG-7", tier="quick")
    found = verdicts(report)
    assert found.pop("LIF-1") is Verdict.FAIL
    assert (found.pop("LIF-2"), found.pop("HYG-7")) == (Verdict.PASS, Verdict.PASS)
    assert set(found.values()) == {Verdict.INCONCLUSIVE}
    assert report.exit_code() == 1


def test_a_crash_fails_the_rule_that_was_running_and_the_rest_is_run() -> None:
    report = run("misbehaving:Crashing", rules="REG", tier="quick")
    found = {finding.rule: finding for finding in report.findings}
    assert found["REG-4"].verdict is Verdict.FAIL
    assert "SIGSEGV" in found["REG-4"].message
    assert "retire" in found["REG-4"].evidence["stderr"]
    others = {f.verdict for f in report.findings if f.rule not in ("REG-4", "REG-9")}
    assert others == {Verdict.PASS, Verdict.NOT_APPLICABLE}


@pytest.mark.parametrize("isolated", [True, False])
def test_a_check_that_hangs_fails_by_its_time_limit_and_the_rest_is_run(isolated: bool) -> None:
    cls = misbehaving.Hanging
    target = resolve(cls)
    setup = Setup(target if isolated else replace(target, spec=None), Hooks(), 1, Tier.QUICK)
    finding = judge(setup, replace(checks()["XFR-14"], seconds=0.5))
    assert finding.verdict is Verdict.FAIL
    assert finding.message.startswith("timed out")
    assert "post (misbehaving.py" in finding.message
    assert "refuses_no_copies" in finding.evidence["stack"]


def test_a_rule_that_others_answer_has_the_worst_of_their_verdicts() -> None:
    report = run(MemoryTransport, rules="TR-5", tier="quick")
    [finding] = report.findings
    assert finding.verdict is Verdict.PASS
    assert "BND-3: pass" in finding.evidence["by"]


def test_what_has_no_assertion_is_untested_and_never_passes() -> None:
    [finding] = run(MemoryTransport, rules="FO-3", tier="quick").findings
    assert (finding.verdict, finding.message) == (Verdict.UNTESTED, "process tests")


# ---- what is under test --------------------------------------------------------------------------------------


def test_a_callable_that_no_other_process_can_import_is_run_in_this_one() -> None:
    report = run(lambda: MemoryTransport(MemoryOptions()), rules="XFR-1,PEE-4,HYG-1", tier="quick")
    assert verdicts(report) == {
        "XFR-1": Verdict.PASS,
        "PEE-4": Verdict.INCONCLUSIVE,
        "HYG-1": Verdict.PASS,
    }


def test_what_cannot_run_is_said_before_anything_runs() -> None:
    with pytest.raises(UnknownTransport):
        run("no-such-transport")
    with pytest.raises(UnknownOption, match="speed"):
        run(MemoryTransport, {"speed": 9}, rules="XFR-1")
    with pytest.raises(TransportUnavailable, match="no such card"):
        run(misbehaving.Absent, rules="XFR-1")
    with pytest.raises(ConfigError, match="quicker"):
        run(MemoryTransport, tier="quicker")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load("misbehaving:Nothing")
    with pytest.raises(ConfigError, match="none of the methods"):
        load("types:SimpleNamespace")


def test_hooks_are_found_and_used() -> None:
    hooks = load("misbehaving:Hooked")
    assert hooks.has("peek")
    assert not hooks.has("hold", "let_go")
    report = run(MemoryTransport, rules="XFR-5", tier="quick", hooks="misbehaving:Hooked")
    assert verdicts(report) == {"XFR-5": Verdict.PASS}


def test_the_same_seed_makes_the_same_choices() -> None:
    from tensorferry.conformance.stage import Stage

    def choices(seed: int) -> tuple[list[float], bytes]:
        stage = Stage("XFR-1", resolve(MemoryTransport), Hooks(), seed, Tier.QUICK)
        return [stage.random.random() for _ in range(4)], stage.pattern(100)

    assert choices(3) == choices(3) != choices(4)


# ---- known failures ------------------------------------------------------------------------------------------


def found(rule: str, verdict: Verdict) -> Finding:
    return Finding(rule, verdict, "as found")


@pytest.mark.parametrize(
    ("rule", "was", "becomes"),
    [
        ("XFR-2", Verdict.FAIL, Verdict.KNOWN_FAILURE),
        ("XFR-2", Verdict.PASS, Verdict.FAIL),
        ("XFR-2", Verdict.NOT_APPLICABLE, Verdict.FAIL),
        ("XFR-2", Verdict.UNTESTED, Verdict.FAIL),
        ("XFR-2", Verdict.INCONCLUSIVE, Verdict.INCONCLUSIVE),
        ("FEN-4", Verdict.PASS, Verdict.PASS),  # a race
        ("XFR-3", Verdict.FAIL, Verdict.FAIL),  # not listed
    ],
)
def test_known_failures_are_strict(rule: str, was: Verdict, becomes: Verdict) -> None:
    listed = {"XFR-2": "issue 12", "FEN-4": "issue 13"}
    assert known.apply(found(rule, was), listed).verdict is becomes


def test_a_known_failure_passes_the_run_and_a_stale_one_fails_it(tmp_path: Path) -> None:
    listed = tmp_path / "known.txt"
    listed.write_text("# ours\nXFR-14  wrong error, issue 3\n")
    report = run(misbehaving.Raising, rules="XFR-14", tier="quick", known_failures=listed)
    assert (report.exit_code(), report.findings[0].verdict) == (0, Verdict.KNOWN_FAILURE)
    assert "issue 3" in report.findings[0].message
    report = run(MemoryTransport, rules="XFR-14", tier="quick", known_failures=listed)
    assert report.exit_code() == 1
    assert "Take it off the list" in report.findings[0].message


@pytest.mark.parametrize("text", ["XFR-99 no such rule", "XFR-2", "XFR-2 a\nXFR-2 b", "xfr-2 a"])
def test_a_list_of_known_failures_that_is_wrong_is_an_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "known.txt").write_text(text)
    with pytest.raises(ConfigError, match=r"known.txt:\d"):
        known.read(tmp_path / "known.txt")
    with pytest.raises(ConfigError, match="cannot be read"):
        known.read(tmp_path / "missing.txt")


def test_a_failed_should_fails_a_strict_run_alone() -> None:
    report = run(MemoryTransport, rules="XFR-14", tier="quick")
    report.findings = [found("LIF-6", Verdict.FAIL)]
    assert (report.exit_code(), report.exit_code(strict=True)) == (0, 1)
    report.defects = ["XFR-1: ..."]
    assert report.exit_code() == 4


# ---- words ---------------------------------------------------------------------------------------------------


def test_a_difference_names_the_bytes() -> None:
    assert difference(b"abc", b"abc") == ""
    assert difference(b"a\xaac", b"a\x55c", 4094) == "bytes [4095, 4096): found 0xaa, expected 0x55"
    assert difference(b"\1\2\3", b"\1\5\6", 0).startswith("bytes [1, 3): found 0x0203")
    assert "more" in difference(b"\1\0\1", b"\2\0\2")
    assert difference(b"a", b"ab") == "1 bytes instead of 2"


def test_patterns_hold_neither_guard_nor_seal() -> None:
    assert not {0xAA, 0x5C} & set(pattern("x", 100_000))
    assert model.SUITE_VERSION == 1


def test_a_variable_that_another_thread_takes_away_is_not_handed_to_a_child(monkeypatch: pytest.MonkeyPatch) -> None:
    """pytest takes one away around each test: a run in a thread beside it once ended with KeyError."""

    class Losing(dict[str, str]):
        def __iter__(self) -> Iterator[str]:
            return iter([*super().__iter__(), "LOST_MEANWHILE"])

    monkeypatch.setattr(os, "environ", Losing(KEPT="1"))
    assert "LOST_MEANWHILE" in list(os.environ)
    assert child_environment().keys() == {"KEPT", "PYTHONPATH"}


def test_of_a_fresh_process_that_hangs_is_told_where() -> None:
    program = "import sys, time\ndef hangs():\n    print(flush=True)\n    time.sleep(1000)\nhangs()"
    process = subprocess.Popen(
        [sys.executable, "-X", "faulthandler", "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"\n"
    assert "in hangs" in _stacks(process)
    assert process.returncode == -signal.SIGABRT

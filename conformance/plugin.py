"""The suite as a pytest plugin, a test item a rule:

    pytest -p tensorferry.conformance.plugin --pyargs tensorferry.conformance --transport=NAME

It is no entry point of pytest: nobody gets it who has not asked for it.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tensorferry.conformance import hooks, known, report
from tensorferry.conformance.model import Finding, Verdict
from tensorferry.conformance.rules import Level, Rule, select
from tensorferry.conformance.runner import Bench, Report, tier_of
from tensorferry.conformance.target import resolve
from tensorferry.core.errors import ConfigError, FerryError, TransportUnavailable

HERE = Path(__file__).resolve()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("conformance", "tensorferry's conformance suite")
    group.addoption(
        "--transport", metavar="NAME", help="the transport under test: an entry point's name or module:Class"
    )
    group.addoption("--transport-option", action="append", default=[], metavar="KEY=VALUE", help="one of its options")
    group.addoption("--ferry-rules", default="", metavar="IDS", help="ids and families, with commas between")
    group.addoption("--ferry-level", default="", metavar="LEVEL", help="only rules of this level and above")
    group.addoption("--ferry-tier", default="verify", metavar="TIER", help="quick, verify or all")
    group.addoption("--ferry-seed", type=int, default=None, metavar="N", help="of all random choices")
    group.addoption("--ferry-hooks", default="", metavar="M:C", help="your hooks, a class of a module")
    group.addoption("--ferry-known-failures", default="", metavar="FILE", help="rules known to fail, with reasons")
    group.addoption(
        "--ferry-report", default="", metavar="DIR", help="write report.json, junit.xml and report.md there"
    )


class Session:
    """What the items of one run share."""

    def __init__(self, config: pytest.Config) -> None:
        option = config.getoption
        name = option("--transport")
        if not name:
            raise ConfigError("no transport is named", hint="Give --transport=NAME")
        given = dict(item.partition("=")[::2] for item in option("--transport-option"))
        seed = option("--ferry-seed")
        self.seed = secrets.randbelow(1 << 31) if seed is None else int(seed)
        self.known = known.read(option("--ferry-known-failures")) if option("--ferry-known-failures") else {}
        self.chosen = select(option("--ferry-rules"), option("--ferry-level"))
        tier = tier_of(option("--ferry-tier"))
        target = resolve(name, given)
        self.bench = Bench(target, hooks=hooks.load(option("--ferry-hooks")), seed=self.seed, tier=tier)
        self.report = Report(target, self.seed, tier)
        self.folder = option("--ferry-report")
        try:
            self.bench.check_usable()
        except BaseException:
            self.bench.close()
            raise

    def find(self, rule: Rule) -> Finding:
        before = len(self.bench.defects)
        finding = known.apply(self.bench.find(rule), self.known)
        self.report.findings.append(finding)
        self.report.seconds += finding.seconds
        if len(self.bench.defects) > before:
            self.report.defects = self.bench.defects
            raise RuntimeError(f"a defect of the suite, no finding: {self.bench.defects[-1]}")
        return finding


_SESSION = pytest.StashKey[Session]()


def pytest_report_header(config: pytest.Config) -> str | None:
    name = config.getoption("--transport")
    return f"conformance: {name}" if name else None


def pytest_sessionstart(session: pytest.Session) -> None:
    """Who asks for the plugin asks for a run: what is wrong with it is said before anything is collected."""
    try:
        session.config.stash[_SESSION] = Session(session.config)
    except TransportUnavailable as error:
        pytest.exit(f"cannot run here: {error}", returncode=3)
    except FerryError as error:
        raise pytest.UsageError(str(error)) from error


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    # One file of the package stands for all of its rules; it may be found by way of a link.
    return Rules.from_parent(parent, path=file_path) if file_path.resolve() == HERE else None


class Rules(pytest.File):
    """All chosen rules, as if they stood in one file."""

    def collect(self) -> Iterator[pytest.Item]:
        for rule in self.config.stash[_SESSION].chosen:
            yield RuleItem.from_parent(self, name=rule.id, rule=rule)


class RuleItem(pytest.Item):
    """One rule against the transport."""

    def __init__(self, *, rule: Rule, **rest: Any) -> None:
        super().__init__(**rest)
        self.rule = rule

    def runtest(self) -> None:
        session = self.config.stash[_SESSION]
        finding = session.find(self.rule)
        if finding.verdict is Verdict.FAIL and finding.level is not Level.MUST:
            pytest.xfail(f"{self.rule.level.name}: {finding.message}")
        if finding.verdict is Verdict.FAIL:
            raise Broken(f"{self.rule.id}: {finding.message}\nrule: {self.rule.text}\nseed: {session.seed}", finding)
        if finding.verdict is Verdict.KNOWN_FAILURE:
            pytest.xfail(finding.message)
        if finding.verdict is not Verdict.PASS:
            pytest.skip(f"{finding.verdict}: {finding.message}")

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        if isinstance(excinfo.value, Broken):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, None, str]:
        return self.path, None, f"{self.rule.id} {self.rule.text}"


class Broken(AssertionError):
    """A rule is broken."""

    def __init__(self, message: str, finding: Finding) -> None:
        super().__init__(message)
        self.finding = finding


def pytest_unconfigure(config: pytest.Config) -> None:
    session = config.stash.get(_SESSION, None)
    if session is None:
        return
    session.bench.close()
    if session.folder:
        report.write(session.report, session.folder)

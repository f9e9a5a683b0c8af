"""Runs rules against a transport: in a worker process that may crash or hang, or here where no other can open it."""

from __future__ import annotations

import json
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import msgspec

from tensorferry.conformance import hooks as hooks_module
from tensorferry.conformance import known as known_module
from tensorferry.conformance.judge import Setup, judge, limit_s, usable
from tensorferry.conformance.model import Finding, SuiteError, Tier, Verdict, checks
from tensorferry.conformance.patience import FACTOR
from tensorferry.conformance.rules import Kind, Level, Rule, rules
from tensorferry.conformance.rules import select as pick
from tensorferry.conformance.target import Factory, Target, child_environment, resolve
from tensorferry.conformance.worker import Order
from tensorferry.core.children import end_in_words, nameless_file
from tensorferry.core.errors import ConfigError, TransportUnavailable, from_code
from tensorferry.core.transport import Transport

GRACE_S = 20.0 * FACTOR
"""How much longer than the check's own limit a worker may stay silent: then it hangs where no thread can look."""

START_S = 60.0 * FACTOR
"""Longest start of a worker, the import of an engine included."""

SMOKE = "LIF-1"


@dataclass
class Report:
    """Everything that a run has found, and what is needed to read it later."""

    target: Target
    seed: int
    tier: Tier
    findings: list[Finding] = field(default_factory=list)
    defects: list[str] = field(default_factory=list)
    """Defects of the suite itself: no finding about the transport."""
    seconds: float = 0.0

    def of(self, verdict: Verdict) -> list[Finding]:
        return [finding for finding in self.findings if finding.verdict is verdict]

    def failed(self, *, strict: bool = False) -> list[Finding]:
        """The findings that fail the run: of MUST rules, or of all where strict, those that took the process along, and
        stale known failures."""
        return [
            finding
            for finding in self.of(Verdict.FAIL)
            if strict
            or finding.level is Level.MUST
            or "process" in finding.evidence
            or finding.message.startswith("listed as a known failure")
        ]

    def exit_code(self, *, strict: bool = False) -> int:
        """0 conforms, 1 a rule failed, 4 the suite has a defect. (2 usage and 3 cannot run here are raised.)"""
        return 4 if self.defects else int(bool(self.failed(strict=strict)))


class Bench:
    """One transport under test; `find` answers for one rule at a time, and remembers."""

    def __init__(
        self,
        target: Target,
        *,
        hooks: hooks_module.Hooks | None = None,
        seed: int = 0,
        tier: Tier = Tier.VERIFY,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.setup = Setup(target, hooks or hooks_module.Hooks(), seed, tier)
        self.defects: list[str] = []
        self._found: dict[str, Finding] = {}
        shared = self.setup.hooks.inner is None or self.setup.hooks.path
        self._worker = _Worker(self.setup, environment) if target.spec is not None and shared else None

    def check_usable(self) -> None:
        """Raise TransportUnavailable where the transport's probe says that it cannot work here."""
        works, reason = self._worker.usable() if self._worker else usable(self.setup.target)
        if not works:
            raise TransportUnavailable(f"{self.setup.target.name} cannot run here: {reason}", hint="")

    def find(self, rule: Rule) -> Finding:
        found = self._found.get(rule.id)
        if found is None:
            found = self._found[rule.id] = self._find(rule)
        return found

    def close(self) -> None:
        if self._worker:
            self._worker.close()

    def _find(self, rule: Rule) -> Finding:
        if rule.by:
            return _derived(rule, [self.find(rules()[name]) for name in rule.by])
        check = checks().get(rule.id)
        if rule.kind is Kind.UNTESTED or check is None:
            return Finding(rule.id, Verdict.UNTESTED, rule.where or "no assertion stands behind it")
        if check.joined and rule.id != SMOKE and self.find(rules()[SMOKE]).verdict is not Verdict.PASS:
            return Finding(rule.id, Verdict.INCONCLUSIVE, f"rests on {SMOKE}, which did not pass")
        try:
            return self._worker.judge(rule.id) if self._worker else judge(self.setup, check)
        except SuiteError as error:
            self.defects.append(f"{rule.id}: {error}")
            return Finding(rule.id, Verdict.INCONCLUSIVE, "the suite's own check is defective; please report it")


def _derived(rule: Rule, findings: list[Finding]) -> Finding:
    """The verdict of a rule that others answer."""
    told = ", ".join(f"{finding.rule}: {finding.verdict}" for finding in findings)
    for verdict in (Verdict.FAIL, Verdict.INCONCLUSIVE, Verdict.UNTESTED):
        if hit := [finding for finding in findings if finding.verdict is verdict]:
            message = f"by {hit[0].rule}: {hit[0].message}" if verdict is not Verdict.UNTESTED else told
            return Finding(rule.id, verdict, message, {"by": told})
    if all(finding.verdict is Verdict.NOT_APPLICABLE for finding in findings):
        return Finding(rule.id, Verdict.NOT_APPLICABLE, findings[0].message, {"by": told})
    return Finding(rule.id, Verdict.PASS, "", {"by": told})


class _Worker:
    """The worker process, started when it is needed and again when it has ended."""

    def __init__(self, setup: Setup, environment: dict[str, str] | None = None) -> None:
        assert setup.target.spec is not None
        order = Order(setup.target.spec, setup.hooks.path, setup.seed, int(setup.tier))
        self._setup = setup
        self._environment = environment
        self._order = msgspec.json.encode(order).decode()
        self._process: subprocess.Popen[bytes] | None = None
        self._stderr: IO[bytes] = nameless_file()  # it lives as long as the worker
        self._rest = b""

    def usable(self) -> tuple[bool, str]:
        answer = self._ask("probe", START_S)
        if isinstance(answer, str):
            return True, f"its probe {answer}"  # HYG-1 and HYG-2 will say so
        return bool(answer["usable"]), str(answer["reason"])

    def judge(self, rule: str) -> Finding:
        limit = limit_s(checks()[rule], self._setup.tier)
        begun = time.monotonic()
        answer = self._ask(rule, limit + GRACE_S)
        if isinstance(answer, str):
            evidence = {"process": answer, "stderr": self._tail()}
            return Finding(rule, Verdict.FAIL, f"the process {answer}", evidence, time.monotonic() - begun)
        if "suite" in answer:
            raise SuiteError(answer["suite"])
        finding = msgspec.convert(answer, Finding)
        if finding.message.startswith("timed out"):
            self.end()
        return finding

    def close(self) -> None:
        self.end()
        self._stderr.close()

    def end(self) -> None:
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        self._process, self._rest = None, b""

    def _ask(self, word: str, within: float) -> dict[str, Any] | str:
        """The worker's answer, or in words how it ended instead."""
        process = self._process or self._start()
        assert process.stdin is not None
        process.stdin.write(word.encode() + b"\n")
        return self._hear(within)

    def _start(self) -> subprocess.Popen[bytes]:
        self._stderr.seek(0)
        self._stderr.truncate()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tensorferry.conformance.worker", self._order],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            bufsize=0,
            env={**(self._environment or child_environment()), "PYTHONPATH": child_environment()["PYTHONPATH"]},
        )
        process = self._process
        answer = self._hear(START_S)
        if isinstance(answer, str):
            raise TransportUnavailable(f"{self._setup.target.name} cannot be loaded: the process {answer}")
        if "ferry" in answer:
            self.end()
            error = from_code(answer["ferry"], answer["cause"])
            error.hint = answer["hint"]
            raise error
        return process

    def _hear(self, within: float) -> dict[str, Any] | str:
        process = self._process
        assert process is not None
        assert process.stdout is not None
        deadline = time.monotonic() + within
        while b"\n" not in self._rest:
            ready, _, _ = select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            piece = process.stdout.read(1 << 16) if ready else None
            if not ready:
                self.end()
                return f"hung so that not even its watchdog ran: no answer for {within:g} s"
            if not piece:
                status = process.wait()
                self.end()
                return end_in_words(status)
            self._rest += piece
        line, _, self._rest = self._rest.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _tail(self) -> str:
        self._stderr.seek(0)
        return self._stderr.read().decode(errors="replace")[-4000:]


def run(
    transport: str | type[Transport] | Factory,
    options: Mapping[str, object] | None = None,
    *,
    rules: str = "",
    level: str = "",
    tier: str | Tier = Tier.VERIFY,
    seed: int = 0,
    hooks: str | object = "",
    known_failures: str | Path | Mapping[str, str] | None = None,
    on_finding: Callable[[Finding], None] | None = None,
    on_start: Callable[[Rule], None] | None = None,
) -> Report:
    """Run the suite against a transport: an entry point's name, "module:Class", a class, or a callable that opens one.

    `rules`: ids, families or parts with commas between ("RES,XFR-2", "transport"); all where empty. `hooks`: as
    `module:Class`, or an object. Raises ConfigError and its kin for what cannot be run as asked, TransportUnavailable
    where the transport cannot work here.
    """
    chosen = pick(rules, level)
    known = _known(known_failures)
    loaded = hooks_module.load(hooks) if isinstance(hooks, str) else hooks_module.Hooks(hooks)
    environment = child_environment()  # as it is now: what an import changes is to be a change in the worker, too
    target = resolve(transport, options)
    report = Report(target, seed, tier_of(tier))
    begun = time.monotonic()
    bench = Bench(target, hooks=loaded, seed=seed, tier=report.tier, environment=environment)
    try:
        bench.check_usable()
        for rule in _in_order(chosen):
            if on_start is not None:
                on_start(rule)
            finding = known_module.apply(bench.find(rule), known)
            report.findings.append(finding)
            if on_finding is not None:
                on_finding(finding)
    finally:
        bench.close()
        report.defects = bench.defects
        report.seconds = time.monotonic() - begun
    return report


def tier_of(tier: str | Tier) -> Tier:
    try:
        return tier if isinstance(tier, Tier) else Tier[tier.upper()]
    except KeyError:
        raise ConfigError(f"no tier is called {tier!r}", hint="There are quick, verify and all") from None


def _known(given: str | Path | Mapping[str, str] | None) -> dict[str, str]:
    if given is None or given == "":
        return {}
    return known_module.read(given) if isinstance(given, str | Path) else dict(given)


def _in_order(chosen: Iterable[Rule]) -> list[Rule]:
    """Rules that others answer come last: by then those have been asked."""
    return sorted(chosen, key=lambda rule: bool(rule.by))

"""What holds for every test: a skip says what it needs, and hypothesis is never judged by the clock.

A skip's reason reads `needs <thing>: <detail>`, e.g. `needs gpu: no CUDA device is visible`. Any other reason fails the
test. Under CI=true the thing also has to stand in MAY_BE_ABSENT: what CI can install, CI has to test.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Generator

import hypothesis
import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts what it puts in the background with SIGINT ignored, and so would every process be that a test
    # interrupts.
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Things that a machine without special hardware cannot be given. Nothing that a package registry has belongs here.
MAY_BE_ABSENT = frozenset({"gpu", "rdma"})

REASON = re.compile(r"needs (?P<thing>[a-z0-9-]+): \S")

hypothesis.settings.register_profile("here", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") == "true" else "here")


def objection(reason: str, *, ci: bool) -> str | None:
    """Why a test may not be skipped for this reason, or None if it may."""
    match = REASON.match(reason)
    if match is None:
        return f"skipped as {reason!r}; a reason reads 'needs <thing>: <detail>', such as 'needs gpu: none is visible'"
    if ci and match["thing"] not in MAY_BE_ABSENT:
        allowed = ", ".join(sorted(MAY_BE_ABSENT))
        return f"skipped as {reason!r}, and CI has to have what that needs; only these may be absent: {allowed}"
    return None


def _judge(report: pytest.TestReport | pytest.CollectReport) -> None:
    if not report.skipped or hasattr(report, "wasxfail"):
        return
    # A skip's longrepr is (file, line, "Skipped: reason").
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    found = objection(reason.removeprefix("Skipped: "), ci=os.environ.get("CI") == "true")
    if found:
        report.outcome = "failed"
        report.longrepr = found


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _judge(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _judge(report)
    return report

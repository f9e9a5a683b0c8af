"""The suite is tested by transports that are broken: each fails the rules that it breaks, by name, and no other.

What is asked of each: the rules that it is said to break, and a sixth of the others that cost little.
TENSORFERRY_BROKEN=all asks all rules of all of them (`make broken`), which takes the better
part of an hour of one core.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from zlib import crc32

import pytest
import warm
from broken.catalogue import Broken, catalogue

from tensorferry.conformance import Report, run, runner, suite
from tensorferry.conformance.model import Verdict
from tensorferry.conformance.rules import Level, rules, select

COSTLY = frozenset(
    {"LIF-3", "LIF-6", "LIF-7", "LIF-9", "XFR-9", "XFR-10", "XFR-11", "XFR-20", "XFR-21", "VIS-1", "VIS-2"}
    | {"ERR-1", "ERR-2", "ERR-3", "ERR-6", "ERR-7", "FEN-2", "FEN-3", "FEN-4", "FEN-5", "FEN-6", "FEN-7"}
    | {"PEE-1", "PEE-2", "PEE-4", "PEE-5", "PEE-6", "PEE-8", "RES-1", "RES-2", "RES-3", "RES-4", "RES-5"}
    | {"RES-6", "RES-7"}
    | {"HYG-1", "HYG-2", "HYG-3", "HYG-9", "HYG-11", "HYG-12", "HYG-14", "HYG-15"}
)
"""Rules that wait, start processes or count over many rounds: more than about 0.3 s each."""

NOBODY = {"CON-14": "has no assertion: it needs a second host"}
"""MUST rules without a broken transport, and why."""

LONGEST = ("NeverDrainsTheUnknown", "NeverNoticesDeath", "NeverWakes", "LosesWakes", "WaitsInClose", "IsSlowToProbe")
"""Those that a rule waits for, ten to sixty seconds: they begin first, beside the others."""

ALL = os.environ.get("TENSORFERRY_BROKEN") == "all"

REFERENCE = "tensorferry.backends.memory:MemoryTransport"

TRANSPORT_RULES = [rule.id for rule in select("transport", "")]


def asked(one: Broken) -> str:
    """What it is said to fail, and every sixth of the cheap ones."""

    def is_asked(rule: str) -> bool:
        if ALL or rule in one.fails:
            return True
        return rule not in COSTLY and crc32(f"{one.name} {rule}".encode()) % 6 == 0

    return ",".join(filter(is_asked, TRANSPORT_RULES))


class Worker(warm.Popen):
    """A worker that has the suite imported, and nothing of what is under test; what it starts begins as usual."""

    modules = (
        "tensorferry.conformance.judge",
        "tensorferry.conformance.peer",
        *(f"tensorferry.conformance.suite.{name}" for name in suite.MODULES),
    )


@pytest.fixture(scope="module", autouse=True)
def warm_workers() -> Iterator[None]:
    """`make broken` does without."""
    with pytest.MonkeyPatch.context() as patch:
        if not ALL:
            patch.setattr(runner, "subprocess", warm.instead(Worker))
        yield


def judged(path: str, asked_for: str) -> Report:
    return run(path, tier="quick", rules=asked_for, hooks="broken.hooks:Hooks")


@pytest.fixture(scope="module")
def reports(request: pytest.FixtureRequest) -> Iterator[dict[str, Future[Report]]]:
    """A report on each transport that a chosen test is about. Several are under way at once: most of it is waiting."""
    chosen = [
        item.callspec.params["one"]
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.path == request.path and hasattr(item, "callspec")
    ]
    chosen.sort(key=lambda one: one.name not in LONGEST)
    with ThreadPoolExecutor(4) as pool:
        futures = {one.path: pool.submit(judged, one.path, asked(one)) for one in chosen}
        yield futures
        for future in futures.values():
            future.cancel()


@pytest.mark.xdist_group("broken transports")  # one process for all of them: their reports are made side by side
@pytest.mark.timeout(3600 if ALL else 600)  # the first of them waits for the whole pool, on a machine that may be busy
@pytest.mark.parametrize("one", catalogue(), ids=lambda one: one.name)
def test_a_broken_transport_fails_what_it_breaks_and_nothing_else(
    one: Broken, reports: dict[str, Future[Report]]
) -> None:
    report = reports[one.path].result()
    assert report.defects == []
    failed = {finding.rule: finding.message for finding in report.of(Verdict.FAIL)}
    assert failed.keys() - one.may == one.fails.keys(), failed
    for rule, pattern in one.fails.items():
        assert re.search(pattern, failed[rule]), f"{rule} says {failed[rule]!r}, and nothing of {pattern!r}"


def test_the_reference_fails_none_of_them() -> None:
    report = judged(REFERENCE, ",".join(rule for rule in TRANSPORT_RULES if ALL or rule not in COSTLY))
    assert report.defects == []
    assert report.of(Verdict.FAIL) == []
    assert len(report.of(Verdict.PASS)) > 50


def test_every_must_rule_of_a_transport_is_broken_by_somebody() -> None:
    broken = {rule for one in catalogue() for rule in one.fails}
    must = {rule for rule in TRANSPORT_RULES if rules()[rule].level is Level.MUST}
    assert must - broken == NOBODY.keys()


def test_no_two_broken_transports_have_one_name_and_each_says_what_it_fails() -> None:
    names = [one.name for one in catalogue()]
    assert set(LONGEST) <= set(names)
    assert sorted(set(names)) == sorted(names)
    assert all(one.fails and set(one.fails) <= set(TRANSPORT_RULES) for one in catalogue())
    assert set(TRANSPORT_RULES) >= COSTLY

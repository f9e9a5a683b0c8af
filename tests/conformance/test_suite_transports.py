"""The first-party transports keep every rule, and so do transports that are right in other ways."""

from __future__ import annotations

import pytest
import warm
from correct import CORRECT

from tensorferry.backends.mooncake import MooncakeTransport
from tensorferry.backends.nixl import NixlTransport
from tensorferry.conformance import Verdict, run, runner
from tensorferry.conformance.runner import Report
from tensorferry.core.transport import Transport

HOOKS = {"memory": "Copying", "shm": "Copying", "tcp": "Tcp", "mooncake": "Mooncake", "nixl": "Nixl"}

OPEN = {
    "memory": {"FEN-2"},  # no outcome is unknown where nothing can be lost
    "shm": {"FEN-2"},
    "tcp": set[str](),
    "mooncake": {"ERR-5"},  # by chance: nothing holds an engine's writes back
    "nixl": {"ERR-5", "PEE-8"},  # see own_hooks.Nixl
}
"""Rules that may be inconclusive, and why."""

OPTIONS = {
    "mooncake": {"host": "127.0.0.1"},
    # One worker: an agent starts in half the time, and hundreds are started. The run over TCP has the default, two.
    "nixl": {"workers": 1},
}


def failures(report: Report) -> list[str]:
    return [f"{f.rule}: {f.message}" for f in report.of(Verdict.FAIL)] + report.defects


def need(name: str) -> None:
    engines: dict[str, type[Transport]] = {"mooncake": MooncakeTransport, "nixl": NixlTransport}
    if name in engines and not (probe := engines[name].probe()).usable:
        pytest.skip(f"needs {name}: {probe.reason}")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["memory", "mooncake", "nixl", "shm", "tcp"])
def test_a_first_party_transport_keeps_every_rule(name: str) -> None:
    need(name)
    report = run(name, OPTIONS.get(name), tier="verify", seed=20, hooks=f"own_hooks:{HOOKS[name]}")
    assert failures(report) == []
    assert report.exit_code(strict=True) == 0
    assert {finding.rule for finding in report.of(Verdict.INCONCLUSIVE)} <= OPEN[name]
    assert len(report.of(Verdict.PASS)) > 100


@pytest.mark.timeout(400)
def test_nixl_over_tcp_keeps_the_rules_that_are_about_connections_and_their_ends() -> None:
    """On one host UCX copies between the processes; what it does otherwise, between hosts without RDMA, is this."""
    need("nixl")
    rules = "LIF-1,CON,XFR-1,XFR-4,BND-1,ERR-2,PEE,FEN-4,RES-5"
    report = run("nixl", {"require": "tcp"}, tier="quick", seed=20, rules=rules, hooks="own_hooks:Nixl")
    assert failures(report) == []
    assert {finding.rule for finding in report.of(Verdict.INCONCLUSIVE)} <= OPEN["nixl"]
    assert len(report.of(Verdict.PASS)) > 20


@pytest.mark.timeout(400)
@pytest.mark.parametrize("cls", CORRECT, ids=lambda cls: cls.name)
def test_a_transport_that_is_right_in_another_way_passes(cls: type[Transport], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "subprocess", warm.instead(warm.Popen))  # the protocol's rules need torch
    report = run(cls, tier="quick", seed=21, rules="XFR,BND,VIS,ORD,ERR,CAN,THR,WAK,HYG-8,HYG-12,RES-3,RES-4,WM,INT,CN")
    assert failures(report) == []
    needed = {
        "flushing": ("VIS-3", "INT-3", "BND-11"),
        "locked": ("THR-1",),
        "plain": ("BND-11",),
        "engined": ("HYG-12",),
    }
    passed = {finding.rule for finding in report.of(Verdict.PASS)}
    assert passed.issuperset(needed.get(cls.name, ()))


def test_what_is_not_declared_does_not_apply() -> None:
    plain = CORRECT[0]
    report = run(plain, tier="quick", rules="CAN,WAK,FEN-1,HYG-8,REG-8,VIS-3")
    verdicts = {finding.rule: finding.verdict for finding in report.findings}
    assert verdicts.pop("HYG-8") is Verdict.PASS
    assert set(verdicts.values()) == {Verdict.NOT_APPLICABLE}

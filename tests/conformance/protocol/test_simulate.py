"""The simulated world: every rule holds on every seed, a seed is the same every time, and failures say how to go on."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tensorferry.conformance.explore.mutants import MUTANTS
from tensorferry.conformance.protocol.simulate import __main__ as command
from tensorferry.conformance.protocol.simulate import run as running
from tensorferry.conformance.protocol.simulate.profiles import PROFILES, mutation
from tensorferry.conformance.protocol.simulate.run import Outcome, Sum, chunks, run_many, run_seeds, simulate

SEEDS = 150
"""Of each profile in each test run. `make simulate` runs a hundred thousand and more of each."""


@pytest.mark.parametrize("profile", PROFILES)
def test_every_rule_holds(profile: str) -> None:
    total = run_seeds(profile, range(SEEDS))
    assert total.seeds == SEEDS
    assert not total.failed, "\n".join(f"{out.violation}: {out.command}" for out in total.failed[:5])
    assert total.counts["delivered"] > SEEDS / 2


@pytest.mark.parametrize("profile", ["chaos", "rank-crashes"])
def test_a_seed_gives_the_same_trace_every_time(profile: str) -> None:
    for seed in range(5):
        one, other = (simulate(PROFILES[profile], seed, trace=True) for _ in range(2))
        assert one.trace
        assert one == other


def test_a_seed_gives_the_same_trace_in_another_process() -> None:
    """Whatever the order of sets of strings there."""
    code = (
        "from tensorferry.conformance.protocol.simulate.run import simulate\n"
        "from tensorferry.conformance.protocol.simulate.profiles import PROFILES\n"
        "print('\\n'.join(simulate(PROFILES['chaos'], 3, trace=True).trace))\n"
    )
    traces = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, check=True, capture_output=True
        ).stdout
        for seed in ("1", "2")
    }
    assert traces == {("\n".join(simulate(PROFILES["chaos"], 3, trace=True).trace) + "\n").encode()}


def test_different_seeds_are_different_worlds() -> None:
    assert len({tuple(simulate(PROFILES["chaos"], seed, trace=True).trace) for seed in range(10)}) == 10


def test_the_faults_that_a_profile_promises_do_happen() -> None:
    counts = run_seeds("chaos", range(100)).counts
    for what in ("delivered", "ended early", "sender crashes", "receiver crashes", "partitions", "rooms used again"):
        assert counts[what], what
    assert not run_seeds("calm", range(50)).counts["ended early"]


def test_a_failing_seed_is_told_with_the_command_that_replays_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mutant = next(mutant for mutant in MUTANTS if mutant.name == "free_on_bump")

    def broken(profile: object, seed: int, **options: object) -> Outcome:
        return simulate(profile, seed, mutation=mutation(mutant.setup), **options)  # type: ignore[arg-type]

    monkeypatch.setattr(running, "simulate", broken)
    monkeypatch.setattr(command, "simulate", broken)
    assert command.main(["--profile", "tiny", "--seeds", "20", "--jobs", "1", "--quiet"]) == 1
    said = capsys.readouterr().out
    line = next(line for line in said.splitlines() if "--trace" in line)
    arguments = line.split("simulate ", 1)[1].split()
    assert command.main(arguments) == 1
    told = capsys.readouterr().out
    assert "the replay is the same" in told
    assert "I2 a write of" in told


def test_the_command_sums_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--profile", "calm,quic2", "--seeds", "30", "--jobs", "2", "--quiet"]) == 0
    said = capsys.readouterr().out
    assert [line.split()[:2] for line in said.splitlines()[1:4]] == [["calm", "30"], ["quic2", "30"], ["all", "60"]]
    for wrong in (["--profile", "typhoon"], ["--seeds", "0"], ["--from", "-1"]):
        with pytest.raises(SystemExit):
            command.main(wrong)


def test_an_interrupt_keeps_what_is_done(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object) -> object:
        yield "calm", Sum(seeds=7)
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "run_many", interrupted)
    assert command.main(["--profile", "calm", "--quiet"]) == 130
    said = capsys.readouterr().out
    assert "interrupted" in said
    assert "calm                 7" in said


def test_work_is_cut_so_that_every_seed_is_run_once() -> None:
    cut = list(chunks(["a", "b"], 5, 250))
    for name in ("a", "b"):
        assert [seed for other, seeds in cut if other == name for seed in seeds] == list(range(5, 255))
    assert sum(part.seeds for _, part in run_many(["calm"], 0, 120, 2)) == 120

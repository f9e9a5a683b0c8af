"""Every mutant dies in the simulation, of what it was meant for. (In the search: test_explore_mutants.py.)"""

from __future__ import annotations

import pytest

from tensorferry.conformance.explore.mutants import MUTANTS, Mutant
from tensorferry.conformance.protocol import matrix


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_dies_within_a_hundred_seeds(mutant: Mutant) -> None:
    found = matrix.kill(mutant)
    assert found.seeds is not None or mutant.name in matrix.EXEMPT
    assert found.seeds is None or mutant.killed_by(found.violation)


def test_every_mutant_has_its_profile() -> None:
    assert set(matrix.CHOSEN) == {mutant.name for mutant in MUTANTS}


def test_the_command_prints_the_matrix(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    few = [mutant for mutant in MUTANTS if mutant.name in ("free_on_bump", "no_resend")]
    monkeypatch.setattr(matrix, "MUTANTS", few)
    assert matrix.main([]) == 0
    said = capsys.readouterr().out
    assert "alive: none" in said
    assert said.count("states") == said.count(" seeds ") == 2
    monkeypatch.setattr(matrix, "MOST_SEEDS", 0)
    monkeypatch.setattr(matrix, "kill", lambda mutant: matrix.Kill(mutant.name, "calm", None, "nothing found", 0.0))
    assert matrix.main(["--simulation"]) == 1
    assert "alive: free_on_bump, no_resend" in capsys.readouterr().out

"""The search can fail: with any one mechanism taken out it finds what that mechanism is for."""

from __future__ import annotations

import pytest

from tensorferry.conformance.explore.__main__ import tell
from tensorferry.conformance.explore.mutants import MUTANTS, Mutant
from tensorferry.conformance.explore.search import search
from tensorferry.conformance.explore.world import SearchWorld


@pytest.mark.parametrize("mutant", [m for m in MUTANTS if m.searched], ids=lambda mutant: mutant.name)
def test_a_mutant_dies_of_what_it_was_meant_for(mutant: Mutant, capsys: pytest.CaptureFixture[str]) -> None:
    out = search(SearchWorld(mutant.setup), mutant.name, limit=200_000)
    assert mutant.killed_by(out.violation), out.violation
    tell(out)  # a trace can be replayed and read
    assert mutant.dies_of[0] in capsys.readouterr().out or out.violation
    assert out.trace

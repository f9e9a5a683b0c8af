"""Defects that the fuzz found, each as a few steps on the machines."""

from __future__ import annotations

import pytest
from ferry import Ferry

from tensorferry.core import messages as m


@pytest.mark.parametrize("rank", [1, 7, 4000])
def test_an_open_that_is_said_again_with_another_rank_is_the_first_one_again(rank: int) -> None:
    ferry = Ferry(pool=4)
    ferry.receive(1)
    ferry.deliver()
    bound = m.Open(src=10, dst=1000, min_live=1, xfer=1, room=1, rank=rank, ranks=rank + 1, dummy=False)
    before = ferry.sender.snapshot()
    ferry.carry_out("sender", ferry.sender.on_message("rank0", bound))
    assert ferry.sender.snapshot() == before
    ferry.send(1, 3)
    ferry.deliver()
    ferry.assert_clean()

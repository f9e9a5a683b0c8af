"""Defects that the simulation found, each as a few steps on the machines."""

from __future__ import annotations

from ferry import SENDER, Ferry, hello

from tensorferry.core import errors as e
from tensorferry.core import messages as m
from tensorferry.core.sender import SenderMachine
from tensorferry.core.transfer import Phase


def test_a_leader_that_loses_its_sender_gives_its_destination_budget_back() -> None:
    ferry = Ferry(pool=4, ranks=2, budget=1)
    ferry.hold_writes = True
    ferry.send(1, 3)
    ferry.receive(1, "rank0")
    ferry.receive(1, "rank1")
    ferry.deliver()
    leader = ferry.receivers["rank0"]
    assert leader.budget_used == 1
    ferry.carry_out("rank0", leader.peer_silent(SENDER, e.PeerLost("silent")))
    assert leader.budget_used == 0
    for t in leader.transfers.values():
        assert t.charge == 0


def test_a_room_that_is_wanted_from_a_sender_proved_gone_waits_for_its_successor() -> None:
    ferry = Ferry(pool=4, first_grant=2)
    ferry.send(1, 3)
    ferry.receive(1)
    ferry.deliver()
    ferry.carry_out("rank0", ferry.receiver.peer_gone(1000))
    xfer = ferry.receive(2)
    assert ferry.receiver.pool.free_count == 4, "nothing is lent to the dead"
    ferry.queue.clear()
    ferry.ended.clear()
    ferry.sender = SenderMachine(hello(1001, "sender"))
    serial = ferry.send(2, 3)
    for _ in range(3):
        ferry.resend()
    assert ferry.ended["rank0", xfer] is None
    assert ("sender", serial) in ferry.ended
    ferry.assert_clean()


def test_a_rank_that_gave_up_before_its_sender_answered_is_lent_nothing() -> None:
    ferry = Ferry(pool=4, ranks=2, first_grant=2)
    held: list[tuple[str, m.Message]] = []

    def hold(to: str, message: m.Message) -> bool:
        wanted = to == "rank1" and isinstance(message, m.Hello)
        if wanted:
            held.append((to, message))
        return wanted

    ferry.drop = hold
    xfer = ferry.receive(1, "rank1")
    ferry.deliver()
    rank = ferry.receivers["rank1"]
    ferry.carry_out("rank1", rank.cancel(xfer, e.Cancelled("not wanted")))
    ferry.carry_out("rank1", rank.on_message(SENDER, held[0][1]))
    assert rank.transfers[xfer].phase is Phase.VOTED
    assert rank.pool.free_count == rank.pool.blocks

"""Several ranks of one language side (TP-1 to TP-4, R7), on the machines alone."""

from __future__ import annotations

from typing import Any

import pytest
from ferry import LEADER, SENDER, Ferry, hello

from tensorferry.core import errors as e
from tensorferry.core import messages as m
from tensorferry.core.allocator import BlockPool
from tensorferry.core.group import Group
from tensorferry.core.receiver import ReceiverMachine
from tensorferry.core.transfer import Phase, Status


def said(ferry: Ferry, kind: type) -> list[Any]:
    return [message for _, message in ferry.sent if isinstance(message, kind)]


def everyone(ferry: Ferry, room: int = 1, dummies: tuple[str, ...] = ()) -> dict[str, int]:
    return {rank: ferry.receive(room, rank, dummy=rank in dummies) for rank in ferry.receivers}


def finish(ferry: Ferry) -> None:
    ferry.hold_writes = False
    ferry.deliver()
    for _ in range(6):
        ferry.resend()
    ferry.assert_clean()
    assert all(not r.decisions.uses for r in ferry.receivers.values())


def outcomes(ferry: Ferry, xfers: dict[str, int]) -> list[object]:
    return [ferry.ended[rank, xfer] for rank, xfer in xfers.items()]


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("total", [0, 1, 7])
def test_every_rank_gets_every_row_and_all_run(ranks: int, total: int) -> None:
    ferry = Ferry(pool=3, first_grant=2, window=2, ranks=ranks)
    serial, xfers = ferry.send(1, total), everyone(ferry)
    finish(ferry)
    assert outcomes(ferry, xfers) == [None] * ranks
    assert ferry.ended["sender", serial] is None
    for rank, xfer in xfers.items():
        assert ferry.rows.get((rank, xfer), {}) == {index: (serial, index) for index in range(total)}
    assert ferry.released == [serial]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
@pytest.mark.parametrize("offered", [0, 1, 2, 3])
def test_the_order_in_which_they_come_does_not_matter(order: tuple[int, ...], offered: int) -> None:
    ferry = Ferry(pool=3, window=2, ranks=3)
    for step, rank in enumerate(order):
        if step == offered:
            ferry.send(1, 5)
        ferry.receive(1, f"rank{rank}")
        ferry.deliver()
    if offered == 3:
        ferry.send(1, 5)
    finish(ferry)
    assert set(ferry.ended.values()) == {None}
    assert len(ferry.ended) == 4


def test_a_dummy_rank_votes_and_is_sent_nothing() -> None:
    ferry = Ferry(pool=3, window=2, ranks=3, first_grant=2)
    serial, xfers = ferry.send(1, 6), everyone(ferry, dummies=("rank2",))
    finish(ferry)
    assert outcomes(ferry, xfers) == [None] * 3
    assert not [grant for who, grant in ferry.sent if who == "rank2" and isinstance(grant, m.Grant)]
    assert ("rank2", xfers["rank2"]) not in ferry.rows
    assert len(ferry.rows["rank1", xfers["rank1"]]) == 6
    assert ferry.ended["sender", serial] is None


def test_the_other_ranks_hear_the_length_only_when_rank_0_has_its_destination() -> None:
    """R7: rank 0 alone admits, so that ranks cannot hold destinations crosswise."""
    ferry = Ferry(pool=4, window=2, ranks=2, budget=1, optimistic=False)
    ferry.hold_writes = True
    for room in (1, 2):
        ferry.send(room, 3)
        everyone(ferry, room)
        ferry.deliver()
    announced = {(message.dst, message.xfer) for message in said(ferry, m.Announce)}
    assert announced == {(10, 1), (10, 2), (11, 1)}  # to the follower only what the leader has admitted
    finish(ferry)
    assert set(ferry.ended.values()) == {None}


def test_the_leader_gives_its_destination_back_when_every_rank_has_closed() -> None:
    ferry = Ferry(pool=4, window=2, ranks=2, budget=1, optimistic=False)
    ferry.send(1, 3)
    xfers = everyone(ferry)
    ferry.drop = lambda to, message: to == "sender" and isinstance(message, m.Close) and message.src == 11
    ferry.deliver()
    assert outcomes(ferry, xfers) == [None, None]
    ferry.resend()
    assert ferry.receivers["rank0"].budget_used == 1
    ferry.drop = lambda to, message: False
    finish(ferry)
    assert ferry.receivers["rank0"].budget_used == 0


@pytest.mark.parametrize("who", ["rank0", "rank1", "rank2", "sender"])
def test_whoever_cancels_cancels_for_all_and_at_any_time(who: str) -> None:
    """TP-3, TP-4: after any number of steps, all ranks run or none does, but for the one that cancelled itself."""
    after, seen = 0, set()
    while True:
        ferry = Ferry(pool=3, window=2, ranks=3, first_grant=1)
        serial, xfers = ferry.send(1, 4), everyone(ferry)
        steps = sum(ferry.step() for _ in range(after))
        if who == "sender":
            ferry.carry_out("sender", ferry.sender.cancel(serial, e.Cancelled("enough")))
        else:
            ferry.carry_out(who, ferry.receivers[who].cancel(xfers[who], e.Cancelled("enough")))
        for _ in range(6):
            ferry.resend()
        for slot in list(ferry.sender.slots):  # who had not met has nobody to hear it from
            ferry.carry_out("sender", ferry.sender.force_end(slot))
        for rank, xfer in xfers.items():
            ferry.carry_out(rank, ferry.receivers[rank].fail(xfer, e.DeadlineExceeded("too late")))
        if ("sender", serial) not in ferry.ended:
            ferry.carry_out("sender", ferry.sender.cancel(serial, e.DeadlineExceeded("too late")))
        for _ in range(6):
            ferry.resend()
        for slot in list(ferry.sender.slots):
            ferry.carry_out("sender", ferry.sender.force_end(slot))
        finish(ferry)
        runs = {rank: ferry.ended[rank, xfer] is None for rank, xfer in xfers.items()}
        others = {run for rank, run in runs.items() if rank != who}
        assert len(others) == 1, (after, runs)
        assert not runs.get(who, False) or others == {True}
        if who == "rank0":
            assert len(set(runs.values())) == 1  # the leader's end is the group's
        for rank, xfer in xfers.items():
            if runs[rank]:
                assert len(ferry.rows[rank, xfer]) == 4
        seen.add(others.pop())
        if steps < after:
            break
        after += 1
    assert seen == {True, False}


@pytest.mark.parametrize("who", ["rank0", "rank1", "rank2"])
def test_whatever_fails_at_one_rank_ends_the_room_for_all(who: str) -> None:
    ferry = Ferry(pool=3, window=2, ranks=3, optimistic=False)
    ferry.hold_writes = True
    serial, xfers = ferry.send(1, 4), everyone(ferry)
    ferry.deliver()
    ferry.carry_out(who, ferry.receivers[who].fail(xfers[who], e.IntegrityError("again and again")))
    finish(ferry)
    assert all(isinstance(error, e.IntegrityError) for error in outcomes(ferry, xfers))
    assert isinstance(ferry.ended["sender", serial], e.IntegrityError)


def test_a_follower_that_has_promised_its_rows_keeps_them_until_the_verdict() -> None:
    """TP-4: followers never drop alone, whatever passes meanwhile: a deadline, a silent sender."""
    ferry = Ferry(pool=4, window=2, ranks=2, optimistic=False)
    xfers = everyone(ferry)
    ferry.drop = lambda to, message: isinstance(message, m.Commit | m.Verdict | m.Query)
    ferry.send(1, 3)
    ferry.deliver()
    follower = ferry.receivers["rank1"]
    assert follower.transfers[xfers["rank1"]].phase is Phase.VOTED
    ferry.carry_out("rank1", follower.fail(xfers["rank1"], e.DeadlineExceeded("too late")))
    ferry.carry_out("rank1", follower.peer_silent(SENDER, e.PeerLost("silence")))
    assert ("rank1", xfers["rank1"]) not in ferry.ended
    assert len(ferry.rows["rank1", xfers["rank1"]]) == 3
    ferry.drop = lambda to, message: isinstance(message, m.Query)
    ferry.resend()  # the leader runs before it hears of any of this
    assert ferry.ended["rank0", xfers["rank0"]] is None
    ferry.drop = lambda to, message: False
    for _ in range(6):
        ferry.resend()
    assert outcomes(ferry, xfers) == [None, None]
    ferry.assert_clean()


def test_the_leader_runs_on_commit_alone_and_a_follower_on_the_verdict_alone() -> None:
    ferry = Ferry(pool=4, window=2, ranks=2, optimistic=False)
    xfers = everyone(ferry)
    ferry.drop = lambda to, message: isinstance(message, m.Commit | m.Verdict)
    ferry.send(1, 3)
    for _ in range(3):
        ferry.resend()
    assert [ferry.receivers[rank].transfers[xfer].phase for rank, xfer in xfers.items()] == [Phase.VOTED] * 2
    assert not ferry.ended
    # A verdict for another transfer, an earlier use, or from somebody else's leader, changes nothing.
    follower = ferry.receivers["rank1"]
    before = follower.snapshot()
    for dst, xfer in ((11, 99), (99, xfers["rank1"])):
        follower.on_message(LEADER, m.Verdict(src=10, dst=dst, xfer=xfer, run=True, code="", cause=""))
    assert follower.snapshot() == before
    ferry.drop = lambda to, message: isinstance(message, m.Verdict)
    ferry.resend()
    assert (
        list(ferry.ended) == [("rank0", xfers["rank0"]), ("sender", 1)] or ("rank1", xfers["rank1"]) not in ferry.ended
    )
    ferry.drop = lambda to, message: False
    finish(ferry)
    assert outcomes(ferry, xfers) == [None, None]


def test_a_restarted_leader_is_the_proof_that_the_old_one_is_gone() -> None:
    ferry = Ferry(pool=4, window=2, ranks=2, optimistic=False)
    xfers = everyone(ferry)
    ferry.drop = lambda to, message: isinstance(message, m.Commit)
    serial = ferry.send(1, 3)
    ferry.deliver()
    ferry.add_receiver("rank0", 500, Group(0, 2, LEADER))
    ferry.drop = lambda to, message: False
    ferry.resend()
    assert isinstance(ferry.ended["rank1", xfers["rank1"]], e.PeerLost)
    again = everyone(ferry)  # the room is free for its next use, once the sender has seen the leader restarted
    ferry.resend()
    assert isinstance(ferry.ended["sender", serial], e.PeerLost)
    second = ferry.send(1, 2)
    finish(ferry)
    assert outcomes(ferry, again) == [None, None]
    assert ferry.ended["sender", second] is None


def test_ranks_that_count_differently_are_a_mismatch_for_both() -> None:
    ferry = Ferry(pool=4, window=2, ranks=2, optimistic=False)
    ferry.add_receiver("rank2", 12, Group(2, 3, LEADER))
    one = ferry.receive(1, "rank0")
    three = ferry.receive(1, "rank2")
    for _ in range(3):
        ferry.resend()
    assert isinstance(ferry.ended["rank2", three], e.GroupMismatch) or three in ferry.receivers["rank2"].transfers
    assert ("rank0", one) not in ferry.ended or isinstance(ferry.ended["rank0", one], e.GroupMismatch)
    other = ferry.receive(1, "rank1") if ("rank0", one) not in ferry.ended else None
    ferry.send(1, 2)
    for _ in range(3):
        ferry.resend()
    if other is not None:
        assert ferry.ended["rank0", one] is ferry.ended["rank1", other] is None
    ferry.carry_out("rank2", ferry.receivers["rank2"].cancel(three, e.Cancelled("enough")))
    assert ("rank2", three) in ferry.ended


# ---------------------------------------------------------------- a framework with a broadcast of its own


def alone(rank: int, ranks: int) -> Ferry:
    """Ranks without a leader's address: the framework resolves."""
    ferry = Ferry(pool=4, window=2, optimistic=False, ranks=2)
    for k in range(ranks):
        template = hello(20 + k, f"rank{k}", pool=4, slabs=1)
        ferry.receivers[f"rank{k}"] = ReceiverMachine(template, BlockPool(4), ferry.policy, Group(k, ranks))
    return ferry


@pytest.mark.parametrize("run", [True, False])
def test_resolve_ends_a_follower_as_the_framework_says(run: bool) -> None:
    ferry = alone(1, 2)
    xfers = everyone(ferry)
    ferry.send(1, 3)
    follower = ferry.receivers["rank1"]
    with pytest.raises(e.BadCall):
        follower.resolve(xfers["rank1"], True)
    ferry.deliver()
    assert not said(ferry, m.Query)
    assert follower.transfers[xfers["rank1"]].phase is Phase.VOTED
    ferry.carry_out("rank1", follower.resolve(xfers["rank1"], run))
    assert (ferry.ended["rank1", xfers["rank1"]] is None) is run
    for _ in range(6):
        ferry.resend()
    assert ferry.ended["rank0", xfers["rank0"]] is None
    assert not ferry.receivers["rank1"].transfers
    assert follower.resolve(xfers["rank1"], not run) == []


def test_ranks_are_transfers_of_their_own() -> None:
    """TP-2: epochs, fences and grants of one rank are nothing to the others."""
    ferry = Ferry(pool=4, window=2, ranks=2, optimistic=False)
    ferry.hold_writes = True
    ferry.send(1, 4)
    xfers = everyone(ferry)
    ferry.deliver()
    other = ferry.receivers["rank0"].transfers[xfers["rank0"]]
    before = other.epoch, dict(other.out)
    ferry.carry_out("rank1", ferry.receivers["rank1"].suspect(xfers["rank1"], e.TransportError("suspicion")))
    ferry.deliver()
    assert (other.epoch, other.out) == before
    assert ferry.receivers["rank1"].transfers[xfers["rank1"]].epoch == before[0] + 1
    assert not ferry.receivers["rank0"].pool.quarantined
    finish(ferry)
    assert outcomes(ferry, xfers) == [None, None]


def test_the_same_room_again_and_again() -> None:
    ferry = Ferry(pool=3, window=2, ranks=3)
    for use in range(6):
        serial, xfers = ferry.send(1, use), everyone(ferry)
        if use % 3 == 1:
            ferry.hold_writes = True
            ferry.deliver()
            ferry.carry_out("rank1", ferry.receivers["rank1"].cancel(xfers["rank1"], e.Cancelled("enough")))
        finish(ferry)
        ends = {error is None for error in outcomes(ferry, xfers)} | {ferry.ended["sender", serial] is None}
        assert ends == {use % 3 != 1}
        assert all(r.transfers == {} for r in ferry.receivers.values())


def test_a_status_shows_success_only_with_the_verdict() -> None:
    ferry = Ferry(pool=4, window=2, ranks=2, optimistic=False)
    xfers = everyone(ferry)
    ts = {rank: ferry.receivers[rank].transfers[xfer] for rank, xfer in xfers.items()}
    ferry.drop = lambda to, message: isinstance(message, m.Commit)
    ferry.send(1, 3)
    ferry.deliver()
    assert all(t.status in (Status.WAITING_FOR_INPUT, Status.TRANSFERRING) for t in ts.values())
    ferry.drop = lambda to, message: False
    finish(ferry)
    assert all(t.status is Status.SUCCESS for t in ts.values())


@pytest.mark.parametrize("first", ["rank0", "rank1"])
@pytest.mark.parametrize("unmet", [True, False], ids=["unmet", "open lost"])
def test_a_room_that_was_given_up_before_a_rank_had_opened_it_is_not_waited_for_when_it_is_used_again(
    first: str, unmet: bool
) -> None:
    """That rank's next transfer is taken for one that is late for the use before: it ends, instead of waiting for the
    leader, whose next transfer waits for the end of the use before."""
    ferry = Ferry(ranks=2, pool=2, window=2)
    lost = object if unmet else m.Open
    ferry.drop = lambda to, message: to == "sender" and message.src == 11 and isinstance(message, lost)
    ferry.send(1, 2)
    before = everyone(ferry)
    ferry.deliver()
    ferry.carry_out("rank0", ferry.receivers["rank0"].cancel(before["rank0"], e.Cancelled("enough")))
    ferry.deliver()
    ferry.resend()
    assert [getattr(end, "code", "") for end in outcomes(ferry, before)] == ["cancelled"] * 2
    ferry.drop = lambda to, message: False
    again = {}
    for rank in sorted(ferry.receivers, reverse=first == "rank1"):
        again[rank] = ferry.receive(1, rank)
        ferry.deliver()
        ferry.resend()
    finish(ferry)
    assert [getattr(end, "code", "") for end in outcomes(ferry, again)] == ["cancelled"] * 2
    serial, third = ferry.send(1, 2), everyone(ferry)
    finish(ferry)
    assert ferry.ended["sender", serial] is None
    assert outcomes(ferry, third) == [None] * 2

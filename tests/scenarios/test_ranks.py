"""1, 2 and 4 ranks of one language side, a dummy rank among them: all run, or all drop."""

from __future__ import annotations

from typing import Any

import pytest
from scenario_kit import CHOOSERS, PATIENCE, PROTOCOL, SMALL, Quay, assert_clean, assert_same, eventually, rows
from test_table import CASES

import tensorferry as tf
from tensorferry import errors

QUICK: dict[str, object] = {"heartbeat": 0.1, "peer_timeout": 1.0}
SIZES: dict[str, Any] = {"layout": SMALL, "block_size": 16, "pool_blocks": 8, "first_grant": 64}
TOKENS = 1000


@pytest.fixture(params=[2, 4])
def ranks(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def receive_all(quay: Quay, room: int = 1, dummy: int | None = None) -> list[tf.ReceiveTransfer]:
    return [quay.receive(room, rank, dummy=rank == dummy) for rank in range(quay.ranks)]


def every_error(transfers: list[Any], kind: type[errors.FerryError]) -> None:
    for transfer in transfers:
        with pytest.raises(kind):
            transfer.wait(PATIENCE)


def send_when_free(quay: Quay, room: int, given: dict[str, Any]) -> tf.SendTransfer:
    """A group's room is in use until every rank has closed it: a moment longer than its sender's caller waits."""

    def sent() -> tf.SendTransfer | None:
        try:
            return quay.sender.send(room, **given)
        except errors.RoomInUse:
            return None

    return eventually(sent)  # type: ignore[no-any-return]


@PROTOCOL
@CASES
def test_every_length_arrives_at_every_rank_in_the_same_rounds(
    kind: str, ranks: int, total: int, first_grant: int, pool: int, rounds: list[tuple[int, int]], seen: Any
) -> None:
    with Quay(kind, layout=SMALL, ranks=ranks, first_grant=first_grant, pool_blocks=pool) as quay:
        given = rows(total, layout=SMALL)
        receiving = receive_all(quay, dummy=ranks - 1)
        for transfer in receiving:
            eventually(lambda t=transfer: t.status == "WAITING_FOR_INPUT")
        sending = quay.sender.send(1, **given)
        sending.wait(PATIENCE)
        for transfer in receiving[:-1]:
            assert_same(transfer.result(PATIENCE), given)
            assert transfer.rows_complete
            assert [(r.tokens, r.blocks) for r in transfer.rounds] == rounds
        idle = receiving[-1].result(PATIENCE)
        assert receiving[-1].rounds == ()
        assert all(idle[name] is not None and idle[name].shape[0] == 0 for name in idle)
        assert idle.aux[0] == total  # it knows the length all the same
        for transfer in [*receiving, sending]:
            assert seen.get(transfer, ["SUCCESS"])[-1] == "SUCCESS"


@pytest.mark.parametrize("first", ["send", "leader", "followers"])
def test_the_order_in_which_ranks_and_sender_come_does_not_matter(kind: str, ranks: int, first: str) -> None:
    with Quay(kind, **SIZES, ranks=ranks, choose=CHOOSERS["random"]) as quay:
        given = rows(TOKENS, layout=SMALL)
        sending = quay.sender.send(1, **given) if first == "send" else None
        order = list(range(ranks)) if first == "leader" else list(reversed(range(ranks)))
        receiving = [quay.receive(1, rank) for rank in order]
        sending = sending or quay.sender.send(1, **given)
        for transfer in receiving:
            assert_same(transfer.result(PATIENCE), given)
        sending.wait(PATIENCE)


def test_40_rooms_at_once_through_small_pools_and_a_budget_of_two(kind: str, ranks: int) -> None:
    budget = 2 * 400 * SMALL.token_bytes
    with Quay(kind, **SIZES, ranks=ranks, choose=CHOOSERS["random"], destination_budget=budget) as quay:
        given = {room: rows(10 * room, seed=room, layout=SMALL) for room in range(40)}
        receiving = {room: receive_all(quay, room) for room in given}
        sending = [quay.sender.send(room, **tensors) for room, tensors in given.items()]
        for room, transfers in receiving.items():
            for transfer in transfers:
                assert_same(transfer.result(2 * PATIENCE), given[room])
        for one in sending:
            one.wait(PATIENCE)


def test_a_follower_holds_its_rows_until_the_leader_runs(kind: str) -> None:
    with Quay(kind, **SIZES, ranks=2) as quay:
        given = rows(TOKENS, layout=SMALL)
        sending = quay.sender.send(1, **given)
        follower = quay.receive(1, 1)
        eventually(lambda: follower.status == "WAITING_FOR_INPUT")
        assert not follower.rows_complete  # ranks are told the length when the leader has its destination
        leader = quay.receive(1, 0)
        for transfer in (leader, follower):
            assert_same(transfer.result(PATIENCE), given)
        sending.wait(PATIENCE)


@PROTOCOL
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_cancels_ends_the_room_for_all(kind: str, ranks: int, rank: int) -> None:
    with Quay(kind, **SIZES, ranks=ranks) as quay:
        sending = quay.sender.announce(1, TOKENS)
        sending.put(0, **rows(320, layout=SMALL))
        receiving = receive_all(quay)
        eventually(lambda: all(t.sent_tokens == 320 for t in receiving))
        receiving[rank].cancel()
        assert receiving[rank].status == "FAILED"
        every_error([*receiving, sending], errors.Cancelled)
        assert_clean(*quay.ends)
        again = receive_all(quay)  # the room is free again, on every rank
        quay.sender.send(1, **rows(50, layout=SMALL)).wait(PATIENCE)
        assert all(t.result(PATIENCE).aux[0] == 50 for t in again)


@PROTOCOL
def test_a_rank_alone_with_a_room_is_rid_of_it_in_time(kind: str) -> None:
    """Its caller has left, and the leader, which knows nothing of the room, will never say what becomes of it."""
    quick = {"transfer_deadline": 0.6, "peer_timeout": 0.6, "announce_deadline": 0.6, "heartbeat": 0.1}
    with Quay(kind, **SIZES, **quick, ranks=2) as quay:  # type: ignore[arg-type]
        alone = quay.receive(1, 1)
        eventually(lambda: opened(quay) == 1)
        alone.cancel()
        assert alone.status == "FAILED"
        eventually(lambda: not quay.receivers[1]._call(lambda: dict(quay.receivers[1].machine.transfers)))


def opened(quay: Quay) -> int:
    """How many ranks the sender has met in the one room there is."""
    return sum(quay.sender._call(lambda: [len(slot.bindings) for slot in quay.sender.machine.slots.values()]))


def test_a_sender_that_cancels_ends_the_room_for_all_ranks(kind: str, ranks: int) -> None:
    with Quay(kind, **SIZES, ranks=ranks) as quay:
        sending = quay.sender.announce(1, TOKENS)
        receiving = receive_all(quay)
        eventually(lambda: opened(quay) == ranks)
        sending.cancel()
        every_error([*receiving, sending], errors.Cancelled)


@PROTOCOL
def test_a_rank_that_had_not_come_when_the_sender_cancelled_finds_that_use_and_not_the_next(kind: str) -> None:
    """Until announce_deadline; the rows are given back at once."""
    with Quay(kind, **SIZES, ranks=2, announce_deadline=1.0) as quay:
        sending = quay.sender.announce(1, TOKENS)
        leader = quay.receive(1, 0)
        eventually(lambda: opened(quay) == 1)
        sending.cancel()
        every_error([leader, sending], errors.Cancelled)
        assert not quay.sender._call(lambda: dict(quay.sender._poster.sources))
        late = quay.receive(1, 1)
        every_error([late], errors.Cancelled)


@PROTOCOL
def test_a_rank_that_cannot_go_on_votes_no_and_all_fail_with_its_error(kind: str) -> None:
    """A follower without memory for the rows: not the leader's trouble, and yet everybody's end."""
    with Quay(kind, **SIZES, ranks=2) as quay:

        def no_memory(xfer: int) -> None:
            quay.receivers[1]._do(quay.receivers[1].machine.fail(xfer, errors.TooLarge("no memory for the rows")))

        quay.receivers[1]._reserve = no_memory  # type: ignore[method-assign]
        receiving = receive_all(quay)
        sending = quay.sender.send(1, **rows(TOKENS, layout=SMALL))
        every_error([*receiving, sending], errors.TooLarge)


@PROTOCOL
def test_a_rank_that_never_comes_ends_the_room_for_all_at_the_deadline(kind: str) -> None:
    with Quay(kind, **SIZES, ranks=2, transfer_deadline=0.7, announce_deadline=0.7) as quay:
        leader = quay.receive(1, 0)
        sending = quay.sender.send(1, **rows(TOKENS, layout=SMALL))
        every_error([leader, sending], errors.DeadlineExceeded)
        late = quay.receive(1, 1)
        every_error([late], errors.DeadlineExceeded)


@PROTOCOL
def test_ranks_that_disagree_about_their_number_are_told_so(kind: str) -> None:
    with Quay(kind, **SIZES, ranks=2, announce_deadline=1.0) as quay:
        odd = quay.add_receiver(group=tf.Group(2, 3, quay.receiver.leader_address))
        leader = quay.receive(1, 0)
        eventually(lambda: leader.status == "WAITING_FOR_INPUT")
        third = odd.receive(1, quay.sender.address)
        every_error([third], errors.GroupMismatch)
        every_error([leader], errors.GroupMismatch)


@PROTOCOL
def test_a_framework_may_tell_the_ranks_itself(kind: str) -> None:
    """Followers without a leader's address wait for resolve, and the leader runs on the sender's word."""
    with Quay(kind, **SIZES) as quay:
        group = [quay.add_receiver(group=tf.Group(rank, 2)) for rank in range(2)]
        for room, verdict in ((1, "run"), (2, "drop")):
            given = rows(TOKENS, seed=room, layout=SMALL)
            sending = quay.sender.announce(room, TOKENS)
            leader, follower = (receiver.receive(room, quay.sender.address) for receiver in group)
            with pytest.raises(errors.BadCall, match="before every row"):
                follower.resolve("run")
            with pytest.raises(errors.BadCall, match="'run' or 'drop'"):
                follower.resolve("maybe")
            sending.put(0, **given)
            assert_same(leader.result(PATIENCE), given)
            eventually(lambda t=follower: t.rows_complete)
            assert not follower.done
            follower.resolve(verdict)
            follower.resolve(verdict)  # once is enough
            if verdict == "run":
                assert_same(follower.result(), given)
            else:
                with pytest.raises(errors.Cancelled):
                    follower.wait(0)
            sending.wait(PATIENCE)


def test_a_leader_that_crashes_ends_the_send_and_its_successor_ends_the_followers(kind: str) -> None:
    with Quay(kind, **SIZES, **QUICK, ranks=2) as quay:
        sending = quay.sender.announce(1, TOKENS)
        sending.put(0, **rows(320, layout=SMALL))
        leader, follower = receive_all(quay)
        eventually(lambda: follower.sent_tokens == leader.sent_tokens == 320)
        address = quay.receiver.leader_address
        quay.crash(quay.receiver)
        with pytest.raises(errors.PeerLost):
            sending.wait(PATIENCE)
        quay.receivers[0] = quay.add_receiver(group=tf.Group(0, 2, address))
        with pytest.raises(errors.PeerLost):
            follower.wait(PATIENCE)
        again = receive_all(quay)
        given = rows(50, layout=SMALL)
        send_when_free(quay, 1, given).wait(PATIENCE)
        for transfer in again:
            assert_same(transfer.result(PATIENCE), given)


def test_a_follower_that_crashes_ends_the_room_for_all(kind: str) -> None:
    with Quay(kind, **SIZES, **QUICK, ranks=2) as quay:
        sending = quay.sender.announce(1, TOKENS)
        receiving = receive_all(quay)
        eventually(lambda: receiving[1].status == "WAITING_FOR_INPUT" and sending.status == "WAITING_FOR_INPUT")
        eventually(lambda: opened(quay) == 2)
        quay.crash(quay.receivers[1])
        every_error([receiving[0], sending], errors.PeerLost)
        assert_clean(quay.sender, quay.receiver)


@PROTOCOL
def test_a_group_of_one_is_no_group(kind: str) -> None:
    with Quay(kind, **SIZES) as quay:
        alone = quay.add_receiver(group=tf.Group(0, 1))
        given = rows(TOKENS, layout=SMALL)
        sending, receiving = quay.sender.send(1, **given), alone.receive(1, quay.sender.address)
        assert_same(receiving.result(PATIENCE), given)
        sending.wait(PATIENCE)


@PROTOCOL
def test_a_follower_whose_leader_is_not_there_says_so_in_bounded_time(kind: str) -> None:
    group = tf.Group(1, 2, leader="tcp://127.0.0.1:9")
    with tf.Sender(SMALL, transport=kind) as sender, tf.Receiver(SMALL, transport=kind, group=group, **QUICK) as rank1:
        with pytest.raises(errors.PeerUnreachable, match="leader"):
            rank1.receive(1, sender.address).wait(PATIENCE)
        eventually(lambda: rank1.free_blocks == rank1.pool_blocks)  # after the sender's fence

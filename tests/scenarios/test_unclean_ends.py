"""Ends that must be clean: a typed error or a resume, and every block free on both sides afterwards."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Sequence
from typing import Any

import pytest
from fault_kit import (
    BREAK,
    FAIL,
    FAULTY,
    HOLD,
    LOSE,
    MUTE,
    RAISE,
    TEAR,
    WRITE,
    from_post,
    let_go,
    proxy,
    refuse_connections,
    script,
)
from scenario_kit import CHOOSERS, PATIENCE, SMALL, Quay, assert_clean, assert_same, books, eventually, rows

from tensorferry import errors
from tensorferry.backends import _copier, _tcp_link
from tensorferry.backends._mooncake_engine import Engine
from tensorferry.backends._nixl_engine import Agent, Request
from tensorferry.core.transport import PeerState

QUICK: dict[str, object] = {"heartbeat": 0.1, "peer_timeout": 0.8}
"""Silence is noticed soon; ten times the pause that a loaded machine may make."""

TOKENS, BLOCK = 1000, 16  # 63 blocks, through a pool of 8: 8 rounds
ROUNDS: dict[str, object] = {"block_size": BLOCK, "pool_blocks": 8, "first_grant": 64, "layout": SMALL}


ENDS_SEEN = pytest.mark.parametrize("kind", ["memory", "shm"], indirect=True)
"""Transports that prove the end of one of two in the same process: the others prove the end of processes alone."""


def faulty_quay(kind: str, **more: Any) -> Quay:
    return Quay(kind, **{"sender_transport": FAULTY[kind], "choose": CHOOSERS["random"], **ROUNDS, **more})


def part(given: dict[str, Any], start: int, stop: int) -> dict[str, Any]:
    return {name: tensor[start:stop] for name, tensor in given.items()}


def between_rounds(quay: Quay, room: int = 1, **facts: Any) -> tuple[Any, Any, dict[str, Any]]:
    """A transfer that stands still after 320 tokens (two or three rounds), because the sender has no more yet."""
    given = rows(TOKENS, seed=room, layout=SMALL)
    sending = quay.sender.announce(room, TOKENS, **facts)
    sending.put(0, **part(given, 0, 320))
    receiving = quay.receive(room)
    eventually(lambda: receiving.sent_tokens == 320)
    return sending, receiving, given


# ---- no room -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("on_exhausted", "deadline"), [("wait", 0.7), ("fail", 300)])
def test_a_resume_that_finds_no_room_fails_as_pool_timeout(kind: str, on_exhausted: str, deadline: float) -> None:
    with faulty_quay(kind, on_exhausted=on_exhausted, pool_blocks=4, window=4) as quay:
        given = rows(TOKENS, layout=SMALL)
        slow = quay.sender.announce(1, TOKENS)
        slow.put(0, **part(given, 0, 64))
        script(quay.sender, lambda n: WRITE)
        first = quay.receive(1)
        eventually(lambda: first.sent_tokens == 64)
        quay.receiver._call(lambda: object.__setattr__(quay.receiver.settings, "transfer_deadline", deadline))
        script(quay.sender, from_post(0, HOLD))
        hog = quay.sender.send(2, **rows(64, layout=SMALL))
        second = quay.receive(2)
        eventually(lambda: len(proxy(quay.sender).held) > 0)
        eventually(lambda: quay.receiver.free_blocks == 0)
        slow.put(64, **part(given, 64, TOKENS))
        with pytest.raises(errors.PoolTimeout) as raised:
            first.wait(PATIENCE)
        assert raised.value.retryable
        assert raised.value.room == 1
        with pytest.raises(errors.PoolTimeout):
            slow.wait(PATIENCE)
        let_go(quay.sender)
        if on_exhausted == "fail":
            second.wait(PATIENCE)
            hog.wait(PATIENCE)


@pytest.mark.parametrize("on_exhausted", ["wait", "fail"])
def test_a_destination_budget_in_use_is_a_wait_or_a_pool_timeout(kind: str, on_exhausted: str) -> None:
    with Quay(kind, **ROUNDS, on_exhausted=on_exhausted, destination_budget=TOKENS * SMALL.token_bytes) as quay:
        sending, receiving, given = between_rounds(quay)
        small = quay.sender.send(2, **rows(1, layout=SMALL))
        other = quay.receive(2)
        if on_exhausted == "fail":
            with pytest.raises(errors.PoolTimeout):
                other.wait(PATIENCE)
            with pytest.raises(errors.PoolTimeout):
                small.wait(PATIENCE)
        sending.put(320, **part(given, 320, TOKENS))
        assert_same(receiving.result(PATIENCE), given)
        if on_exhausted == "wait":
            other.wait(PATIENCE)
            small.wait(PATIENCE)


def test_more_than_the_whole_budget_is_too_large_at_once(kind: str) -> None:
    with Quay(kind, **ROUNDS, destination_budget=TOKENS * SMALL.token_bytes) as quay:
        sending, receiving = quay.sender.send(1, **rows(TOKENS + 1, layout=SMALL)), quay.receive(1)
        for transfer in (sending, receiving):
            with pytest.raises(errors.TooLarge):
                transfer.wait(PATIENCE)
        quay.carry(TOKENS)


# ---- writes that land late ---


def test_what_lands_after_its_slab_was_replaced_lands_in_nobodys_memory(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F3 under a copy that has begun and hangs: its bytes come when the block has been given to somebody else."""
    held, go = threading.Event(), threading.Event()
    move, submit, transmit = _copier.memmove, Engine.submit, _tcp_link.transmit
    request = Agent.submit

    def hang_first(destination: int, source: int, nbytes: int) -> object:
        hang()
        return move(destination, source, nbytes)

    def hang_first_submit(engine: Engine, session: str, source: int, target: int, nbytes: int) -> int:
        hang()
        return submit(engine, session, source, target, nbytes)

    def hang_first_transmit(connection: socket.socket, buffers: Sequence[memoryview]) -> int:
        hang()
        return transmit(connection, buffers)

    def hang_first_request(agent: Agent, one: Request) -> bool:
        hang()
        return request(agent, one)

    def hang() -> None:
        if not held.is_set():
            held.set()
            assert go.wait(PATIENCE)

    monkeypatch.setattr(_copier, "memmove", hang_first)
    monkeypatch.setattr(Engine, "submit", hang_first_submit)
    monkeypatch.setattr(Agent, "submit", hang_first_request)
    monkeypatch.setattr(_tcp_link, "transmit", hang_first_transmit)
    with Quay(kind, **ROUNDS, **QUICK, slabs=4, choose=CHOOSERS["lowest-first"]) as quay:
        slow = quay.sender.send(1, **rows(TOKENS, seed=1, layout=SMALL))
        given_up = quay.receive(1)
        assert held.wait(PATIENCE)
        given_up.cancel()
        eventually(lambda: quay.receiver.free_blocks == 8)
        assert quay.receiver._call(lambda: quay.receiver._buffers.graveyard.nbytes) > 0
        other = quay.add_sender()
        tenant, given = quay.receiver.receive(2, other.address), rows(TOKENS, seed=2, layout=SMALL)
        eventually(lambda: quay.receiver.free_blocks < 8)
        go.set()
        eventually(lambda: not books(quay.sender))  # it has landed
        other.send(2, **given)
        assert_same(tenant.result(PATIENCE), given)
        with pytest.raises(errors.Cancelled):
            slow.wait(PATIENCE)


def test_a_write_to_a_block_that_nobody_was_granted_is_noticed() -> None:
    """What the assertions on stale writes are worth."""
    with Quay(**ROUNDS, clean=False) as quay:
        quay.receiver._buffers.memory(0).view()[:1] = b"!"
        quay.carry(TOKENS)
        assert len(quay.receiver.stale_writes) == 1


# ---- writes that go wrong --------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", [FAIL, RAISE, BREAK, TEAR])
def test_a_transfer_that_is_interrupted_in_round_2_resumes(kind: str, what: str) -> None:
    with faulty_quay(kind, choose=CHOOSERS["lowest-first"]) as quay:
        script(quay.sender, from_post(3, what, 2))
        receiving = quay.carry(TOKENS)
        assert sum(r.tokens for r in receiving.rounds) == TOKENS
        assert proxy(quay.sender).posts > 5


@pytest.mark.parametrize("what", [LOSE, MUTE])
def test_writes_of_unknown_outcome_keep_their_blocks_until_they_are_drained(kind: str, what: str) -> None:
    with faulty_quay(kind) as quay:
        script(quay.sender, from_post(3, what, 1))
        quay.carry(TOKENS)  # on the blocks that are left
        left = len(proxy(quay.sender).held[0].copies)
        assert left > 0
        eventually(lambda: "quarantined" in books(quay.receiver))
        assert quay.receiver.free_blocks < 8
        assert "sources" in books(quay.sender)  # the engine may still read the rows
        let_go(quay.sender)
        assert_clean(quay.sender, quay.receiver)


def test_a_write_that_is_never_drained_costs_its_slab_and_nothing_else(kind: str) -> None:
    """F3: the slab is replaced; what lands late lands in memory that is nobody's."""
    with faulty_quay(kind, slabs=4, **QUICK) as quay:
        script(quay.sender, from_post(3, LOSE, 1))
        quay.carry(TOKENS)
        eventually(lambda: quay.receiver.free_blocks == 8)
        assert quay.receiver._call(lambda: quay.receiver._buffers.graveyard.nbytes) > 0
        assert set(books(quay.receiver)) == {"transfers"}  # it goes when the sender says that no write is left
        late, given = quay.receive(2), rows(TOKENS, seed=9, layout=SMALL)
        eventually(lambda: quay.receiver.free_blocks < 8)  # the same blocks are lent
        let_go(quay.sender)
        sending = quay.sender.send(2, **given)
        assert_same(late.result(PATIENCE), given)
        sending.wait(PATIENCE)


@pytest.mark.parametrize(("what", "error"), [(FAIL, errors.TransportError), (TEAR, errors.IntegrityError)])
def test_a_transfer_whose_every_write_goes_wrong_fails_and_says_why(kind: str, what: str, error: type) -> None:
    with faulty_quay(kind, max_bumps=3) as quay:
        script(quay.sender, from_post(1, what))
        sending, receiving = quay.sender.send(1, **rows(TOKENS, layout=SMALL)), quay.receive(1)
        for transfer in (receiving, sending):
            with pytest.raises(error):
                transfer.wait(PATIENCE)
        script(quay.sender, from_post(0, WRITE))
        quay.carry(TOKENS)


def test_one_room_whose_posts_break_does_not_stop_the_others(kind: str) -> None:
    with faulty_quay(kind, max_bumps=2) as quay:
        bad = quay.sender.send(1, **rows(TOKENS, layout=SMALL))
        lines = quay.sender._poster._lines

        def breaks(n: int) -> str:
            mine = any(line and line[0].write.serial == bad._serial for line in lines.values())
            return BREAK if mine else WRITE

        script(quay.sender, breaks)
        receiving = quay.receive(1)
        for room in range(2, 8):
            quay.carry(300, room=room)
        for transfer in (receiving, bad):
            with pytest.raises(errors.TransportError):
                transfer.wait(PATIENCE)


# ---- sessions --------------------------------------------------------------------------------------------------


def test_a_session_that_is_refused_is_an_error_of_both_sides_and_blacklists_nobody(kind: str) -> None:
    with faulty_quay(kind, transfer_deadline=1.5) as quay:
        refuse_connections(quay.sender, 1)
        sending, receiving = quay.sender.send(1, **rows(TOKENS, layout=SMALL)), quay.receive(1)
        with pytest.raises(errors.PeerUnreachable, match="connection refused"):
            receiving.wait(PATIENCE)
        sending.cancel()
        quay.carry(TOKENS, room=2)


@pytest.mark.parametrize("times", [1, 3])
def test_a_session_that_is_invalid_at_the_resume_is_made_anew(kind: str, times: int) -> None:
    with faulty_quay(kind) as quay:
        sending, receiving, given = between_rounds(quay)
        refuse_connections(quay.sender, times)
        replace_memory(quay)
        sending.put(320, **part(given, 320, TOKENS))
        assert_same(receiving.result(PATIENCE), given)
        sending.wait(PATIENCE)


def test_a_session_that_stays_invalid_at_the_resume_fails_and_says_why(kind: str) -> None:
    with faulty_quay(kind, max_bumps=2) as quay:
        sending, receiving, given = between_rounds(quay)
        refuse_connections(quay.sender, 1 << 60)
        replace_memory(quay)
        sending.put(320, **part(given, 320, TOKENS))
        for transfer in (receiving, sending):
            with pytest.raises(errors.PeerUnreachable, match="connection refused"):
                transfer.wait(PATIENCE)


def replace_memory(quay: Quay) -> None:
    """Every slab of the receiver gets fresh memory: what the sender knows of it is void."""
    before = quay.receiver._call(lambda: list(quay.receiver.machine.generations))

    def replace() -> None:
        machine = quay.receiver.machine
        for slab in range(machine.pool.slabs):
            machine.pool.retire(slab)
        quay.receiver._do(machine._step())

    quay.receiver._call(replace)
    assert quay.receiver._call(lambda: quay.receiver.machine.generations) == [generation + 1 for generation in before]


def test_memory_that_was_replaced_between_rounds_is_learnt_before_the_next_write(kind: str) -> None:
    with Quay(kind, **ROUNDS, slabs=2) as quay:
        sending, receiving, given = between_rounds(quay)
        replace_memory(quay)
        sending.put(320, **part(given, 320, TOKENS))
        assert_same(receiving.result(PATIENCE), given)
        sending.wait(PATIENCE)


# ---- cancelling ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", ["sender", "receiver"])
def test_either_side_may_cancel_between_rounds_and_both_end(kind: str, who: str) -> None:
    with Quay(kind, **ROUNDS) as quay:
        sending, receiving, _ = between_rounds(quay)
        mine, other = (sending, receiving) if who == "sender" else (receiving, sending)
        mine.cancel()
        assert mine.status == "FAILED"  # at once
        with pytest.raises(errors.Cancelled):
            mine.wait(0)
        with pytest.raises(errors.Cancelled):
            other.wait(PATIENCE)
        mine.cancel()
        other.cancel()  # too late: nothing happens
        with pytest.raises(errors.FerryError, match=r"ended|cancelled"):
            sending.put(320, **rows(1, layout=SMALL))
        assert_clean(quay.sender, quay.receiver)
        quay.carry(TOKENS)  # the room is free again


@pytest.mark.parametrize("who", ["sender", "receiver"])
def test_cancelling_under_a_write_frees_its_blocks_only_when_it_has_drained(kind: str, who: str) -> None:
    with faulty_quay(kind) as quay:
        script(quay.sender, from_post(2, HOLD))
        sending, receiving = quay.sender.send(1, **rows(TOKENS, layout=SMALL)), quay.receive(1)
        eventually(lambda: proxy(quay.sender).held)
        (sending if who == "sender" else receiving).cancel()
        for transfer in (sending, receiving):
            with pytest.raises(errors.Cancelled):
                transfer.wait(PATIENCE)
        eventually(lambda: "quarantined" in books(quay.receiver))
        assert "sources" in books(quay.sender)
        assert quay.receiver.free_blocks < 8
        let_go(quay.sender)


def test_cancelling_before_the_other_side_has_come_leaves_nothing_and_tells_it(kind: str) -> None:
    with Quay(kind, **ROUNDS) as quay:
        early = quay.receive(1)
        eventually(lambda: early.status == "WAITING_FOR_INPUT")
        early.cancel()
        assert_clean(quay.sender, quay.receiver)
        late = quay.sender.send(1, **rows(5, layout=SMALL))
        with pytest.raises(errors.Cancelled):
            late.wait(PATIENCE)
        alone = quay.sender.send(2, **rows(5, layout=SMALL))
        alone.cancel()
        assert_clean(quay.sender, quay.receiver)
        quay.carry(50, room=1)
        quay.carry(50, room=2)


def introduced(quay: Quay) -> None:
    """Wait until the receiver's transport knows the sender's: in one process only what it says proves its end."""
    for known in quay.receiver._known.values():
        if quay.kind == "shm":
            eventually(lambda link=known.reach.lane.peer.link: link._welcomed)
        elif quay.kind == "tcp":
            eventually(lambda link=known.reach.lane.peer.links[0]: link.up)


# ---- restarts --------------------------------------------------------------------------------------------------


def restart_sender(quay: Quay) -> None:
    address = quay.sender.address
    quay.crash(quay.sender)
    quay.sender = quay.add_sender(bind=address)


def test_a_restarted_sender_with_the_same_content_finishes_and_resends_nothing(kind: str) -> None:
    with faulty_quay(kind) as quay:
        _, receiving, given = between_rounds(quay, content_id=b"content-revision")
        restart_sender(quay)
        sending = quay.sender.send(1, content_id=b"content-revision", **given)
        assert_same(receiving.result(PATIENCE), given)
        sending.wait(PATIENCE)
        blocks = quay.receiver.geometry.blocks_for(TOKENS) - 320 // BLOCK
        assert sum(r.tokens for r in receiving.rounds) == TOKENS
        assert receiving.rounds[-1].start >= 320
        per_block = -(-SMALL.token_bytes * BLOCK // 64) * 64
        assert proxy(quay.sender).bytes_posted <= blocks * (per_block + 128)


def test_a_restarted_sender_with_other_content_starts_over(kind: str) -> None:
    with Quay(kind, **ROUNDS) as quay:
        _, receiving, _ = between_rounds(quay)
        restart_sender(quay)
        other = rows(700, seed=99, layout=SMALL)
        sending = quay.sender.send(1, **other)
        assert_same(receiving.result(PATIENCE), other)
        sending.wait(PATIENCE)
        assert receiving.total_tokens == 700
        assert sum(r.tokens for r in receiving.rounds) == 700


def test_a_restarted_sender_with_other_content_fails_what_the_caller_has_begun_to_read(kind: str) -> None:
    with Quay(kind, **ROUNDS) as quay:
        _, receiving, given = between_rounds(quay)
        start, stop, views = next(receiving.rows(PATIENCE))
        assert_same(views, part(given, start, stop))
        restart_sender(quay)
        sending = quay.sender.send(1, **rows(700, seed=99, layout=SMALL))
        for transfer in (receiving, sending):
            with pytest.raises(errors.ContentChanged):
                transfer.wait(PATIENCE)


def test_rows_after_a_start_over_are_those_of_the_new_content(kind: str) -> None:
    """What had arrived of the old content does not count as ready."""
    with Quay(kind, **ROUNDS) as quay:
        _, receiving, _ = between_rounds(quay)
        restart_sender(quay)
        other = rows(700, seed=99, layout=SMALL)
        sending = quay.sender.announce(1, 700)
        sending.put(0, **part(other, 0, 32))
        eventually(lambda: receiving.total_tokens == 700 and receiving.ready_tokens == 32)
        pieces = receiving.rows(PATIENCE)
        start, stop, views = next(pieces)
        assert (start, stop) == (0, 32)
        assert_same(views, part(other, 0, 32))
        sending.put(32, **part(other, 32, 700))
        for start, stop, views in pieces:
            assert_same(views, part(other, start, stop))
        assert stop == 700


def test_a_sender_that_does_not_come_back_is_lost_within_the_timeout(kind: str) -> None:
    with Quay(kind, **ROUNDS, **QUICK) as quay:
        _, receiving, _ = between_rounds(quay)
        quay.crash(quay.sender)
        with pytest.raises(errors.PeerLost):
            receiving.wait(PATIENCE)
        assert_clean(quay.receiver)


@ENDS_SEEN
def test_a_sender_that_dies_with_blocks_in_its_hands_gives_them_back_by_its_end(kind: str) -> None:
    """F4: no slab has to be replaced, and other senders' rooms go on."""
    with faulty_quay(kind, **QUICK, clean=False) as quay:
        script(quay.sender, from_post(2, HOLD))
        quay.sender.send(1, **rows(TOKENS, layout=SMALL))
        receiving = quay.receive(1)
        eventually(lambda: proxy(quay.sender).held)
        regions = quay.receiver._call(quay.receiver._buffers.regions)
        introduced(quay)
        quay.crash(quay.sender)
        eventually(lambda: quay.receiver.free_blocks == 8)
        with pytest.raises(errors.PeerLost):
            receiving.wait(PATIENCE)
        assert_clean(quay.receiver)
        assert quay.receiver._call(quay.receiver._buffers.regions) == regions
        assert quay.receiver._call(lambda: quay.receiver._buffers.graveyard.nbytes) == 0
        quay.sender = quay.add_sender()
        quay.carry(TOKENS)


def test_what_is_left_of_a_lost_sender_does_not_spoil_its_successor(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No proof, and no memory to replace the slab with: its blocks stay in quarantine, and all others are in use."""
    with faulty_quay(kind, **QUICK, slabs=8, clean=False) as quay:
        receiver = quay.receiver

        def no_memory(*about: object) -> None:
            raise errors.TransportError("no memory")

        monkeypatch.setattr(receiver.carriers.transports[0], "peer_state", lambda peer: PeerState.UNKNOWN)
        monkeypatch.setattr(receiver._buffers, "replace", no_memory)
        script(quay.sender, from_post(2, HOLD))
        quay.sender.send(1, **rows(TOKENS, layout=SMALL))
        lost = quay.receive(1)
        eventually(lambda: proxy(quay.sender).held)
        address = quay.sender.address
        quay.crash(quay.sender)
        with pytest.raises(errors.PeerLost):
            lost.wait(PATIENCE)
        eventually(lambda: receiver._stuck_slabs)
        nobody = receiver.receive(2, address)
        with pytest.raises(errors.PeerUnreachable):
            nobody.wait(PATIENCE)
        quay.sender = quay.add_sender(bind=address)
        quay.carry(TOKENS, room=3)
        assert receiver.free_blocks < 8
        monkeypatch.undo()
        assert_clean(receiver)


def test_a_restarted_receiver_gets_the_room_from_the_beginning(kind: str) -> None:
    with Quay(kind, **ROUNDS, **QUICK) as quay:
        sending, _, given = between_rounds(quay)
        successor = quay.add_receiver()  # an engine's start takes longer than the sender waits for one
        quay.crash(quay.receiver)
        quay.receivers[0] = successor
        receiving = quay.receive(1)
        eventually(lambda: receiving.sent_tokens == 320)
        sending.put(320, **part(given, 320, TOKENS))
        assert_same(receiving.result(PATIENCE), given)
        sending.wait(PATIENCE)


def test_a_receiver_restarted_under_its_name_replaces_its_predecessor_at_once(kind: str) -> None:
    with Quay(kind, **ROUNDS) as quay:  # default timeouts: nothing waits for them
        named = quay.receivers[0] = quay.add_receiver(name="language-0")
        sending, _, given = between_rounds(quay)
        quay.crash(named)
        quay.receivers[0] = quay.add_receiver(name="language-0")
        receiving = quay.receive(1)
        sending.put(320, **part(given, 320, TOKENS))
        assert_same(receiving.result(PATIENCE), given)
        sending.wait(PATIENCE)


def test_a_receiver_that_does_not_come_back_ends_the_send(kind: str) -> None:
    with Quay(kind, **ROUNDS, **QUICK) as quay:
        sending, _, _ = between_rounds(quay)
        quay.crash(quay.receiver)
        with pytest.raises(errors.PeerLost):
            sending.wait(PATIENCE)
        assert_clean(quay.sender)


# ---- closing and interrupting ----------------------------------------------------------------------------------


@pytest.mark.parametrize("who", ["sender", "receiver"])
def test_closing_an_endpoint_in_the_middle_cancels_on_both_sides(kind: str, who: str) -> None:
    with Quay(kind, **ROUNDS) as quay:
        sending, receiving, _ = between_rounds(quay)
        (quay.sender if who == "sender" else quay.receiver).close()
        for transfer in (sending, receiving):
            with pytest.raises(errors.Cancelled, match="closed"):
                transfer.wait(PATIENCE)
        with pytest.raises(errors.BadCall):
            quay.sender.send(2, **rows(1, layout=SMALL)) if who == "sender" else quay.receive(2)
        assert_clean(quay.receiver if who == "sender" else quay.sender)


def test_closing_while_writes_hang_is_bounded_and_ends_everything(kind: str) -> None:
    with faulty_quay(kind, clean=False) as quay:
        script(quay.sender, from_post(0, HOLD))
        sending, receiving = quay.sender.send(1, **rows(TOKENS, layout=SMALL)), quay.receive(1)
        eventually(lambda: proxy(quay.sender).held)
        quay.sender.close()
        for transfer in (sending, receiving):
            with pytest.raises(errors.FerryError):
                transfer.wait(PATIENCE)
        assert_clean(quay.receiver)


def test_closing_twice_and_from_two_threads_is_closing(kind: str) -> None:
    quay = Quay(kind, **ROUNDS)
    between_rounds(quay)
    threads = [threading.Thread(target=end.close) for end in quay.ends for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()
    quay.close()
    with pytest.raises(errors.BadCall, match="closed"):
        quay.receive(2)


@pytest.mark.parametrize("who", ["sender", "receiver"])
def test_ctrl_c_in_wait_interrupts_the_wait_and_not_the_transfer(kind: str, who: str) -> None:
    with Quay(kind, **ROUNDS) as quay:
        sending, receiving, given = between_rounds(quay)
        timer = threading.Timer(0.05, lambda: os.kill(os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            (sending if who == "sender" else receiving).wait(PATIENCE)
        timer.join()
        sending.put(320, **part(given, 320, TOKENS))
        assert_same(receiving.result(PATIENCE), given)
        sending.wait(PATIENCE)


def test_a_receiver_that_nobody_offers_the_room_to_gives_up_at_the_announce_deadline(kind: str) -> None:
    with Quay(kind, **ROUNDS, announce_deadline=0.3) as quay:
        receiving = quay.receive(1)
        with pytest.raises(errors.DeadlineExceeded, match="announce"):
            receiving.wait(PATIENCE)
        assert_clean(quay.receiver, quay.sender)


@pytest.mark.parametrize("who", ["sender", "receiver"])
def test_a_transfer_that_stalls_ends_at_its_deadline_on_both_sides(kind: str, who: str) -> None:
    deadline = {"transfer_deadline": 0.6}
    own = (
        {"sender_settings": deadline} if who == "sender" else deadline | {"sender_settings": {"transfer_deadline": 99}}
    )
    with Quay(kind, **ROUNDS, **own) as quay:
        sending, receiving, _ = between_rounds(quay)
        for transfer in (sending, receiving):
            with pytest.raises(errors.DeadlineExceeded, match="transfer_deadline"):
                transfer.wait(PATIENCE)


@ENDS_SEEN
def test_the_state_of_a_crashed_endpoint_is_provable(kind: str) -> None:
    """What the tests above rely on: the transports of this suite notice an end."""
    with Quay(kind, **ROUNDS, clean=False) as quay:
        between_rounds(quay)
        known = next(iter(quay.receiver._known.values()))
        introduced(quay)
        quay.crash(quay.sender)
        eventually(lambda: known.reach.quiet)

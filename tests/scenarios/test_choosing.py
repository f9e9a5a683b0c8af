"""Two endpoints that know only an address: what they agree on, what they fall back to, what is never replaced."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import pytest
from fault_kit import FAIL, FAULTY, HOLD, LOSE, RAISE, WRITE, FaultyMemory, let_go, script
from scenario_kit import PATIENCE, assert_clean, assert_same, eventually, rows

import tensorferry as tf
from tensorferry.backends.memory import MemoryOptions, MemoryTransport
from tensorferry.backends.shm import ShmOptions, ShmTransport
from tensorferry.conformance.faults import FaultProxy
from tensorferry.core import asking, errors, receiving, sender, sending
from tensorferry.core.carriers import Reach
from tensorferry.core.posting import FALL_BACK_AFTER, MOST_POSTS
from tensorferry.core.settings import Settings
from tensorferry.core.transport import PeerState, Transport

SMALL = tf.Layout([tf.Component("x", "float32", (8,))])
TOKENS = 1000
ROUNDS = {"block_size": 16, "pool_blocks": 8, "first_grant": 128, "window": "rounds"}


def shm() -> ShmTransport:
    return ShmTransport(ShmOptions())


def memory() -> MemoryTransport:
    return MemoryTransport(MemoryOptions())


def faulty() -> FaultProxy:
    return FAULTY["shm"]()


class Sides:
    """A sender and a receiver, each with the transports that it is given."""

    def __init__(self, ours: list[Transport], theirs: list[Transport], **settings: Any) -> None:
        made = Settings(**{**ROUNDS, **settings})
        self.sender = sending.Sender(SMALL, ours, made)
        self.receiver = receiving.Receiver(SMALL, theirs, made, poison=True)

    def __enter__(self) -> Sides:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            if kind is None:
                assert_clean(self.sender, self.receiver)
                assert not self.receiver.stale_writes
        finally:
            self.receiver.close()
            self.sender.close()

    def carry(self, room: int = 1) -> tuple[tf.SendTransfer, tf.ReceiveTransfer]:
        given = rows(TOKENS, seed=room, layout=SMALL)
        sent, received = self.sender.send(room, **given), self.receiver.receive(room, self.sender.address)
        assert_same(received.result(PATIENCE), given)
        sent.wait(PATIENCE)
        return sent, received


def test_two_sides_that_name_nothing_agree_on_the_best_and_both_say_why() -> None:
    with tf.Sender(SMALL) as sender, tf.Receiver(SMALL) as receiver:
        given = rows(TOKENS, layout=SMALL)
        sent, received = sender.send(1, **given), receiver.receive(1, sender.address)
        assert_same(received.result(PATIENCE), given)
        sent.wait(PATIENCE)
        assert sent.transport == received.transport == "shm"
        for transfer in (sent, received):
            told = {v.name: v for v in transfer.verdicts}
            assert told["shm"].reason == "first choice: over memcpy"
            assert told["tcp"].viable


@pytest.mark.parametrize("named", ["sender", "receiver"])
@pytest.mark.parametrize("name", ["shm", "tcp"])
def test_a_name_on_one_side_decides(named: str, name: str) -> None:
    names = {"sender": {}, "receiver": {}, named: {"transport": name}}
    with tf.Sender(SMALL, **names["sender"]) as sender, tf.Receiver(SMALL, **names["receiver"]) as receiver:
        given = rows(TOKENS, layout=SMALL)
        sent, received = sender.send(1, **given), receiver.receive(1, sender.address)
        assert_same(received.result(PATIENCE), given)
        sent.wait(PATIENCE)
        assert sent.transport == received.transport == name


def test_names_that_do_not_meet_are_an_error_and_not_replaced() -> None:
    with tf.Sender(SMALL, transport="tcp") as sender, tf.Receiver(SMALL, transport="shm") as receiver:
        sender.send(1, **rows(10, layout=SMALL))
        with pytest.raises(errors.TransportMismatch, match=r"tcp.*shm|shm.*tcp"):
            receiver.receive(1, sender.address).wait(PATIENCE)


@pytest.mark.parametrize("what", [FAIL, RAISE])
def test_what_keeps_failing_is_given_up_for_the_next_and_nothing_is_lost(
    what: str, caplog: pytest.LogCaptureFixture
) -> None:
    bad = faulty()
    script(bad, lambda n: what if n >= 2 else WRITE)
    with Sides([bad, memory()], [shm(), memory()]) as sides:
        sent, received = sides.carry()
        assert received.transport == "memory"
        eventually(lambda: sent.transport == "memory")
        assert "memory carries" in caplog.text
        posts = bad.posts
        assert posts >= 2 + FALL_BACK_AFTER
        sides.carry(2)
        assert bad.posts == posts


def test_writes_that_were_lost_on_the_way_that_was_given_up_harm_nobody() -> None:
    """They land after the next transport has carried everything: their blocks were not given to anybody."""
    bad = faulty()
    script(bad, lambda n: LOSE)
    with Sides([bad, memory()], [shm(), memory()], pool_blocks=16, slabs=4) as sides:
        given = rows(TOKENS, layout=SMALL)
        sent, received = sides.sender.send(1, **given), sides.receiver.receive(1, sides.sender.address)
        eventually(lambda: bad.posts)

        def landed() -> bool:
            let_go(sides.sender)
            return received.done

        eventually(landed)
        assert_same(received.result(PATIENCE), given)
        sent.wait(PATIENCE)


def test_one_good_write_forgives_what_failed_before() -> None:
    bad = faulty()
    script(bad, lambda n: FAIL if n in (1, 2, 4, 5) else WRITE)
    with Sides([bad, memory()], [shm(), memory()], window=1, block_size=64) as sides:
        _, received = sides.carry()
        assert received.transport == "shm"


def test_one_hiccup_of_many_posts_counts_once() -> None:
    """Eight posts are under way; a connection that breaks takes them all. That is one failure, not eight."""
    bad = faulty()
    script(bad, lambda n: FAIL if n < 8 else WRITE)
    with Sides([bad, memory()], [shm(), memory()], slabs=8) as sides:
        _, received = sides.carry()
        assert received.transport == "shm"
        assert bad.posts > 8


def test_what_was_given_up_is_tried_again_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sending, "PREFER_AGAIN_SECONDS", 0.2)
    bad = faulty()
    script(bad, lambda n: FAIL)
    with Sides([bad, memory()], [shm(), memory()]) as sides:
        _, received = sides.carry()
        assert received.transport == "memory"
        script(bad, lambda n: WRITE)
        reach = next(iter(sides.sender._poster.targets.values())).reach
        eventually(lambda: not reach.fallen)
        _, received = sides.carry(2)
        assert received.transport == "shm"


def test_with_one_transport_there_is_nothing_to_fall_back_to() -> None:
    bad = faulty()
    script(bad, lambda n: FAIL)
    with Sides([bad], [shm(), memory()], max_bumps=2) as sides:
        sent = sides.sender.send(1, **rows(TOKENS, layout=SMALL))
        received = sides.receiver.receive(1, sides.sender.address)
        for transfer in (sent, received):
            with pytest.raises(errors.TransportError):
                transfer.wait(PATIENCE)
        assert sent.transport == "shm"


@pytest.mark.parametrize("end", [tf.Sender, tf.Receiver])
def test_rdma_that_is_required_and_not_there_fails_at_once(end: Callable[..., Any]) -> None:
    with pytest.raises(errors.TransportUnavailable, match="rdma is required"):
        end(SMALL, require="rdma")
    with pytest.raises(errors.TransportUnavailable, match="rdma is required"):
        end(SMALL, transport="shm", require="rdma")


def test_options_without_a_name_are_refused() -> None:
    with pytest.raises(errors.ConfigError, match="belong to one transport"):
        tf.Sender(SMALL, options={"prefault": False})


def replace_slabs(sides: Sides) -> None:
    machine = sides.receiver.machine

    def replace() -> None:
        for slab in range(machine.pool.slabs):
            machine.pool.retire(slab)
        sides.receiver._do(machine._step())

    sides.receiver._call(replace)


def test_slabs_that_were_replaced_are_known_by_every_transport() -> None:
    with Sides([shm(), memory()], [shm(), memory()]) as sides:
        sides.carry()
        replace_slabs(sides)
        sides.carry(2)
        target = next(iter(sides.sender._poster.targets.values()))
        target.reach.fall_back("a test")
        _, received = sides.carry(3)
        assert received.transport in ("shm", "memory")
        assert [lane.transport.name for lane in target.reach.lanes] == ["memory", "shm"]


def test_a_transport_that_cannot_register_fresh_memory_gives_way_in_the_middle_of_a_transfer() -> None:
    """And its end is not taken for the receiver's."""
    bad, weak = faulty(), shm()
    script(bad, lambda n: WRITE if n < 2 else HOLD)
    with Sides([bad, memory()], [weak, memory()]) as sides:
        given = rows(TOKENS, layout=SMALL)
        sent, received = sides.sender.send(1, **given), sides.receiver.receive(1, sides.sender.address)
        eventually(lambda: bad.posts > 2)

        def refuse(*memory: Any) -> Any:
            raise errors.TransportError("locked memory is limited")

        weak.register = refuse  # type: ignore[method-assign]
        replace_slabs(sides)
        eventually(lambda: [t.name for t in sides.receiver.carriers.transports] == ["memory"])

        def reach() -> Reach:
            return next(iter(sides.sender._poster.targets.values())).reach

        eventually(lambda: [lane.transport.name for lane in reach().watched] == ["shm"])
        assert not reach().ended
        eventually(lambda: let_go(sides.sender) or received.done)
        assert_same(received.result(PATIENCE), given)
        sent.wait(PATIENCE)
        assert (sent.transport, received.transport) == ("memory", "memory")
        assert "locked memory is limited" in {v.name: v.reason for v in sent.verdicts + received.verdicts}["shm"]


def test_a_sender_tells_whoever_asks_what_it_has_and_keeps_nothing() -> None:
    with tf.Sender(SMALL) as sender:
        told = asking.ask(sender.address, PATIENCE)
        assert {"shm", "tcp"} <= {offer.name for offer in told.offers}
        assert told.name == sender.name
        assert not sender.machine.receivers
        assert not sender.machine.refused


def test_asking_where_nobody_listens_ends_in_time() -> None:
    with pytest.raises(errors.PeerUnreachable, match="nobody answered"):
        asking.ask("tcp://127.0.0.1:9", 0.3)
    with pytest.raises(errors.ConfigError):
        asking.ask("not an address", 0.3)


def test_the_choice_is_logged_once_for_each_peer(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "tensorferry")
    with Sides([shm(), memory()], [shm(), memory()]) as sides:
        for room in range(1, 4):
            sides.carry(room)
    assert sum("is reached by shm (first choice" in line for line in caplog.messages) == 1
    assert sum("can reach us by shm (first choice" in line for line in caplog.messages) == 1


# ---- the path, after a write ---------------------------------------------------------------------------------------


class Strays(MemoryTransport):
    """Says that its bytes go over `way`, by which it was chosen, and `after` so many writes that they go over tcp."""

    way = "rdma"
    after = 1 << 60
    then = "tcp"

    def __init__(self, name: str = "memory") -> None:
        super().__init__(MemoryOptions())
        self.name = name  # type: ignore[misc]
        self.done = 0

    def path(self, peer: Any = None) -> str:
        return self.then if peer is not None and self.done >= self.after else self.way

    def post(self, peer: Any, copies: Any) -> int:
        self.done += 1
        return super().post(peer, copies)


@pytest.mark.parametrize("after", [1, 4])
def test_where_rdma_is_required_bytes_that_went_another_way_do_not_count(after: int) -> None:
    engine, other = Strays(), Strays()
    engine.after = after
    with Sides([engine], [other], require="rdma") as sides:
        sent = sides.sender.send(1, **rows(TOKENS, layout=SMALL))
        received = sides.receiver.receive(1, sides.sender.address)
        for transfer in (sent, received):
            with pytest.raises(errors.PathMismatch, match=r"rdma is required.*over tcp"):
                transfer.wait(PATIENCE)
        posts = engine.done
        assert posts <= after + MOST_POSTS
        waiting = sides.sender.send(2, **rows(TOKENS, layout=SMALL))
        with pytest.raises(errors.PathMismatch):
            sides.receiver.receive(2, sides.sender.address).wait(PATIENCE)
        waiting.cancel()  # for another receiver it would still be there
        assert engine.done == posts  # it is used no more


def test_the_receivers_own_requirement_is_held_against_its_own_engine() -> None:
    engine, strays = Strays(), Strays()
    with tf_ends(engine, strays) as (sender, receiver):
        strays.after = 0
        sender.send(1, **rows(TOKENS, layout=SMALL))
        with pytest.raises(errors.PathMismatch, match=r"rdma is required.*over tcp"):
            receiver.receive(1, sender.address).wait(PATIENCE)


@pytest.mark.parametrize(("then", "told"), [("tcp", "tcp"), ("", "nobody knows what")])
def test_the_receivers_requirement_is_held_against_what_the_senders_engine_says(then: str, told: str) -> None:
    engine, unaware = Strays(), Strays()
    with tf_ends(engine, unaware) as (sender, receiver):
        engine.after, engine.then = 0, then
        sender.send(1, **rows(TOKENS, layout=SMALL))
        with pytest.raises(
            errors.PathMismatch, match=rf"rdma is required.*by the sender's word its bytes go over {told}"
        ):
            receiver.receive(1, sender.address).wait(PATIENCE)


@contextmanager
def tf_ends(ours: Transport, theirs: Transport) -> Iterator[tuple[sending.Sender, receiving.Receiver]]:
    """Only the receiver requires RDMA; its engine strays after the two have met."""
    settings = Settings(**ROUNDS)
    with (
        sending.Sender(SMALL, ours, settings) as sender,
        receiving.Receiver(SMALL, theirs, replace(settings, require="rdma")) as receiver,
    ):
        given = rows(TOKENS, layout=SMALL)
        sender.send(9, **given)
        assert_same(receiver.receive(9, sender.address).result(PATIENCE), given)
        yield sender, receiver


def test_otherwise_it_is_one_warning_and_the_transfer_says_what_carried(caplog: pytest.LogCaptureFixture) -> None:
    engine = Strays()
    with Sides([engine], [Strays()]) as sides:
        sent, received = sides.carry()
        assert (sent.transport, sent.path, received.path) == ("memory", "rdma", "rdma")
        engine.after = 0
        sent, received = sides.carry(2)
        sides.carry(3)
        assert (sent.path, received.path) == ("tcp", "tcp")
        assert "chosen over rdma, and by the engine's word its bytes go over tcp" in sent.verdicts[0].reason
        assert "chosen over rdma, and by the sender's word its bytes go over tcp" in received.verdicts[0].reason
    assert caplog.text.count("chosen over rdma") == 2  # once on each side


# ---- staging under writes whose outcome nobody knows ----------------------------------------------------------


class Engine(FaultyMemory):
    """Reads registered memory alone, as an engine over RDMA. `reads_on`: what it lost is read for ever."""

    capabilities = replace(MemoryTransport.capabilities, registers_sources=True)
    reads_on = False

    def source_free(self, handle: int) -> bool:
        return self.drained(handle) or not self.reads_on


@pytest.mark.parametrize("reads_on", [False, True])
def test_lost_writes_to_one_receiver_leave_staging_for_the_others(reads_on: bool) -> None:
    engine = Engine(MemoryOptions())
    engine.reads_on = reads_on
    quick = {"peer_timeout": 2.0, "heartbeat": 0.1, "quarantine_quota": 1000, "max_bumps": 100}
    script(engine, lambda n: LOSE if n in (3, 12, 14, 21) else WRITE)
    with Sides([engine], [memory()], staging_bytes=16 * 32 * 4, window=2, **quick) as sides:
        for room in range(1, 4):
            sides.carry(room)
        held = sides.sender._call(lambda: sides.sender._poster.staging.taken_bytes)
        lost = len(engine.held)
        assert lost
        assert (held > 0) is reads_on
        let_go(sides.sender)
        eventually(lambda: not sides.sender._call(lambda: sides.sender._poster.staging.taken_bytes))


class Sockets(FaultyMemory):
    """Reads the caller's rows where they lie, and has copied what it sent: as plain sockets."""

    def source_free(self, handle: int) -> bool:
        return True


@pytest.mark.parametrize("copies", [False, True])
def test_a_lost_write_pins_the_callers_rows_only_as_long_as_they_may_be_read(copies: bool) -> None:
    bad = (Sockets if copies else FaultyMemory)(MemoryOptions())
    script(bad, lambda n: LOSE if n == 1 else WRITE)
    with Sides([bad], [memory()], peer_timeout=2.0, heartbeat=0.1) as sides:
        sent, _ = sides.carry()
        source = sides.sender._call(lambda: sides.sender._poster.sources[sent._serial])
        assert source._released is copies
        let_go(sides.sender)
        eventually(lambda: not sides.sender._call(lambda: dict(sides.sender._poster.sources)))
        assert source._released


def test_a_write_that_hangs_does_not_pin_rows_that_waited_for_staging_when_the_transfer_ended() -> None:
    engine = Engine(MemoryOptions())
    script(engine, lambda n: HOLD)
    with Sides([engine], [memory()], staging_bytes=16 * 32) as sides:
        sent = sides.sender.send(1, **rows(TOKENS, layout=SMALL))
        sides.receiver.receive(1, sides.sender.address)
        eventually(lambda: engine.held and sides.sender._poster._lines)
        source = sides.sender._poster.sources[sent._serial]
        sent.cancel()
        eventually(lambda: not sides.sender._call(lambda: dict(sides.sender._poster._lines)))
        assert sides.sender._call(lambda: source._released)
        let_go(sides.sender)


def test_writes_to_a_receiver_that_was_lost_are_not_kept_for_ever(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As where it died on another host: nothing proves it, and nothing ever drains what it was sent."""
    monkeypatch.setattr(sending, "ABANDON_SECONDS", 0.3)
    monkeypatch.setattr(sender, "MOST_ABANDONED", 0)
    bad = Sockets(MemoryOptions())
    script(bad, lambda n: LOSE if n >= 2 else WRITE)
    with Sides([bad], [memory()], peer_timeout=0.6, heartbeat=0.1) as sides:
        lost = sides.receiver
        monkeypatch.setattr(bad, "peer_state", lambda peer: PeerState.UNKNOWN)
        sent = sides.sender.send(1, **rows(TOKENS, layout=SMALL))
        receiving = lost.receive(1, sides.sender.address)
        eventually(lambda: bad.held)
        lost._call(lambda: setattr(lost._control, "send", lambda route, message: None))  # it is never heard again
        sent.cancel()
        eventually(lambda: "start this side anew" in caplog.text)
        assert sides.sender._call(lambda: dict(sides.sender.machine.writes))  # there is no room to remember them
        monkeypatch.setattr(sender, "MOST_ABANDONED", 1)
        eventually(lambda: not sides.sender._call(lambda: dict(sides.sender.machine.writes)))
        assert caplog.text.count("start this side anew") == 1
        assert lost.incarnation not in sides.sender.machine.receivers
        assert not sides.sender._poster._posted
        eventually(lambda: not sides.sender._poster.sources)
        assert sides.sender.machine.abandoned
        script(bad, lambda n: WRITE)
        sides.receiver = receiving_side = receiver_like(sides)
        sides.carry(2)
        assert receiving_side.machine.peers
        lost.close()
        assert receiving.done


def receiver_like(sides: Sides) -> receiving.Receiver:
    return receiving.Receiver(SMALL, [memory()], sides.receiver.settings, poison=True)


# ---- senders and receivers that come and go ----------------------------------------------------------------------


def test_connections_to_senders_that_nothing_is_wanted_from_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Embedding sides restart on fresh ports for weeks; a language side must not keep a socket for each."""
    monkeypatch.setattr(receiving, "ROUTE_SECONDS", 0.2)
    with tf.Receiver(SMALL, transport="shm") as receiver:
        for room in range(4):
            with tf.Sender(SMALL, transport="shm") as sender:
                given = rows(TOKENS, seed=room, layout=SMALL)
                sender.send(room, **given)
                assert_same(receiver.receive(room, sender.address).result(PATIENCE), given)
        eventually(lambda: not receiver._control.routes)
        assert not receiver.machine.peers
        assert not receiver._heard
        eventually(lambda: not receiver._known)
        with tf.Sender(SMALL, transport="shm") as sender:
            for room in range(10, 12):  # the same sender again, after its connection was let go
                given = rows(TOKENS, seed=room, layout=SMALL)
                sender.send(room, **given)
                assert_same(receiver.receive(room, sender.address).result(PATIENCE), given)
                eventually(lambda: not receiver._control.routes)


def test_a_sender_forgets_receivers_to_make_room_and_serves_them_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with tf.Sender(SMALL, transport="shm") as sender, ExitStack() as stack:
        sender.machine.policy = replace(sender.machine.policy, max_peers=2)
        receivers = [stack.enter_context(tf.Receiver(SMALL, transport="shm")) for _ in range(4)]
        for room in range(12):
            given = rows(TOKENS, seed=room, layout=SMALL)
            sender.send(room, **given)
            assert_same(receivers[room % 4].receive(room, sender.address).result(PATIENCE), given)
        assert len(sender.machine.receivers) == 2
        eventually(lambda: len(sender._poster.targets) <= 2)
        eventually(lambda: len(sender._heard) <= 2)

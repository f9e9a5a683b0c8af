"""The fault proxy: invisible without a policy, and with one it does what it says, again and again.

Long because every kind of fault has its own test, and the endpoints run over all of them.
"""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scenario_kit import PATIENCE, SMALL, Quay, assert_clean, assert_same, eventually, rows

from tensorferry.backends.memory import MemoryOptions, MemoryTransport
from tensorferry.backends.shm import ShmTransport
from tensorferry.backends.tcp import TcpTransport
from tensorferry.conformance.fault_policy import CAPABLE, LIES, TRUTHFUL, Decision, Policy
from tensorferry.conformance.faults import FaultProxy, Ticker, proxied, wrapped
from tensorferry.core.errors import (
    BadCall,
    FerryError,
    OutOfBounds,
    PeerUnreachable,
    ProtocolViolation,
    TransportError,
    Unsupported,
)
from tensorferry.core.memory import host_memory
from tensorferry.core.transport import Copy, Fence, PeerState, Region, RemoteRegion, Status, Transport

SIZE = 4096
DATA = bytes(range(1, 101))

INNER = pytest.mark.parametrize("inner", [MemoryTransport, ShmTransport, TcpTransport], ids=lambda cls: cls.name)


class Two:
    """A writer with faults and an owner (bare unless told otherwise) with one region."""

    def __init__(self, script: Any = "ok", inner: type[Transport] = MemoryTransport, **more: Any) -> None:
        policy = script if isinstance(script, Policy) else Policy.scripted(script, **more)
        self.writer = proxied(inner, policy)(inner.options_type())
        self.owner = proxied(inner, policy if policy.hides else None)(inner.options_type())
        self.region = self.owner.register(self.owner.allocate(SIZE))
        self.source = host_memory(SIZE)
        self.source.view()[: len(DATA)] = DATA
        self.peer: Any = None
        while self.peer is None:
            with contextlib.suppress(PeerUnreachable):
                self.peer = self.writer.connect(self.owner.describe())

    def post(self, nbytes: int = len(DATA), offset: int = 0) -> int:
        remote = RemoteRegion(self.region.id, self.region.generation)
        return self.writer.post(self.peer, [Copy(self.source, 0, remote, offset, nbytes)])

    def landed(self, nbytes: int = len(DATA), offset: int = 0) -> bytes:
        return bytes(self.region.memory.view(offset, nbytes))

    def ended(self, handle: int) -> Status:
        eventually(lambda: self.writer.poll(handle) is not Status.PENDING and self.writer.drained(handle))
        return self.writer.poll(handle)

    def __enter__(self) -> Two:
        return self

    def __exit__(self, *exc: object) -> None:
        self.writer.close()
        self.owner.close()


# ---- an empty policy -----------------------------------------------------------------------------------------


def transcript(open_one: Callable[[], Transport]) -> list[object]:
    """Every verb, used rightly and wrongly: what came of it, without what differs between any two instances."""
    told: list[object] = []

    def ask(name: str, verb: Callable[[], Any]) -> Any:
        try:
            answer = verb()
        except Exception as problem:  # noqa: BLE001 - the error is the answer
            told.append((name, type(problem).__name__, getattr(problem, "transport", None)))
            return None
        told.append((name, answer if isinstance(answer, Status | PeerState | bool | str) else type(answer).__name__))
        return answer

    def ended(handle: int) -> Status:
        eventually(lambda: writer.poll(handle) in (Status.DONE, Status.FAILED))
        return writer.poll(handle)

    owner, writer = open_one(), open_one()
    try:
        told += [owner.name, owner.contract_version, owner.capabilities, owner.options_type, type(owner).probe()]
        region: Region = ask("register", lambda: owner.register(owner.allocate(SIZE)))
        ask("allocate gpu", lambda: owner.allocate(64, "cuda"))
        ask("flush", lambda: owner.flush(region))
        ask("garbage", lambda: writer.connect(b"garbage"))
        peer = ask("connect", lambda: writer.connect(owner.describe()))
        told.append(writer.connect(owner.describe()) is peer)
        ask("path", lambda: writer.path(peer))
        eventually(lambda: writer.peer_state(peer) is not PeerState.UNKNOWN)
        ask("state", lambda: writer.peer_state(peer))
        wakes: list[bool] = []
        ask("on_progress", lambda: writer.on_progress(lambda: wakes.append(True)))
        source = writer.register(writer.allocate(SIZE))
        source.memory.view()[:100] = DATA
        there = RemoteRegion(region.id, region.generation)
        handle = ask("post", lambda: writer.post(peer, [Copy(source, 0, there, 10, 100), Copy(source, 0, there, 0, 5)]))
        ask("ended", lambda: ended(handle))
        ask("drained", lambda: writer.drained(handle))
        ask("cancel", lambda: writer.cancel(handle))
        ask("release", lambda: writer.release(handle))
        for verb in (writer.poll, writer.drained, writer.release, writer.cancel):
            ask("released", lambda verb=verb: verb(handle))  # type: ignore[misc]
        eventually(lambda: wakes)
        told.append(bytes(region.memory.view(0, 200)))
        for copy in (
            Copy(source, 0, there, SIZE - 1, 2),
            Copy(source, SIZE - 1, there, 0, 2),
            Copy(source, -1, there, 0, 2),
            Copy(source, 0, there, 0, 0),
            Copy(source, 0, RemoteRegion(7, 7), 0, 1),
            Copy(region, 0, there, 0, 1),
        ):
            ask("wrong copy", lambda copy=copy: writer.post(peer, [copy]))  # type: ignore[misc]
        ask("no copies", lambda: writer.post(peer, []))
        ask("a stranger", lambda: writer.post("peer", [Copy(source, 0, there, 0, 1)]))
        ask("another's peer", lambda: owner.post(peer, [Copy(region, 0, there, 0, 1)]))
        ask("retire", lambda: owner.retire(region))
        ask("retire again", lambda: owner.retire(region))
        ask("disconnect", lambda: writer.disconnect(peer))
        ask("disconnected", lambda: writer.post(peer, [Copy(source, 0, there, 0, 1)]))
        ask("close", writer.close)
        ask("close again", writer.close)
        ask("closed", writer.describe)
    finally:
        writer.close()
        owner.close()
    return told


@INNER
def test_an_empty_policy_cannot_be_told_from_the_bare_transport(inner: type[Transport]) -> None:
    options = inner.options_type()
    bare = transcript(lambda: inner(options))
    assert transcript(lambda: proxied(inner)(options)) == bare
    assert transcript(lambda: wrapped(inner(options))) == bare


@INNER
def test_a_policy_that_never_strikes_changes_nothing_either(inner: type[Transport]) -> None:
    options = inner.options_type()
    quiet = proxied(inner, Policy.seeded(1, rate=0))
    assert transcript(lambda: quiet(options)) == transcript(lambda: inner(options))


# ---- each kind -----------------------------------------------------------------------------------------------


@INNER
@pytest.mark.parametrize("script", ["late=2", "pieces=5", "pieces=5 shuffle=3", "twice", "snapshot", "unknown late=2"])
def test_what_is_late_cut_up_out_of_order_or_twice_arrives_whole(inner: type[Transport], script: str) -> None:
    with Two(script, inner) as two:
        assert two.ended(two.post(offset=7)) is (Status.UNKNOWN if "unknown" in script else Status.DONE)
        assert two.landed(len(DATA) + 14) == bytes(7) + DATA + bytes(7)


def test_a_late_post_lands_at_the_beat_that_was_decided() -> None:
    with Two("late=3", clock="steps") as two:
        handle = two.post()
        for _ in range(2):
            two.writer.step()
            for _ in range(10):
                assert two.writer.poll(handle) is Status.PENDING
            assert not two.writer.drained(handle)
            assert two.landed() == bytes(len(DATA))
        two.writer.step(2)
        assert two.ended(handle) is Status.DONE
        assert two.landed() == DATA


def test_pieces_land_one_a_beat_and_in_the_order_drawn() -> None:
    with Two("pieces=4 shuffle=1", clock="steps") as two:
        handle = two.post()
        seen = []
        for _ in range(4):
            eventually(lambda: (two.writer.poll(handle), two.writer._posts[handle].inner)[1] is None)
            seen.append(tuple(two.landed()[at] != 0 for at in (0, 25, 50, 75)))
            two.writer.step()
        assert [sum(parts) for parts in seen] == [1, 2, 3, 4]
        assert seen[0] != (True, False, False, False)
        assert two.ended(handle) is Status.DONE


@pytest.mark.parametrize(("script", "landed"), [("fails=0", 0), ("fails=9", 0), ("pieces=4 fails=3", 75)])
def test_a_failed_post_has_placed_no_more_than_it_was_allowed_and_never_all(script: str, landed: int) -> None:
    with Two(script) as two:
        assert two.ended(two.post()) is Status.FAILED
        assert two.landed() == DATA[:landed] + bytes(len(DATA) - landed)
        two.writer.step(50)
        assert two.landed() == DATA[:landed] + bytes(len(DATA) - landed)


def test_an_unknown_post_is_drained_at_its_end_and_not_before() -> None:
    with Two("late=3 unknown", clock="steps") as two:
        handle = two.post()
        assert two.writer.poll(handle) is Status.UNKNOWN
        assert not two.writer.drained(handle)
        with pytest.raises(BadCall):
            two.writer.release(handle)
        two.writer.step(9)
        assert two.ended(handle) is Status.UNKNOWN
        assert two.landed() == DATA
        two.writer.release(handle)
        with pytest.raises(BadCall):
            two.writer.poll(handle)


@pytest.mark.parametrize("let_go", [True, False])
def test_a_held_write_waits_to_be_let_go_or_dropped(let_go: bool) -> None:
    with Two(Policy.seeded(1, ["held", "unknown"], rate=1)) as two:
        assert Fence.DRAIN not in two.writer.capabilities.fences
        handle = two.post()
        for _ in range(100):
            assert two.writer.poll(handle) in (Status.PENDING, Status.UNKNOWN)
        two.writer.step(100)
        assert len(two.writer.held) == 1
        assert two.landed() == bytes(len(DATA))
        two.writer.let_go() if let_go else two.writer.drop()
        assert two.ended(handle) in (Status.UNKNOWN, Status.DONE if let_go else Status.FAILED)
        assert two.landed() == (DATA if let_go else bytes(len(DATA)))


def test_a_write_that_was_held_back_lands_after_retire_unless_that_is_a_declared_fence() -> None:
    for inner, lands in ((MemoryTransport, True), (TcpTransport, False)):
        with Two("held", inner) as two:
            handle = two.post()
            two.owner.retire(two.region)
            assert not two.writer.drained(handle)
            two.writer.let_go()
            assert two.ended(handle) is (Status.DONE if lands else Status.FAILED)
            assert two.landed() == (DATA if lands else bytes(len(DATA)))


def test_a_held_write_outlives_its_peers_disconnect_and_not_its_owners_close() -> None:
    with Two("held") as two:
        first, second = two.post(), two.post(offset=200)
        two.writer.disconnect(two.peer)
        two.writer._posts[first].held = False
        assert two.ended(first) is Status.DONE
        assert two.landed() == DATA
        two.owner.close()
        two.writer.let_go()
        assert two.ended(second) is Status.FAILED
        assert two.landed(offset=200) == bytes(len(DATA))


def test_close_ends_what_is_held_and_nothing_of_it_lands() -> None:
    with Two("held unknown") as two:
        handle = two.post()
        two.writer.close()
        two.writer.let_go()
        assert two.writer.poll(handle) is Status.UNKNOWN
        assert two.writer.drained(handle)
        assert two.landed() == bytes(len(DATA))
        two.writer.release(handle)


def test_late_reading_sees_what_the_source_has_become_and_a_snapshot_does_not() -> None:
    for script, expected in (("late=1", b"changed"), ("late=1 snapshot", DATA[:7])):
        with Two(script, clock="steps") as two:
            handle = two.post(7)
            two.source.view()[:7] = b"changed"
            two.writer.step(2)
            assert two.ended(handle) is Status.DONE
            assert two.landed(7) == expected


def test_what_is_unseen_is_there_after_the_owners_flush() -> None:
    with Two("unseen", hides=True) as two:
        assert two.owner.capabilities.needs_flush
        handle = two.post()
        assert two.ended(handle) is Status.DONE
        assert two.landed() == bytes(len(DATA))
        two.owner.flush(two.region)
        two.owner.flush(two.region)
        assert two.landed() == DATA


def test_a_cancel_is_heard_or_ignored_and_the_status_tells_which() -> None:
    for script, end in (("late=1", Status.FAILED), ("late=1 deaf", Status.DONE)):
        with Two(script, clock="steps") as two:
            handle = two.post()
            two.writer.cancel(handle)
            two.writer.step(2)
            assert two.ended(handle) is end
            assert two.landed() == (DATA if end is Status.DONE else bytes(len(DATA)))
            two.writer.cancel(handle)
            assert two.ended(handle) is end


def test_posts_and_connects_are_refused_before_a_byte_moves() -> None:
    with Two({0: "refuse"}, connects={1: "refuse"}) as two:
        with pytest.raises(TransportError, match="session"):
            two.post()
        assert two.landed() == bytes(len(DATA))
        assert two.ended(two.post()) is Status.DONE
        with pytest.raises(PeerUnreachable, match="connection refused"):
            two.writer.connect(two.owner.describe())
        assert two.writer.connect(two.owner.describe()) is two.peer


def test_what_the_inner_transport_would_refuse_is_refused_whatever_the_policy_says() -> None:
    with Two("late=3") as two:
        for wrong in ((SIZE + 1, 0), (2, SIZE - 1), (0, 0), (1, -1)):
            with pytest.raises(OutOfBounds):
                two.post(*wrong)
        two.owner.retire(two.region)
        with pytest.raises(OutOfBounds):
            two.post()
        with pytest.raises(BadCall):
            two.writer.post(two.peer, [])
        with pytest.raises(ProtocolViolation):
            two.writer.connect(b"no descriptor")
        with pytest.raises(Unsupported):
            two.owner.flush(two.region)


def test_a_lost_peer_is_gone_on_both_sides_and_nothing_of_either_lands_any_more() -> None:
    with Two({0: "held", 1: "lose"}) as two:
        back = two.owner.connect(two.writer.describe())
        handle = two.post()
        assert two.writer.peer_state(two.peer) is PeerState.ALIVE
        with pytest.raises(TransportError, match="gone"):
            two.post()
        assert two.writer.peer_state(two.peer) is PeerState.GONE
        assert two.owner.peer_state(back) is PeerState.GONE
        assert two.ended(handle) is Status.FAILED
        two.writer.let_go()
        assert two.landed() == bytes(len(DATA))
        with pytest.raises(TransportError, match="gone"):
            two.post()
        with pytest.raises(PeerUnreachable):
            two.writer.connect(two.owner.describe())


def test_a_peer_whose_own_writes_may_still_land_is_not_called_gone() -> None:
    with Two() as two:
        region = two.writer.register(two.writer.allocate(64))
        back = two.owner.connect(two.writer.describe())
        there = RemoteRegion(region.id, region.generation)
        flying = two.owner.post(back, [Copy(two.source, 0, there, 0, 8)])
        two.writer.lose(two.peer)
        assert two.writer.peer_state(two.peer) is PeerState.UNKNOWN
        eventually(lambda: two.owner.poll(flying) is Status.DONE)
        assert two.writer.peer_state(two.peer) is PeerState.GONE


# ---- lies ----------------------------------------------------------------------------------------------------


def test_lies_are_told_and_the_bytes_tell_otherwise() -> None:
    for script, status in (
        ("early late=2", Status.DONE),
        ("ghost late=2", Status.FAILED),
        ("drained late=2", Status.UNKNOWN),
    ):
        with Two(script, clock="steps") as two:
            handle = two.post()
            assert two.writer.poll(handle) is status
            assert two.writer.drained(handle)
            two.writer.release(handle)
            assert two.landed() == bytes(len(DATA))
            two.source.view()[:] = bytes(SIZE)  # its reader had been said to be done
            two.writer.step(3)
            eventually(lambda two=two: two.landed() == DATA)  # type: ignore[misc]


def test_a_torn_write_is_done_by_half() -> None:
    with Two("torn") as two:
        assert two.ended(two.post()) is Status.DONE
        assert two.landed() == DATA[:50] + bytes(50)


def test_a_write_that_lands_again_does_so_after_its_end() -> None:
    with Two("again late=1", clock="steps") as two:
        handle = two.post()
        two.writer.step(2)
        assert two.ended(handle) is Status.DONE
        two.region.memory.view()[: len(DATA)] = bytes(len(DATA))
        two.writer.release(handle)
        two.writer.step(2)
        eventually(lambda: two.landed() == DATA)


def test_a_buried_peer_goes_on_writing() -> None:
    with Two({0: "buried"}) as two:
        handle = two.post()
        assert two.writer.peer_state(two.peer) is PeerState.GONE
        assert two.ended(handle) is Status.DONE
        assert two.landed() == DATA


def test_defects_of_an_engine_are_raised_as_they_are() -> None:
    with Two({0: "broken", 1: "mute held"}) as two:
        with pytest.raises(RuntimeError):
            two.post()
        handle = two.post()
        with pytest.raises(RuntimeError):
            two.writer.poll(handle)
        two.writer.let_go()
        assert two.ended(handle) is Status.DONE


# ---- the same again ------------------------------------------------------------------------------------------

ALL_FAULTS = sorted(TRUTHFUL | CAPABLE | LIES)


@given(seed=st.integers(), faults=st.sets(st.sampled_from(ALL_FAULTS)), rate=st.floats(0, 1))
def test_a_seed_and_a_log_give_the_same_decisions(seed: int, faults: set[str], rate: float) -> None:
    def decided(policy: Policy, verbs: Iterator[str] | list[str]) -> str:
        proxy = wrapped(MemoryTransport(MemoryOptions()), policy)
        for verb in verbs:
            proxy._log.next(verb)
        proxy.close()
        return proxy.log

    verbs = ["post", "connect"] * 20
    log = decided(Policy.seeded(seed, faults, rate=rate, clock="steps"), verbs)
    assert decided(Policy.seeded(seed, faults, rate=rate, clock="steps"), verbs) == log
    replayed = Policy.from_log(log)
    assert decided(replayed, verbs) == log
    assert replayed.holds == ("held" in faults)
    shuffled = [replayed.decide("post", number) for number in random.Random(1).sample(range(20), 20)]
    assert sorted(map(str, shuffled)) == sorted(str(Policy.from_log(log).decide("post", n)) for n in range(20))


@given(
    st.builds(
        Decision,
        late=st.integers(0, 9),
        pieces=st.integers(1, 9),
        shuffle=st.integers(0, 9),
        fails=st.integers(-1, 9),
        **{name: st.booleans() for name in ("twice", "snapshot", "unknown", "held", "deaf", "lose", "early", "mute")},
    )
)
def test_a_decision_reads_back_as_it_was_written(decision: Decision) -> None:
    assert Decision.parse(str(decision)) == decision


@pytest.mark.parametrize("wrong", ["sometimes", "late", "twice=1", "late=x", "held=True"])
def test_a_decision_that_cannot_be_read_is_an_error(wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong.partition("=")[0] if "x" not in wrong else "x"):
        Decision.parse(wrong)


@pytest.mark.parametrize("wrong", ["", "decisions", "faults clock=days", "faults\npost one late=1", "faults\npost 1"])
def test_a_log_that_cannot_be_read_is_an_error(wrong: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - each has words of its own
        Policy.from_log(wrong)


def voyage(policy: Policy) -> tuple[str, bytes]:
    """Forty posts to slots of their own; the log and the memory at the end."""
    with Two(policy) as two:
        posts = [posted(two, 64 * n) for n in range(40)]
        waiting = [handle for handle in posts if handle is not None]
        two.writer.let_go()
        for handle in waiting:
            while two.writer.poll(handle) is Status.PENDING or not two.writer.drained(handle):
                two.writer.step()
        return two.writer.log, two.landed(SIZE)


def posted(two: Two, offset: int) -> int | None:
    try:
        return two.post(50, offset)
    except TransportError:
        return None


@pytest.mark.parametrize("clock", ["polls", "steps"])
@pytest.mark.parametrize("seed", range(5))
def test_the_same_seed_or_its_log_ends_in_the_same_memory(seed: int, clock: Any) -> None:
    first = voyage(Policy.seeded(seed, TRUTHFUL | {"held"}, clock=clock))
    assert voyage(Policy.seeded(seed, TRUTHFUL | {"held"}, clock=clock)) == first
    assert voyage(Policy.from_log(first[0])) == first
    assert voyage(Policy.seeded(seed + 100, TRUTHFUL | {"held"}, clock=clock)) != first


def test_a_ticker_gives_the_beats_and_wakes_whoever_waits() -> None:
    with Two("late=3", clock="steps") as two:
        woken = threading.Event()
        two.writer.on_progress(woken.set)
        handle = two.post()
        with Ticker(two.writer, 0.001):
            while two.writer.poll(handle) is not Status.DONE:
                assert woken.wait(PATIENCE)
                woken.clear()
        assert two.landed() == DATA


# ---- endpoints over it ---------------------------------------------------------------------------------------

TOKENS = 300

HARMLESS = sorted(TRUTHFUL - {"lose", "connect"})


def faulty_memory(policy: Policy) -> Callable[[], FaultProxy]:
    return lambda: wrapped(MemoryTransport(MemoryOptions()), policy)


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 1 << 32),
    faults=st.sets(st.sampled_from(HARMLESS), min_size=1),
    rate=st.sampled_from([0.2, 0.5, 0.9]),
    hides=st.booleans(),
)
def test_endpoints_over_truthful_faults_deliver_the_same_bytes_or_a_typed_error(
    seed: int, faults: set[str], rate: float, hides: bool
) -> None:
    policy = Policy.seeded(seed, faults | ({"unseen"} if hides else set()), rate=rate)
    with Quay(
        layout=SMALL, block_size=16, pool_blocks=8, first_grant=64, slabs=2, max_bumps=4,
        poison=not hides,  # what the processor writes over bytes that are placed and not visible has no order with them
        sender_transport=faulty_memory(policy), receiver_transport=faulty_memory(policy),
    ) as quay:  # fmt: skip
        log: Any = lambda: quay.sender.carriers.transports[0].log  # type: ignore[attr-defined]  # noqa: E731
        given_rows = {room: rows(TOKENS, seed=room, layout=SMALL) for room in (1, 2)}
        sent = {room: quay.sender.send(room, **given_rows[room]) for room in given_rows}
        received = {room: quay.receive(room) for room in given_rows}
        for room, transfer in received.items():
            try:
                transfer.wait(PATIENCE)
            except FerryError:
                code = transfer.error.code if transfer.error is not None else "none"
                assert code not in ("none", "internal", "integrity"), log()
            else:
                assert_same(transfer.result(), given_rows[room])
        for room in sent:
            eventually(lambda room=room: sent[room].done)  # type: ignore[misc]
        assert_clean(quay.sender, quay.receiver)


@pytest.mark.parametrize(("seed", "at"), [(1, 0), (2, 2), (3, 5), (4, 9)])
def test_endpoints_that_lose_each_other_end_typed_and_leave_nothing(seed: int, at: int) -> None:
    def decide(verb: str, number: int) -> Decision:
        return Decision(lose=True) if (verb, number) == ("post", at) else base.decide(verb, number)

    base = Policy.seeded(seed, HARMLESS, rate=0.3)
    policy = Policy(decide)
    with Quay(
        layout=SMALL, block_size=16, pool_blocks=8, first_grant=64, peer_timeout=0.8, heartbeat=0.1,
        transfer_deadline=1.5, sender_transport=faulty_memory(policy), receiver_transport=faulty_memory(Policy.empty()),
    ) as quay:  # fmt: skip
        given_rows = rows(TOKENS, layout=SMALL)
        sent, received = quay.sender.send(1, **given_rows), quay.receive(1)
        try:
            received.wait(PATIENCE)
        except FerryError:
            assert received.error is not None
            assert received.error.code != "internal"
        else:
            assert_same(received.result(), given_rows)
        eventually(lambda: sent.done)


def test_a_policy_is_changed_on_the_way() -> None:
    with Two("ok", holds=True) as two:
        first = two.post()
        assert two.ended(first) is Status.DONE
        assert (two.writer.posts, two.writer.connects, two.writer.bytes_posted) == (1, 1, len(DATA))
        two.writer.follow(Policy.scripted({1: "held"}, {1: "refuse"}, holds=True))
        assert two.writer.posts == 1  # the numbers go on
        second = two.post()
        assert two.writer.held
        assert not two.writer.source_free(second)
        with pytest.raises(PeerUnreachable):
            two.writer.connect(two.owner.describe())
        two.writer.let_go()
        assert two.ended(second) is Status.DONE
        assert two.writer.source_free(second)
        assert two.writer.log.splitlines()[1:] == ["post 1 held", "connect 1 refuse"]


def test_what_is_declared_is_not_taken_back_by_another_policy() -> None:
    with Two("ok") as two:
        for more in ({"holds": True}, {"hides": True}):
            with pytest.raises(ValueError, match="declared when it is made"):
                two.writer.follow(Policy.scripted("ok", **more))

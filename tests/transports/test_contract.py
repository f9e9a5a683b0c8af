"""What the Transport contract promises, on every transport that there is, between two ends of one process.

Long because every verb of the contract stands here, each with its refusals.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import random
import threading
import weakref
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transport_ends import (
    OPENERS,
    REGION_BYTES,
    Brake,
    Pair,
    at,
    ended,
    eventually,
    filled,
    in_chunks,
    need,
    over,
    told_to_stop,
)
from transport_ends import source as source_of

from tensorferry.backends import _copier, _descriptor, _hostcopy
from tensorferry.core import memory as memory_module
from tensorferry.core.errors import (
    BadCall,
    OutOfBounds,
    PeerUnreachable,
    ProtocolViolation,
    TransportError,
    TransportMismatch,
    Unsupported,
    VersionMismatch,
)
from tensorferry.core.memory import Memory
from tensorferry.core.transport import (
    MAX_DESCRIPTOR_BYTES,
    Copy,
    Fence,
    Options,
    PeerState,
    RemoteRegion,
    Status,
    Transport,
)

BEFORE, AFTER = b"\xaa", b"\x55"

COPYING = pytest.mark.parametrize("kind", ["memory", "shm"], indirect=True)
"""Those that copy with a thread of their own, which a test can make fail."""

READING_ANYTHING = pytest.mark.parametrize("kind", ["memory", "shm", "tcp"], indirect=True)
"""Those whose sources are any memory."""

PARTING = pytest.mark.parametrize("kind", ["memory", "shm", "tcp"], indirect=True)
"""Those that tell their peers when they close. The others' peers learn of the end of a process, and of nothing else."""

Opener = Callable[[], Transport]
PutOn = Callable[[], Brake]


# ---- writing -------------------------------------------------------------------------------------------------


def test_a_copy_places_its_bytes_and_touches_no_other(pair: Pair) -> None:
    pair.region.memory.view()[:] = BEFORE * REGION_BYTES
    handle = pair.post(AFTER * 100, offset=1000)
    assert ended(pair.writer, handle) is Status.DONE
    assert pair.landed() == BEFORE * 1000 + AFTER * 100 + BEFORE * (REGION_BYTES - 1100)


def test_a_batch_gathers_and_scatters_between_several_regions(pair: Pair) -> None:
    second = pair.owner.register(pair.owner.allocate(64))
    pair.reconnect()
    source = source_of(pair.writer, bytes(range(64)))
    copies = [
        Copy(source, 8, at(second), 0, 8),
        Copy(source, 0, at(pair.region), 40, 8),
        Copy(source, 16, at(second), 8, 48),
    ]
    assert ended(pair.writer, pair.writer.post(pair.peer, copies)) is Status.DONE
    assert pair.landed()[40:48] == bytes(range(8))
    assert bytes(second.memory.view())[:56] == bytes(range(8, 64))


def test_the_source_may_be_a_registered_region_or_where_declared_any_memory(pair: Pair) -> None:
    region = pair.writer.register(filled(pair.writer, b"registered"))
    anything = bytearray(b"anything..")
    memory = Memory(address_of(anything), len(anything), owner=anything)
    copies = [Copy(region, 0, at(pair.region), 0, 10), Copy(memory, 0, at(pair.region), 10, 10)]
    if pair.writer.capabilities.registers_sources:
        with pytest.raises(Unsupported, match="registered"):
            pair.writer.post(pair.peer, copies)
        copies[1] = Copy(pair.writer.register(memory), 0, at(pair.region), 10, 10)
    assert ended(pair.writer, pair.writer.post(pair.peer, copies)) is Status.DONE
    assert pair.landed()[:20] == b"registeredanything.."


def test_a_copy_longer_than_one_chunk_is_placed_whole(open_one: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, writer = open_one(), open_one()
    in_chunks(monkeypatch, 1000, writer)
    region = owner.register(owner.allocate(10_007))
    data = random.Random(1).randbytes(10_007)
    handle = writer.post(writer.connect(owner.describe()), [Copy(source_of(writer, data), 0, at(region), 0, len(data))])
    assert ended(writer, handle) is Status.DONE
    assert bytes(region.memory.view()) == data


def test_done_is_said_only_when_the_last_byte_is_placed(
    pair: Pair, brake: PutOn, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_chunks(monkeypatch, 1024, pair.writer)
    held = brake()
    handle = pair.post(AFTER * REGION_BYTES)
    for _ in range(REGION_BYTES // 1024):
        held.until_held()
        assert pair.writer.poll(handle) is Status.PENDING
        assert not pair.writer.drained(handle)
        assert not pair.landed().endswith(AFTER)
        held.let_one_go()
    assert ended(pair.writer, handle) is Status.DONE
    assert pair.landed() == AFTER * REGION_BYTES


def test_many_posts_from_two_writers_all_land(pair: Pair) -> None:
    slots = 256
    region = pair.owner.register(pair.owner.allocate(2 * slots * 512))
    expected = random.Random(2).randbytes(2 * slots * 512)
    failures: list[BaseException] = []

    def write(half: int) -> None:
        try:
            writer = pair.open()
            peer = writer.connect(pair.owner.describe())
            order = [half * slots + slot for slot in range(slots)]
            random.Random(half).shuffle(order)
            source = source_of(writer, expected)
            handles = [writer.post(peer, [Copy(source, n * 512, at(region), n * 512, 512)]) for n in order]
            assert {ended(writer, handle) for handle in handles} == {Status.DONE}
            for handle in handles:
                writer.release(handle)
        except BaseException as error:  # noqa: BLE001 - asserted below
            failures.append(error)

    threads = [threading.Thread(target=write, args=(half,)) for half in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert bytes(region.memory.view()) == expected


@COPYING
def test_a_batch_that_raises_ends_failed_and_the_next_one_is_copied(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: int) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(_copier, "memmove", refuse)
    first = pair.post(BEFORE * 8)
    assert ended(pair.writer, first) is Status.FAILED
    assert pair.writer.drained(first)
    monkeypatch.undo()
    assert ended(pair.writer, pair.post(AFTER * 8)) is Status.DONE
    assert pair.landed()[:8] == AFTER * 8


# ---- bounds --------------------------------------------------------------------------------------------------

WRONG_COPIES: dict[str, tuple[int, int, int, int, int]] = {
    # local offset, remote id, generation offset, remote offset, bytes
    "no bytes": (0, 0, 0, 0, 0),
    "fewer than no bytes": (0, 0, 0, 0, -1),
    "before the source": (-1, 0, 0, 0, 2),
    "past the source": (1, 0, 0, 0, 64),
    "before the region": (0, 0, 0, -1, 2),
    "past the region": (0, 0, 0, REGION_BYTES - 63, 64),
    "far past the region": (0, 0, 0, 1 << 62, 64),
    "a region that is not there": (0, 7, 0, 0, 64),
    "a generation that was not": (0, 0, 1, 0, 64),
    "a generation before the first": (0, 0, -1, 0, 64),
}


@pytest.mark.parametrize("wrong", WRONG_COPIES.values(), ids=WRONG_COPIES.keys())
def test_one_wrong_copy_refuses_the_batch_before_a_byte_moves(
    pair: Pair, brake: PutOn, wrong: tuple[int, int, int, int, int]
) -> None:
    local_offset, number, generation, remote_offset, nbytes = wrong
    source = source_of(pair.writer, AFTER * 64)
    remote = RemoteRegion(pair.region.id + number, pair.region.generation + generation)
    good = Copy(source, 0, at(pair.region), 0, 64)
    bad = Copy(source, local_offset, remote, remote_offset, nbytes)
    held = brake()
    held.off = True
    with pytest.raises(OutOfBounds):
        pair.writer.post(pair.peer, [good, bad, good])
    # The worker takes batches in order: had the refused one gone to it, its copies would be counted here.
    assert ended(pair.writer, pair.post(AFTER)) is Status.DONE
    assert held.chunks == 1
    assert pair.landed()[1:64] == b"\0" * 63


def test_the_last_byte_of_a_region_can_be_written(pair: Pair) -> None:
    assert ended(pair.writer, pair.post(AFTER, offset=REGION_BYTES - 1)) is Status.DONE
    assert pair.landed()[-1:] == AFTER


def test_a_batch_may_have_max_copies_and_not_one_more(pair: Pair) -> None:
    most = pair.writer.capabilities.max_copies
    source = source_of(pair.writer, AFTER)
    copies = [Copy(source, 0, at(pair.region), index, 1) for index in range(most)]
    with pytest.raises(Unsupported, match=str(most)):
        pair.writer.post(pair.peer, [*copies, copies[0]])
    assert ended(pair.writer, pair.writer.post(pair.peer, copies)) is Status.DONE
    assert pair.landed()[:most] == AFTER * most


def test_a_post_of_nothing_is_refused(pair: Pair) -> None:
    with pytest.raises(BadCall):
        pair.writer.post(pair.peer, [])


def test_a_source_region_that_is_retired_is_refused(pair: Pair) -> None:
    source = pair.writer.register(filled(pair.writer, AFTER * 8))
    pair.writer.retire(source)
    with pytest.raises(OutOfBounds):
        pair.writer.post(pair.peer, [Copy(source, 0, at(pair.region), 0, 8)])


def test_another_transports_region_is_no_source(pair: Pair) -> None:
    with pytest.raises(OutOfBounds):
        pair.writer.post(pair.peer, [Copy(pair.region, 0, at(pair.region), 0, 8)])


# ---- memory --------------------------------------------------------------------------------------------------


def test_memory_is_aligned_writable_and_zeroed(open_one: Opener) -> None:
    memory = open_one().allocate(12_345)
    assert memory.address % 64 == 0
    assert memory.nbytes == 12_345
    assert bytes(memory.view()) == bytes(12_345)
    memory.view()[-1] = 1


@pytest.mark.parametrize("nbytes", [0, -1])
def test_no_memory_cannot_be_allocated(open_one: Opener, nbytes: int) -> None:
    with pytest.raises(BadCall):
        open_one().allocate(nbytes)


def test_memory_that_is_not_to_be_had_is_refused_before_a_page_is_taken(
    open_one: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the kernel would kill processes, any of them, until there is enough."""
    transport = open_one()
    monkeypatch.setattr(memory_module, "available_bytes", lambda: 100_000)
    open_before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(TransportError, match="100000 are available"):
        transport.allocate(100_001)
    assert len(os.listdir("/proc/self/fd")) == open_before
    transport.allocate(100_000)


def test_a_kind_of_memory_that_is_not_declared_is_refused_by_name(pair: Pair) -> None:
    elsewhere = Memory(4096, 4096, "cuda")
    with pytest.raises(Unsupported, match="cuda"):
        pair.owner.register(elsewhere)
    with pytest.raises(Unsupported, match="cuda"):
        pair.owner.allocate(4096, "cuda")
    with pytest.raises(Unsupported, match="cuda"):
        pair.writer.post(pair.peer, [Copy(elsewhere, 0, at(pair.region), 0, 8)])


def test_a_retired_region_is_refused_and_its_id_returns_with_another_generation(pair: Pair) -> None:
    pair.owner.retire(pair.region)
    pair.reconnect()
    with pytest.raises(OutOfBounds):
        pair.post(AFTER)
    fresh = pair.owner.register(pair.owner.allocate(REGION_BYTES))
    assert fresh.id == pair.region.id
    assert fresh.generation > pair.region.generation
    pair.reconnect()
    with pytest.raises(OutOfBounds):
        pair.post(AFTER)
    old, pair.region = pair.region, fresh
    assert ended(pair.writer, pair.post(AFTER)) is Status.DONE
    assert bytes(old.memory.view(0, 1)) == b"\0"
    assert bytes(fresh.memory.view(0, 1)) == AFTER


def test_a_retired_regions_memory_stays_valid(pair: Pair) -> None:
    pair.owner.retire(pair.region)
    pair.region.memory.view()[:] = BEFORE * REGION_BYTES
    assert pair.landed() == BEFORE * REGION_BYTES


def test_a_write_that_was_posted_before_the_region_was_retired_still_ends(pair: Pair, brake: PutOn) -> None:
    held = brake()
    handle = pair.post(AFTER * 8)
    held.until_held()
    pair.owner.retire(pair.region)
    pair.reconnect()
    held.release()
    fenced = Fence.RETIRE in pair.owner.capabilities.fences
    assert ended(pair.writer, handle) is (Status.FAILED if fenced else Status.DONE)
    assert pair.landed()[:8] == (b"\0" if fenced else AFTER) * 8


def test_retire_is_idempotent_and_knows_its_own(pair: Pair) -> None:
    pair.owner.retire(pair.region)
    pair.owner.retire(pair.region)
    with pytest.raises(BadCall):
        pair.writer.retire(pair.region)


def test_the_descriptor_changes_with_the_regions(pair: Pair) -> None:
    before = pair.owner.describe()
    assert pair.owner.describe() == before
    extra = pair.owner.register(pair.owner.allocate(64))
    during = pair.owner.describe()
    pair.owner.retire(extra)
    assert len({before, during, pair.owner.describe()}) == 3


# ---- handles -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["poll", "drained", "release", "cancel"])
@pytest.mark.parametrize("handle", [0, -1, 10_000, "1", None])
def test_a_handle_that_is_unknown_is_a_bad_call(pair: Pair, verb: str, handle: Any) -> None:
    with pytest.raises(BadCall):
        getattr(pair.writer, verb)(handle)


def test_a_terminal_status_is_repeated_until_release_and_then_forgotten(pair: Pair) -> None:
    handle = pair.post(AFTER)
    assert ended(pair.writer, handle) is Status.DONE
    assert [pair.writer.poll(handle) for _ in range(3)] == [Status.DONE] * 3
    assert pair.writer.drained(handle)
    pair.writer.release(handle)
    for verb in (pair.writer.poll, pair.writer.release):
        with pytest.raises(BadCall):
            verb(handle)


def test_a_handle_that_is_not_drained_is_not_released(pair: Pair, brake: PutOn) -> None:
    held = brake()
    handle = pair.post(AFTER)
    with pytest.raises(BadCall):
        pair.writer.release(handle)
    held.release()
    assert ended(pair.writer, handle) is Status.DONE
    pair.writer.release(handle)


def test_handles_are_bounded_and_release_makes_room(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_hostcopy, "MAX_HANDLES", 3)
    handles = [pair.post(AFTER) for _ in range(3)]
    with pytest.raises(TransportError, match="3 handles"):
        pair.post(AFTER)
    ended(pair.writer, handles[0])
    pair.writer.release(handles[0])
    pair.post(AFTER)


@READING_ANYTHING
def test_a_source_lives_until_its_copy_has_ended_and_no_longer(pair: Pair, brake: PutOn) -> None:
    class Owner:
        pass

    owner = Owner()
    alive = weakref.ref(owner)
    backing = filled(pair.writer, AFTER * 8)
    held = brake()
    handle = pair.writer.post(pair.peer, [Copy(Memory(backing.address, 8, owner=owner), 0, at(pair.region), 0, 8)])
    del owner
    held.until_held()
    gc.collect()
    assert alive() is not None
    held.release()
    assert ended(pair.writer, handle) is Status.DONE
    eventually(lambda: alive() is None, "the source is let go before the handle is released")


def test_a_cancelled_post_that_has_not_begun_moves_nothing(pair: Pair, brake: PutOn) -> None:
    assert pair.writer.capabilities.cancellable
    held = brake()
    first = pair.post(BEFORE * 8)
    second = pair.post(AFTER * 8, offset=8)
    held.until_held()
    pair.writer.cancel(second)
    held.release()
    assert ended(pair.writer, first) is Status.DONE
    assert ended(pair.writer, second) is Status.FAILED
    assert pair.landed()[:16] == BEFORE * 8 + b"\0" * 8


def test_cancel_after_the_end_changes_nothing(pair: Pair) -> None:
    handle = pair.post(AFTER)
    ended(pair.writer, handle)
    pair.writer.cancel(handle)
    assert pair.writer.poll(handle) is Status.DONE


def test_the_wake_function_is_called_once_the_status_has_changed(pair: Pair) -> None:
    assert pair.writer.capabilities.wakes
    seen: list[Status] = []
    handles: list[int] = []
    woken = threading.Event()

    def wake() -> None:
        gate.wait()
        seen.append(pair.writer.poll(handles[0]))
        woken.set()

    gate = threading.Event()
    pair.writer.on_progress(wake)
    handles.append(pair.post(AFTER))
    gate.set()
    assert woken.wait(30)
    assert seen == [Status.DONE]


@pytest.mark.parametrize("raised", [RuntimeError, SystemExit, KeyboardInterrupt])
def test_a_wake_function_that_raises_ends_no_worker(pair: Pair, raised: type[BaseException]) -> None:
    def wake() -> None:
        raise raised("no")

    pair.writer.on_progress(wake)
    assert ended(pair.writer, pair.post(BEFORE)) is Status.DONE
    assert ended(pair.writer, pair.post(AFTER)) is Status.DONE


# ---- peers ---------------------------------------------------------------------------------------------------


def test_connect_again_is_the_same_peer_and_an_older_descriptor_takes_nothing_back(pair: Pair) -> None:
    old = pair.owner.describe()
    region = pair.owner.register(pair.owner.allocate(64))
    pair.reconnect()
    assert pair.writer.connect(old) is pair.peer
    source = source_of(pair.writer, AFTER)
    handle = pair.writer.post(pair.peer, [Copy(source, 0, at(region), 0, 1)])
    assert ended(pair.writer, handle) is Status.DONE


@PARTING
def test_a_peer_is_alive_and_gone_once_it_has_closed(pair: Pair) -> None:
    assert pair.writer.capabilities.notices_dead_peer
    assert Fence.PEER_GONE in pair.writer.capabilities.fences
    assert pair.writer.peer_state(pair.peer) is PeerState.ALIVE
    pair.owner.close()
    eventually(lambda: pair.writer.peer_state(pair.peer) is PeerState.GONE)
    with pytest.raises(TransportError):
        pair.post(AFTER)


@PARTING
def test_a_peer_that_closed_with_a_write_it_could_not_stop_is_not_gone(
    pair: Pair, brake: PutOn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_hostcopy, "CLOSE_TIMEOUT_S", 0.05)
    watcher = pair.open()
    peer = watcher.connect(pair.writer.describe())
    held = brake()
    handle = pair.post(AFTER * 8)
    held.until_held()
    pair.writer.close()
    assert pair.writer.poll(handle) is Status.UNKNOWN
    assert not pair.writer.drained(handle)
    assert watcher.peer_state(peer) is not PeerState.GONE
    held.release()
    eventually(lambda: pair.writer.drained(handle))  # Fence.DRAIN
    assert Fence.DRAIN in pair.writer.capabilities.fences


def test_a_peer_that_was_disconnected_is_refused_and_its_handles_keep_their_meaning(pair: Pair, brake: PutOn) -> None:
    held = brake()
    handle = pair.post(AFTER * 8)
    held.until_held()
    pair.writer.disconnect(pair.peer)
    pair.writer.disconnect(pair.peer)
    with pytest.raises(BadCall):
        pair.post(AFTER)
    held.release()
    assert ended(pair.writer, handle) is Status.DONE
    assert pair.landed()[:8] == AFTER * 8
    fresh = pair.writer.connect(pair.owner.describe())
    assert fresh is not pair.peer
    pair.peer = fresh
    assert ended(pair.writer, pair.post(BEFORE)) is Status.DONE


def test_a_peer_of_another_transport_is_no_peer(pair: Pair) -> None:
    other = pair.open()
    for peer in (pair.peer, None, "peer"):
        for call in (
            lambda peer: other.post(peer, [Copy(source_of(other, AFTER), 0, at(pair.region), 0, 1)]),
            other.peer_state,
            other.disconnect,
        ):
            with pytest.raises(BadCall):
                call(peer)


def test_a_transport_can_write_to_itself(open_one: Opener) -> None:
    transport = open_one()
    region = transport.register(transport.allocate(64))
    peer = transport.connect(transport.describe())
    handle = transport.post(peer, [Copy(source_of(transport, AFTER * 8), 0, at(region), 0, 8)])
    assert ended(transport, handle) is Status.DONE
    assert bytes(region.memory.view(0, 8)) == AFTER * 8


# ---- descriptors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(OPENERS))
@settings(max_examples=200)
@given(data=st.binary(max_size=300))
def test_random_bytes_are_no_descriptor(name: str, data: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        lasting(name).connect(data)


@pytest.mark.parametrize("name", sorted(OPENERS))
@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_a_damaged_descriptor_is_refused_or_harmless(name: str, data: st.DataObject) -> None:
    good = bytearray(lasting(name).describe())
    position = data.draw(st.integers(0, len(good) - 1))
    if data.draw(st.booleans()):
        del good[position:]
    else:
        good[position] = data.draw(st.integers(0, 255))
    # Anything else that it raises fails the test.
    with contextlib.suppress(ProtocolViolation, VersionMismatch, TransportMismatch, PeerUnreachable):
        lasting(name).disconnect(lasting(name).connect(bytes(good)))


@pytest.mark.parametrize(
    "wrong",
    [None, 17, "shm", [], {}, ["shm"], [["shm"]], ["tcp", 1], ["shm", "1"], ["shm", 1, 2, 3], [b"shm", 1]],
    ids=repr,
)
def test_other_data_is_no_descriptor(open_one: Opener, wrong: object) -> None:
    with pytest.raises(ProtocolViolation):
        open_one().connect(msgspec.msgpack.encode(wrong))


def test_a_descriptor_of_the_other_transport_is_refused_by_name(kind: str, open_one: Opener) -> None:
    other = next(name for name in OPENERS if name != kind)
    with pytest.raises(ProtocolViolation, match=other):
        open_one().connect(lasting(other).describe())


def test_a_descriptor_of_a_later_version_is_a_version_mismatch(open_one: Opener) -> None:
    transport = open_one()
    fields = msgspec.msgpack.decode(transport.describe())
    fields[1] += 1
    with pytest.raises(VersionMismatch):
        transport.connect(msgspec.msgpack.encode([*fields, "new in that version"]))


@pytest.mark.parametrize("change", ["doubled", "negative", "too many", "too long"])
def test_a_descriptor_with_impossible_regions_is_refused(open_one: Opener, change: str) -> None:
    transport = open_one()
    fields = msgspec.msgpack.decode(transport.describe())
    fields[-1] = {
        "doubled": [[0, 1, 64], [0, 2, 64]],
        "negative": [[0, 1, -64]],
        "too many": [[number, 1, 64] for number in range(_descriptor.MAX_REGIONS + 1)],
        "too long": [[number, 1, 64] for number in range(MAX_DESCRIPTOR_BYTES)],
    }[change]
    with pytest.raises(ProtocolViolation):
        transport.connect(msgspec.msgpack.encode(fields))


def test_a_descriptor_with_the_most_regions_fits(open_one: Opener) -> None:
    fields = msgspec.msgpack.decode(open_one().describe())
    fields[-1] = [[number, (1 << 63) - 1, (1 << 63) - 1] for number in range(_descriptor.MAX_REGIONS)]
    assert len(msgspec.msgpack.encode(fields)) <= MAX_DESCRIPTOR_BYTES


def test_regions_are_bounded(open_one: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_hostcopy, "MAX_REGIONS", 2)
    transport = open_one()
    regions = [transport.register(transport.allocate(64)) for _ in range(2)]
    with pytest.raises(TransportError, match="2 regions"):
        transport.register(transport.allocate(64))
    transport.retire(regions[0])
    transport.register(transport.allocate(64))


# ---- the end -------------------------------------------------------------------------------------------------


def test_close_twice_and_use_after_close(pair: Pair) -> None:
    handle = pair.post(AFTER)
    ended(pair.writer, handle)
    pair.writer.close()
    pair.writer.close()
    for call in (
        lambda: pair.writer.allocate(64),
        lambda: pair.writer.register(pair.region.memory),
        lambda: pair.writer.retire(pair.region),
        pair.writer.describe,
        lambda: pair.writer.connect(pair.owner.describe()),
        lambda: pair.writer.post(pair.peer, []),
        lambda: pair.writer.on_progress(lambda: None),
    ):
        with pytest.raises(BadCall, match="closed"):
            call()
    assert pair.writer.poll(handle) is Status.DONE
    pair.writer.release(handle)
    pair.writer.disconnect(pair.peer)


def test_close_with_work_outstanding_fails_it_and_nothing_lands_later(
    pair: Pair, brake: PutOn, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_chunks(monkeypatch, 1024, pair.writer)
    held = brake()
    begun = pair.post(AFTER * REGION_BYTES)
    queued = pair.post(AFTER * REGION_BYTES)
    held.until_held()
    closing = threading.Thread(target=pair.writer.close)
    closing.start()
    eventually(lambda: told_to_stop(pair.writer))
    held.release()
    closing.join()
    assert pair.writer.poll(queued) is Status.FAILED
    assert pair.writer.drained(begun)
    assert pair.writer.drained(queued)
    if pair.name == "tcp":  # a frame goes on to its end, and the owner says that all of it is placed
        assert pair.writer.poll(begun) is Status.DONE
        assert pair.landed() == AFTER * REGION_BYTES
        return
    assert pair.writer.poll(begun) is Status.FAILED
    assert held.chunks == 1
    assert pair.landed() == AFTER * 1024 + b"\0" * (REGION_BYTES - 1024)


def test_nothing_is_woken_after_close(pair: Pair, brake: PutOn) -> None:
    held = brake()
    calls: list[bool] = []
    closed = threading.Event()
    pair.writer.on_progress(lambda: calls.append(closed.is_set()))
    handles = [pair.post(AFTER) for _ in range(20)]
    held.release()
    pair.writer.close()
    closed.set()
    assert all(pair.writer.drained(handle) for handle in handles)
    assert True not in calls


def test_close_ends_every_thread(open_one: Opener) -> None:
    before = set(threading.enumerate())
    transport = open_one()
    region = transport.register(transport.allocate(64))
    peer = transport.connect(transport.describe())
    ended(transport, transport.post(peer, [Copy(region, 0, at(region), 0, 8)]))
    assert set(threading.enumerate()) > before
    transport.close()
    assert set(threading.enumerate()) <= before


def test_the_owner_may_close_and_drop_its_memory_while_a_write_is_on_the_way(pair: Pair, brake: PutOn) -> None:
    held = brake()
    handle = pair.post(AFTER * 8)
    held.until_held()
    closing = threading.Thread(target=pair.owner.close)
    closing.start()
    eventually(lambda: pair.owner._closed)  # type: ignore[attr-defined]
    del pair.region
    held.release()
    closing.join()
    ends = {Status.DONE, Status.FAILED} if Fence.DRAIN in pair.writer.capabilities.fences else set(Status)
    assert over(pair.writer, handle) in ends


def test_a_transport_that_is_dropped_without_close_ends_its_threads(kind: str) -> None:
    before = set(threading.enumerate())
    transport = OPENERS[kind]()
    region = transport.register(transport.allocate(64))
    peer = transport.connect(transport.describe())
    ended(transport, transport.post(peer, [Copy(region, 0, at(region), 0, 8)]))
    assert set(threading.enumerate()) > before
    del transport, peer, region
    gc.collect()
    eventually(lambda: set(threading.enumerate()) <= before, "the end of the threads")


# ---- what is declared ----------------------------------------------------------------------------------------


def test_what_is_not_declared_is_refused_by_name(pair: Pair) -> None:
    declared = pair.writer.capabilities
    assert not declared.needs_flush
    with pytest.raises(Unsupported, match="needs_flush"):
        pair.owner.flush(pair.region)
    # Only where the owner places the bytes itself. Others' writers keep their way into a retired region's memory.
    assert (Fence.RETIRE in declared.fences) is (pair.name == "tcp")


def test_options_of_another_type_are_refused(kind: str) -> None:
    class Others(Options, frozen=True):
        pass

    with pytest.raises(BadCall):
        type(lasting(kind))(Others())


def test_probe_is_usable_here(kind: str) -> None:
    assert type(lasting(kind)).probe().usable


def address_of(data: bytearray) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(data))


LASTING: dict[str, Transport] = {}
"""One of each kind for the tests that only feed it: opened once, closed at the end of the module."""


def lasting(name: str) -> Transport:
    if name not in LASTING:
        need(name)
        LASTING[name] = OPENERS[name]()
    return LASTING[name]


@pytest.fixture(scope="module", autouse=True)
def _lasting() -> Any:
    yield
    for transport in LASTING.values():
        transport.close()

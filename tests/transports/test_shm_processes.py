"""The shm transport between two processes: what lands, what is noticed, and what a killed process leaves behind."""

from __future__ import annotations

import hashlib
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from transport_ends import Process, at, ended, eventually, filled

from tensorferry.backends.shm import ShmOptions, ShmTransport
from tensorferry.core.errors import TransportError
from tensorferry.core.memory import Memory
from tensorferry.core.transport import Copy, PeerState, RemoteRegion, Status

Start = Callable[..., Process]

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def here() -> Iterator[ShmTransport]:
    transport = ShmTransport(ShmOptions())
    yield transport
    transport.close()


@pytest.fixture
def impatient() -> Iterator[ShmTransport]:
    transport = ShmTransport(ShmOptions(map_timeout=0.3))
    yield transport
    transport.close()


def digest(memory: Memory) -> str:
    return hashlib.sha256(memory.view()).hexdigest()


def one_byte(transport: ShmTransport, peer: object, region: list[int]) -> int:
    return transport.post(peer, [Copy(filled(transport, b"x"), 0, RemoteRegion(*region), 0, 1)])


def test_both_sides_write_into_each_other(here: ShmTransport, process: Start) -> None:
    there = process()
    nbytes = 3 << 20
    ours = here.register(here.allocate(nbytes))
    theirs = there.ask("share", nbytes=nbytes)
    there.ask("connect", descriptor=here.describe().hex())
    peer = here.connect(there.describe())

    status, written = there.ask("write", region=[ours.id, ours.generation], seed=1, nbytes=nbytes)
    assert status == "DONE"
    assert digest(ours.memory) == written

    source = filled(here, os.urandom(nbytes))
    handle = here.post(peer, [Copy(source, 0, RemoteRegion(*theirs), 0, nbytes)])
    assert ended(here, handle) is Status.DONE
    assert there.ask("digest") == digest(source)


def test_a_region_that_is_added_later_is_mapped_when_its_descriptor_comes(here: ShmTransport, process: Start) -> None:
    there = process()
    first = there.ask("share", nbytes=4096)
    peer = here.connect(there.describe())
    assert ended(here, one_byte(here, peer, first)) is Status.DONE
    there.ask("retire")
    second = there.ask("share", nbytes=4096)
    assert here.connect(there.describe()) is peer
    assert ended(here, one_byte(here, peer, second)) is Status.DONE


def test_a_killed_peer_is_gone_and_nothing_of_it_is_left(here: ShmTransport, process: Start) -> None:
    shared_before = set(os.listdir("/dev/shm"))
    there = process()
    region = there.ask("share", nbytes=1 << 20)
    peer = here.connect(there.describe())
    assert ended(here, one_byte(here, peer, region)) is Status.DONE
    assert here.peer_state(peer) is PeerState.ALIVE
    name = there_name(there)
    assert name in sockets()

    there.signal(signal.SIGKILL)
    eventually(lambda: here.peer_state(peer) is PeerState.GONE)
    assert name not in sockets()
    assert set(os.listdir("/dev/shm")) == shared_before
    refused(here, peer, region)


def test_a_peer_that_was_dead_before_we_knew_it_is_gone(here: ShmTransport, process: Start) -> None:
    there = process()
    descriptor = there.describe()
    there.end()
    assert here.peer_state(here.connect(descriptor)) is PeerState.GONE


def test_a_receiver_without_our_memory_is_watched_too(here: ShmTransport, process: Start) -> None:
    """The owner of the pool has to know of its writer's death, and a writer shares no region."""
    there = process()
    peer = here.connect(there.describe())
    assert here.peer_state(peer) is PeerState.ALIVE
    there.signal(signal.SIGKILL)
    eventually(lambda: here.peer_state(peer) is PeerState.GONE)


def test_a_peer_that_closed_is_gone_although_its_process_lives(here: ShmTransport, process: Start) -> None:
    there = process()
    region = there.ask("share", nbytes=4096)
    peer = here.connect(there.describe())
    assert ended(here, one_byte(here, peer, region)) is Status.DONE
    there.ask("close")
    eventually(lambda: here.peer_state(peer) is PeerState.GONE)
    assert there.popen.poll() is None
    refused(here, peer, region)


def test_the_end_of_a_connection_proves_nothing(impatient: ShmTransport, process: Start) -> None:
    there = process()
    region = there.ask("share", nbytes=4096)
    peer = impatient.connect(there.describe())
    assert ended(impatient, one_byte(impatient, peer, region)) is Status.DONE
    there.ask("lose_connections")
    eventually(lambda: peer.link._connection is None or peer.link._dead)
    refused(impatient, peer, region)  # by now its socket is known to be gone
    assert impatient.peer_state(peer) is PeerState.ALIVE


def test_a_stopped_peer_delays_nobody_and_is_never_gone(impatient: ShmTransport, process: Start) -> None:
    stopped, running = process(), process()
    far, near = stopped.ask("share", nbytes=4096), running.ask("share", nbytes=4096)
    descriptor = stopped.describe()
    stopped.stop()
    peer = impatient.connect(descriptor)
    stuck = one_byte(impatient, peer, far)
    assert impatient.poll(stuck) is Status.PENDING

    other = impatient.connect(running.describe())
    assert ended(impatient, one_byte(impatient, other, near)) is Status.DONE
    assert ended(impatient, stuck) is Status.FAILED
    assert impatient.drained(stuck)
    assert impatient.peer_state(peer) is not PeerState.GONE

    again = one_byte(impatient, peer, far)
    impatient.close()
    assert impatient.poll(again) is Status.FAILED


def test_posts_that_follow_do_not_put_off_the_end_of_those_before(impatient: ShmTransport, process: Start) -> None:
    there = process()
    region = there.ask("share", nbytes=4096)
    descriptor = there.describe()
    there.stop()
    peer = impatient.connect(descriptor)
    first = one_byte(impatient, peer, region)

    def ended_under_further_posts() -> bool:
        one_byte(impatient, peer, region)
        return impatient.poll(first) is Status.FAILED

    eventually(ended_under_further_posts)


def test_a_peer_that_goes_on_in_time_is_written_to(here: ShmTransport, process: Start) -> None:
    there = process()
    region = there.ask("share", nbytes=4096)
    descriptor = there.describe()
    there.stop()
    peer = here.connect(descriptor)
    handle = one_byte(here, peer, region)
    assert here.poll(handle) is Status.PENDING
    there.signal(signal.SIGCONT)
    assert ended(here, handle) is Status.DONE
    assert there.ask("digest") == hashlib.sha256(b"x" + bytes(4095)).hexdigest()


def test_a_post_that_failed_for_want_of_an_answer_can_be_made_again(impatient: ShmTransport, process: Start) -> None:
    there = process()
    region = there.ask("share", nbytes=4096)
    descriptor = there.describe()
    there.stop()
    peer = impatient.connect(descriptor)
    assert ended(impatient, one_byte(impatient, peer, region)) is Status.FAILED
    there.signal(signal.SIGCONT)
    assert ended(impatient, one_byte(impatient, peer, region)) is Status.DONE


def test_a_peer_that_was_stopped_for_long_is_still_heard_when_it_closes(
    impatient: ShmTransport, process: Start
) -> None:
    """Nobody posts to it meanwhile: a receiver only watches its sender."""
    there = process()
    descriptor = there.describe()
    there.stop()
    peer = impatient.connect(descriptor)
    eventually(lambda: peer.link._try_again_at < math.inf, "the writer gives up for now")
    there.signal(signal.SIGCONT)
    eventually(lambda: peer.link._welcomed)
    there.ask("close")
    eventually(lambda: impatient.peer_state(peer) is PeerState.GONE)


def test_a_mapped_region_of_a_stopped_peer_is_written_to(here: ShmTransport, process: Start) -> None:
    there = process()
    region = there.ask("share", nbytes=4096)
    peer = here.connect(there.describe())
    assert ended(here, one_byte(here, peer, region)) is Status.DONE
    there.stop()
    source = filled(here, b"y" * 4096)
    assert ended(here, here.post(peer, [Copy(source, 0, RemoteRegion(*region), 0, 4096)])) is Status.DONE
    assert here.peer_state(peer) is not PeerState.GONE
    there.signal(signal.SIGCONT)
    assert there.ask("digest") == hashlib.sha256(b"y" * 4096).hexdigest()


def test_a_post_that_waits_for_a_stopped_peer_can_be_cancelled(here: ShmTransport, process: Start) -> None:
    there = process()
    region = there.ask("share", nbytes=4096)
    descriptor = there.describe()
    there.stop()
    peer = here.connect(descriptor)
    handle = one_byte(here, peer, region)
    here.cancel(handle)
    assert ended(here, handle) is Status.FAILED


def test_a_forked_child_of_the_peer_keeps_neither_it_nor_its_name_alive(here: ShmTransport, process: Start) -> None:
    there = process()
    peer = here.connect(there.describe())
    name = there_name(there)
    child = there.ask("fork")
    try:
        there.signal(signal.SIGKILL)
        eventually(lambda: here.peer_state(peer) is PeerState.GONE)
        eventually(lambda: name not in sockets(), "the child lets go of the name")
        assert Path(f"/proc/{child}").exists()
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_forked_child_cannot_use_what_it_inherited_and_its_parent_can(here: ShmTransport, process: Start) -> None:
    there = process()
    answers = there.ask("fork_and_use")
    assert answers == {"describe": "BadCall", "poll": "BadCall", "allocate": "BadCall", "close": "returned"}
    region = there.ask("share", nbytes=4096)
    peer = here.connect(there.describe())
    assert ended(here, one_byte(here, peer, region)) is Status.DONE


def test_a_process_without_files_to_spare_answers_once_it_has_some(here: ShmTransport, process: Start) -> None:
    there = process()
    region = there.ask("share", nbytes=4096)
    descriptor = there.describe()
    there.ask("limit_files", more=0)
    peer = here.connect(descriptor)
    handle = one_byte(here, peer, region)
    there.ask("limit_files", more=None)
    assert ended(here, handle) is Status.DONE


def test_fifty_openings_leave_no_file_mapping_or_thread(process: Start) -> None:
    there = process()
    region = there.ask("share", nbytes=4096)
    descriptor = there.describe()

    def once() -> None:
        transport = ShmTransport(ShmOptions())
        mine = transport.register(transport.allocate(4096))
        peer = transport.connect(descriptor)
        assert ended(transport, one_byte(transport, peer, region)) is Status.DONE
        me = transport.connect(transport.describe())
        source = filled(transport, b"x")
        assert ended(transport, transport.post(me, [Copy(source, 0, at(mine), 0, 1)])) is Status.DONE
        transport.close()

    def held() -> tuple[int, int, int]:
        maps = Path("/proc/self/maps").read_text().count("memfd:tensorferry")
        return len(os.listdir("/proc/self/fd")), maps, threading.active_count()

    once()
    before = held()
    for _ in range(50):
        once()
    assert held() == before


def there_name(there: Process) -> str:
    """The name of the process's socket, as /proc/net/unix shows it."""
    import msgspec

    from tensorferry.backends._shm_wire import Descriptor

    return msgspec.msgpack.decode(there.describe(), type=Descriptor).socket.decode()


def sockets() -> str:
    return Path("/proc/net/unix").read_text()


def refused(transport: ShmTransport, peer: object, region: list[int]) -> None:
    """Posts to a peer that is gone are refused, once this side knows it; none hangs."""

    def refuses() -> bool:
        try:
            assert ended(transport, one_byte(transport, peer, region)) in (Status.DONE, Status.FAILED)
        except TransportError:
            return True
        return False

    eventually(refuses, "a refusal")

"""The nixl transport between processes: what lands, what is noticed, and who is not held up by whom.

Each test runs over copies between the processes (UCX's own choice on one host), over TCP, or over both.

Long because each row of the engine's failure table has its test.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from functools import partial

import pytest
from engine_kit import abroad, changed, check_quiet_end, ends, one_byte, post
from transport_ends import PATIENCE_S, Process, ended, eventually, need, over, source

from tensorferry.backends import _nixl_keeping, _nixl_poster, _nixl_sockets
from tensorferry.backends._nixl_engine import Agent, Request
from tensorferry.backends.nixl import NixlOptions, NixlPeer, NixlTransport
from tensorferry.core.errors import TransportError, TransportMismatch
from tensorferry.core.memory import Memory
from tensorferry.core.transport import PeerState, Region, Status

Start = Callable[..., Process]

pytestmark = pytest.mark.timeout(120)

MUCH = 48 << 20
"""More than the kernel's buffers between two processes hold."""

BOTH = pytest.mark.parametrize("way", ["memcpy", "tcp"], indirect=True)
COPIES = pytest.mark.parametrize("way", ["memcpy"], indirect=True)
SOCKETS = pytest.mark.parametrize("way", ["tcp"], indirect=True)


@pytest.fixture
def way(request: pytest.FixtureRequest) -> str:
    need("nixl")
    return str(request.param)


@pytest.fixture
def there(process: Start, way: str) -> Start:
    return partial(process, kind="nixl", require=way)


@pytest.fixture
def here(way: str) -> Iterator[NixlTransport]:
    """Impatient: a peer has a second to go on with a write, and a little longer to answer at first contact."""
    transport = NixlTransport(NixlOptions(require=way, contact_timeout=1.5, progress_timeout=1.0))
    yield transport
    transport.close()


# ---- all is well ---------------------------------------------------------------------------------------------


@BOTH
def test_both_sides_write_into_each_other_and_the_path_is_known(here: NixlTransport, there: Start, way: str) -> None:
    other = there()
    nbytes = (9 << 20) + 17
    ours = here.register(here.allocate(nbytes))
    theirs = other.ask("share", nbytes=nbytes)
    other.ask("connect", descriptor=here.describe().hex())
    peer = here.connect(other.describe())
    status, written = other.ask("write", region=[ours.id, ours.generation], seed=1, nbytes=nbytes)
    assert status == "DONE"
    assert hashlib.sha256(ours.memory.view()).hexdigest() == written
    data = os.urandom(nbytes)
    for _ in range(20):
        assert ended(here, post(here, peer, theirs, source(here, data))) is Status.DONE
    assert other.ask("digest") == hashlib.sha256(data).hexdigest()
    assert here.path(peer) == way
    assert here.path() == way
    # The engine's own behaviour says so too: a copy is over when its post returns, and nothing else is.
    assert peer.target.at_once is (way == "memcpy")


# ---- disconnecting -------------------------------------------------------------------------------------------


def sockets(transport: NixlTransport) -> int:
    return len(_nixl_sockets._inodes(transport._agent._sets))


def forget(transport: NixlTransport, peer: NixlPeer) -> None:
    transport.disconnect(peer)
    eventually(lambda: peer.target.learnt < 0, "the end of what the engine knows of the peer")


@BOTH
def test_a_peer_that_is_disconnected_and_connected_again_at_once_is_written_to_every_time(
    here: NixlTransport, there: Start, way: str
) -> None:
    other = there()
    region = other.ask("share", nbytes=4096)
    for _ in range(20):
        peer = here.connect(other.describe())
        assert ended(here, one_byte(here, peer, region)) is Status.DONE
        here.disconnect(peer)


@COPIES
def test_what_somebody_else_tells_of_an_agent_takes_nothing_from_it(here: NixlTransport, there: Start) -> None:
    other = there()
    region = other.ask("share", nbytes=4096)
    peer = here.connect(other.describe())
    assert ended(here, one_byte(here, peer, region)) is Status.DONE
    for _ in range(20):
        here.disconnect(here.connect(changed(other.describe())))
        assert ended(here, one_byte(here, peer, region)) is Status.DONE
    assert peer.target.learnt >= 0


@BOTH
def test_a_peer_that_is_forgotten_leaves_no_connection_behind_and_no_other_loses_its_own(
    here: NixlTransport, there: Start, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine keeps a connection for as long as either side has it. What is ended has to be complete first, else
    the peer answers the next one by one of its own: so each thread writes a byte to the doorstep."""
    knock, knocks = Agent.knock, []

    def heard(agent: Agent, request: Request) -> bool:
        knocks.append((agent, threading.get_ident()))
        return knock(agent, request)

    monkeypatch.setattr(Agent, "knock", heard)
    other, beside = there(), NixlTransport(NixlOptions(require=way, workers=1))
    region = other.ask("share", nbytes=4096)
    at_first = sockets(here)
    neighbour = beside.connect(other.describe())
    assert ended(beside, one_byte(beside, neighbour, region)) is Status.DONE
    for _ in range(5):
        peer = here.connect(other.describe())
        assert ended(here, one_byte(here, peer, region)) is Status.DONE
        assert sockets(here) > at_first
        forget(here, peer)
        assert ended(beside, one_byte(beside, neighbour, region)) is Status.DONE
    eventually(lambda: sockets(here) <= at_first, "the end of all connections to what was forgotten")
    ours = [thread for agent, thread in knocks if agent is here._agent]
    assert len(ours) == 10, "one for the contact and one for the end, each time"
    assert len(set(ours)) == 2
    assert sum(agent is beside._agent for agent, _ in knocks) == 1, "its connection was not cut"
    beside.close()


@SOCKETS
def test_a_peer_that_is_stopped_is_forgotten_all_the_same(here: NixlTransport, there: Start) -> None:
    stopped = there()
    region = stopped.ask("share", nbytes=4096)
    at_first = sockets(here)
    peer = here.connect(stopped.describe())
    assert ended(here, one_byte(here, peer, region)) is Status.DONE
    stopped.stop()
    forget(here, peer)
    eventually(lambda: sockets(here) <= at_first)


# ---- peers that do not answer --------------------------------------------------------------------------------


@BOTH
def test_a_killed_peer_is_gone_what_was_under_way_is_drained_by_that_and_others_go_on(
    here: NixlTransport, there: Start, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    doomed, living = there(), there()
    region, other_region = doomed.ask("share", nbytes=MUCH), living.ask("share", nbytes=1)
    peer, other = here.connect(doomed.describe()), here.connect(living.describe())
    assert ended(here, one_byte(here, peer, region)) is Status.DONE
    assert here.peer_state(peer) is PeerState.ALIVE
    submit, begun = Agent.submit, threading.Event()

    def kill_first(agent: Agent, request: Request) -> bool:
        if not begun.is_set():
            begun.set()
            doomed.signal(signal.SIGKILL)
            doomed.popen.wait()
        return submit(agent, request)

    monkeypatch.setattr(Agent, "submit", kill_first)
    handle = post(here, peer, region, source(here, bytes(MUCH)))
    woken: list[Status] = []
    here.on_progress(lambda: woken.append(here.poll(handle)))
    assert over(here, handle) in (Status.UNKNOWN, Status.FAILED)
    eventually(lambda: here.peer_state(peer) is PeerState.GONE)
    eventually(lambda: here.drained(handle))
    here.release(handle)
    with pytest.raises(TransportError, match="ended"):
        one_byte(here, peer, region)
    assert ended(here, one_byte(here, other, other_region)) is Status.DONE


@COPIES
def test_a_stopped_process_is_written_to_all_the_same(here: NixlTransport, there: Start) -> None:
    """The kernel copies into its memory; nothing of it has to run."""
    stopped = there()
    region = stopped.ask("share", nbytes=MUCH)
    peer = here.connect(stopped.describe())
    assert ended(here, one_byte(here, peer, region)) is Status.DONE
    stopped.stop()
    assert ended(here, post(here, peer, region, source(here, b"\x55" * MUCH))) is Status.DONE
    assert here.peer_state(peer) is PeerState.ALIVE
    stopped.signal(signal.SIGCONT)
    assert stopped.ask("digest") == hashlib.sha256(b"\x55" * MUCH).hexdigest()


@SOCKETS
def test_a_write_to_a_peer_that_is_stopped_is_given_up_its_source_is_free_and_the_pair_is_rebuilt(
    here: NixlTransport, there: Start
) -> None:
    """The engine itself waits for ever, and reads the source for as long."""
    stopped, running = there(), there()
    region, other_region = stopped.ask("share", nbytes=MUCH), running.ask("share", nbytes=4096)
    peer, other = here.connect(stopped.describe()), here.connect(running.describe())
    assert ended(here, one_byte(here, peer, region)) is Status.DONE
    stopped.stop()
    local = source(here, b"\x55" * MUCH)
    handle = post(here, peer, region, local)
    behind = one_byte(here, peer, region)
    for _ in range(50):
        assert ended(here, one_byte(here, other, other_region)) is Status.DONE
    assert over(here, handle) is Status.UNKNOWN
    assert not here.drained(handle), "its bytes are in the stopped process's kernel"
    eventually(lambda: here.source_free(handle))
    assert isinstance(local, Region)
    local.memory.view()[:] = b"\xaa" * MUCH
    assert here.peer_state(peer) is PeerState.ALIVE
    assert over(here, behind) in (Status.FAILED, Status.UNKNOWN)
    stopped.signal(signal.SIGCONT)
    handles = []

    def written_again() -> bool:
        handles.append(one_byte(here, peer, region))
        return over(here, handles[-1]) is Status.DONE

    eventually(written_again, "a write to it once it runs again")
    assert b"\xaa" not in bytes.fromhex(stopped.ask("bytes_there")), "nothing was sent that was put there later"
    assert not here.drained(handle)


@SOCKETS
def test_a_write_by_a_connection_that_the_peer_has_dialled_is_given_up_too(there: Start, way: str) -> None:
    """UCX sends by it where the peer wrote first: always, where each side has one worker. It has no port by which it
    could be known as the peer's."""
    stopped = there(workers=1)
    here = NixlTransport(NixlOptions(require=way, workers=1, contact_timeout=1.5, progress_timeout=1.0))
    try:
        ours, region = here.register(here.allocate(4096)), stopped.ask("share", nbytes=MUCH)
        stopped.ask("connect", descriptor=here.describe().hex())
        assert stopped.ask("write", region=[ours.id, ours.generation], seed=1, nbytes=4096)[0] == "DONE"
        peer = here.connect(stopped.describe())
        assert ended(here, one_byte(here, peer, region)) is Status.DONE
        stopped.stop()
        handle = post(here, peer, region, source(here, b"\x55" * MUCH))
        assert over(here, handle) is Status.UNKNOWN
        eventually(lambda: here.source_free(handle))
        assert here.peer_state(peer) is PeerState.ALIVE
        stopped.signal(signal.SIGCONT)
        eventually(lambda: over(here, one_byte(here, peer, region)) is Status.DONE, "a write to it once it runs again")
    finally:
        here.close()


@BOTH
def test_a_peer_that_is_stopped_at_first_contact_gets_no_write_and_disturbs_no_other(
    here: NixlTransport, there: Start, way: str
) -> None:
    stopped, running = there(), there()
    region, other_region = stopped.ask("share", nbytes=4096), running.ask("share", nbytes=4096)
    descriptor = stopped.describe()
    stopped.stop()
    peer, other = here.connect(descriptor), here.connect(running.describe())
    handle = one_byte(here, peer, region)
    assert ended(here, one_byte(here, other, other_region)) is Status.DONE
    assert ended(here, handle) is Status.FAILED
    assert here.drained(handle), "nothing but the byte for its doorstep was under way"
    assert here.peer_state(peer) is PeerState.ALIVE
    stopped.signal(signal.SIGCONT)
    eventually(lambda: over(here, one_byte(here, peer, region)) is Status.DONE)


@BOTH
def test_a_peer_that_never_was_there_fails_and_nothing_was_submitted(
    here: NixlTransport, there: Start, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = there()
    region, descriptor = once.ask("share", nbytes=4096), once.describe()
    once.end()
    monkeypatch.setattr(Agent, "submit", lambda *_: pytest.fail("something was submitted"))
    if way == "memcpy":
        with pytest.raises(TransportMismatch, match="memcpy is required"):
            here.connect(descriptor)
        return
    for told in (changed(descriptor), abroad(descriptor)):
        peer = here.connect(told)
        handle = one_byte(here, peer, region)
        assert ended(here, handle) is Status.FAILED
        assert here.drained(handle)
        assert here.peer_state(peer) is PeerState.UNKNOWN


@COPIES
def test_memory_of_others_outlives_the_transport_for_a_disconnected_peer(here: NixlTransport, there: Start) -> None:
    """It copies into what it was told of until it ends, and nothing looks whether that is registered."""
    other = there()
    theirs = bytearray(4096)
    address = ctypes.addressof(ctypes.c_char.from_buffer(theirs))
    here.register(Memory(address, 4096, "cpu", theirs))
    here.disconnect(here.connect(other.describe()))
    here.close()

    def kept() -> bool:
        _nixl_keeping.outlive([], [])
        return any(memory.address == address for memories, _ in _nixl_keeping.outlived for memory in memories)

    assert kept()
    other.end()
    eventually(lambda: not kept())


@SOCKETS
def test_a_dead_peer_is_gone_only_when_all_that_it_sent_is_in_memory(here: NixlTransport, there: Start) -> None:
    """What lies in our kernel is placed after its death: here for as long as this side is stopped."""
    stopped, doomed = there(), there()
    region = stopped.ask("share", nbytes=MUCH)
    stopped.ask("connect", descriptor=doomed.describe().hex())
    doomed.ask("connect", descriptor=stopped.describe().hex())
    assert doomed.ask("write", region=region, seed=1, nbytes=8)[0] == "DONE"
    stopped.stop()
    doomed.tell("write", region=region, seed=2, nbytes=MUCH)
    eventually(lambda: unread(stopped.pid) > 100_000, "bytes in the stopped side's kernel")
    doomed.end()
    stopped.signal(signal.SIGCONT)
    eventually(lambda: stopped.ask("state") == "gone")
    digest = stopped.ask("digest")
    assert unread(stopped.pid) == 0
    assert stopped.ask("digest") == digest


@SOCKETS
def test_a_child_that_a_peer_has_forked_keeps_none_of_its_connections(here: NixlTransport, there: Start) -> None:
    """Else nobody hears of the parent's end for as long as the child lives."""
    doomed = there()
    region = doomed.ask("share", nbytes=4096)
    peer = here.connect(doomed.describe())
    assert ended(here, one_byte(here, peer, region)) is Status.DONE
    assert tcp_sockets(doomed.pid)
    child = doomed.ask("fork")
    try:
        eventually(lambda: not tcp_sockets(child), "a child without them")
        assert tcp_sockets(doomed.pid)
        assert ended(here, one_byte(here, peer, region)) is Status.DONE, "the parent has lost nothing"
        doomed.end()
        eventually(lambda: here.peer_state(peer) is PeerState.GONE)
        os.kill(child, 0)
    finally:
        os.kill(child, signal.SIGKILL)


def unread(pid: int) -> int:
    """Bytes that lie unread in the TCP sockets of a process."""
    return sum(int(row[4].partition(":")[2], 16) for row in tcp_sockets(pid) if row[3] != "0A")


def tcp_sockets(pid: int) -> list[list[str]]:
    """The kernel's rows of a process's TCP sockets."""
    mine = set()
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            mine.add(os.readlink(f"/proc/{pid}/fd/{name}").removeprefix("socket:[").removesuffix("]"))
        except OSError:
            continue
    with open("/proc/net/tcp", encoding="ascii") as table:
        return [row for row in (line.split() for line in table.readlines()[1:]) if row[9] in mine]


# ---- the engine's own troubles -------------------------------------------------------------------------------


@COPIES
@pytest.mark.parametrize("call", ["submit", "knock"])
def test_a_thread_that_does_not_come_back_from_the_engine_holds_up_no_other_peer_and_not_the_end(
    there: Start, monkeypatch: pytest.MonkeyPatch, way: str, call: str
) -> None:
    monkeypatch.setattr(_nixl_poster, "GLANCE_S", 0.2)
    first, second = there(), there()
    regions = [first.ask("share", nbytes=4096), second.ask("share", nbytes=4096)]
    transport = NixlTransport(NixlOptions(require=way, progress_timeout=0.5))
    peers = [transport.connect(first.describe()), transport.connect(second.describe())]
    for peer, region in zip(peers, regions, strict=True):
        assert ended(transport, one_byte(transport, peer, region)) is Status.DONE
    if call == "knock":  # at contact, and so before anything is written
        forget(transport, peers[0])
        peers[0] = transport.connect(first.describe())
    monkeypatch.setattr(_nixl_poster, "STUCK_S", 0.5)
    monkeypatch.setattr("tensorferry.backends._engine_transport.CLOSE_TIMEOUT_S", 0.5)
    begin, go, once = getattr(Agent, call), threading.Event(), threading.Lock()

    def hang_once(agent: Agent, request: Request) -> bool:
        if once.acquire(blocking=False):
            go.wait(PATIENCE_S * 3)
        return bool(begin(agent, request))

    monkeypatch.setattr(Agent, call, hang_once)
    handle = one_byte(transport, peers[0], regions[0])
    eventually(lambda: transport._crew.workers[0].called_at)
    assert ended(transport, one_byte(transport, peers[1], regions[1])) is Status.DONE
    assert over(transport, handle) is Status.UNKNOWN
    assert not transport.drained(handle)
    assert not transport.source_free(handle)
    with pytest.raises(TransportError, match="does not come back"):
        transport.register(transport.allocate(4096))
    transport.close()
    assert transport.poll(handle) is Status.UNKNOWN
    go.set()
    transport._crew.workers[0].thread.join(PATIENCE_S)


@BOTH
def test_close_with_a_stopped_peer_ends_and_says_unknown(here: NixlTransport, there: Start, way: str) -> None:
    stopped = there()
    region = stopped.ask("share", nbytes=MUCH)
    peer = here.connect(stopped.describe())
    assert ended(here, one_byte(here, peer, region)) is Status.DONE
    stopped.stop()
    handle = post(here, peer, region, source(here, bytes(MUCH)))
    eventually(lambda: peer.target.under_way or here.poll(handle) is not Status.PENDING)
    here.close()
    assert not any(worker.thread.is_alive() for worker in here._crew.workers)
    if way == "tcp":
        assert here.poll(handle) is Status.UNKNOWN
        assert not here.drained(handle)
        assert here.source_free(handle)
        stopped.signal(signal.SIGKILL)
        eventually(lambda: here.drained(handle), "the peer's end drains it, also after close")
    else:
        assert here.poll(handle) in (Status.DONE, Status.FAILED)


@COPIES
def test_a_write_to_memory_that_its_owner_has_given_back_reaches_nobody_else(here: NixlTransport, there: Start) -> None:
    """Deregistering stops no copy: only what is at the address does. Then the pair is rebuilt."""
    owner = there()
    region, kept = owner.ask("share", nbytes=1 << 20), owner.ask("share", nbytes=4096)
    peer = here.connect(owner.describe())
    assert ended(here, one_byte(here, peer, region)) is Status.DONE
    assert owner.ask("drop_first"), "its addresses are held, and hold nothing"
    handle = post(here, peer, region, source(here, b"!" * (1 << 20)))
    assert over(here, handle) is Status.UNKNOWN
    assert owner.popen.poll() is None
    eventually(lambda: over(here, one_byte(here, peer, kept)) is Status.DONE, "the pair works again")
    assert here.path(peer) == "memcpy"


# ---- the process ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("modules", [None, "all"], ids=["default", "with the InfiniBand modules"])
@ends
def test_a_process_ends_cleanly_and_quietly(how: str, modules: str | None) -> None:
    """With the InfiniBand modules the wheel's libraries and the system's end in the same process: that crashed."""
    need("nixl")
    opened = (
        "from tensorferry.backends.nixl import NixlOptions, NixlTransport\nt = NixlTransport(NixlOptions(workers=1))"
    )
    absent = {"torch", "numpy", "nixl_cu12._api", "nixl_cu13._api"}
    check_quiet_end(opened, absent, how, ("UCX_", "NIXL_"), **({"UCX_MODULES": modules} if modules else {}))

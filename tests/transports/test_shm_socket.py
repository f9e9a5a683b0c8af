"""The shm transport's socket against strangers, flooders and liars, on both ends; and its proofs of death.

Long because each lie and each refusal is a case of its own.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import math
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transport_ends import at, ended, eventually, filled

from tensorferry.backends import _process, _shm_courier
from tensorferry.backends import _shm_wire as wire
from tensorferry.backends.shm import ShmOptions, ShmTransport
from tensorferry.core.errors import TransportError, TransportMismatch, Unsupported
from tensorferry.core.memory import Memory
from tensorferry.core.transport import Copy, PeerState, Readiness, Region, RemoteRegion, Status

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def owner() -> Iterator[ShmTransport]:
    transport = ShmTransport(ShmOptions())
    yield transport
    transport.close()


@pytest.fixture
def writer() -> Iterator[ShmTransport]:
    transport = ShmTransport(ShmOptions(map_timeout=2.0))
    yield transport
    transport.close()


@pytest.fixture
def region(owner: ShmTransport) -> Region:
    return owner.register(owner.allocate(4096))


def told_by(transport: ShmTransport) -> wire.Descriptor:
    return msgspec.msgpack.decode(transport.describe(), type=wire.Descriptor)


def dial(transport: ShmTransport) -> socket.socket:
    """A connection to the transport's socket by somebody who speaks for himself."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.settimeout(30)
    connection.connect(b"\0" + told_by(transport).socket)
    return connection


def hung_up_on(connection: socket.socket) -> bool:
    """Waits for the other end to close; what it says before that is dropped."""
    try:
        while connection.recv(wire.MAX_PACKET_BYTES):
            continue
    except ConnectionResetError:
        return True
    return True


def still_serves(owner: ShmTransport, writer: ShmTransport, region: Region) -> None:
    peer = writer.connect(owner.describe())
    handle = writer.post(peer, [Copy(filled(writer, b"served"), 0, at(region), 0, 6)])
    assert ended(writer, handle) is Status.DONE
    assert bytes(region.memory.view(0, 6)) == b"served"


# ---- strangers at the owner's socket -------------------------------------------------------------------------


def ask(transport: ShmTransport, **changes: object) -> bytes:
    good = {"version": wire.SOCKET_VERSION, "instance": told_by(transport).instance, "regions": []}
    return msgspec.msgpack.encode(["ask", *{**good, **changes}.values()])


BAD_PACKETS: dict[str, Callable[[ShmTransport], bytes]] = {
    "noise": lambda _: b"\xc1\xff\x00 noise",
    "longer than any packet": lambda _: b"x" * (wire.MAX_PACKET_BYTES + 1),
    "another instance": lambda owner: ask(owner, instance=bytes(16)),
    "a short instance": lambda owner: ask(owner, instance=b"short"),
    "another version": lambda owner: ask(owner, version=wire.SOCKET_VERSION + 1),
    "too many regions": lambda owner: ask(owner, regions=[[0, 1]] * (wire.MAX_ASKED + 1)),
    "a negative region": lambda owner: ask(owner, regions=[[-1, 1]]),
    "an answer": lambda owner: wire.encode(wire.Closed(told_by(owner).instance)),
    "nested too deep": lambda _: b"\x91" * 4000,
}


@pytest.mark.parametrize("bad", BAD_PACKETS.values(), ids=BAD_PACKETS.keys())
def test_a_bad_packet_ends_its_connection_and_no_other(
    owner: ShmTransport, writer: ShmTransport, region: Region, bad: Callable[[ShmTransport], bytes]
) -> None:
    with dial(owner) as stranger, dial(owner) as guest:
        guest.send(ask(owner))
        assert isinstance(wire.decode_answer(guest.recv(4096)), wire.Welcome)
        stranger.send(bad(owner))
        assert hung_up_on(stranger)
        guest.send(ask(owner))
        assert isinstance(wire.decode_answer(guest.recv(4096)), wire.Welcome)
    still_serves(owner, writer, region)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(packet=st.binary(min_size=1, max_size=200))
def test_random_packets_get_nothing(owner: ShmTransport, region: Region, packet: bytes) -> None:
    with dial(owner) as stranger:
        stranger.send(packet)
        assert stranger.recv(4096) == b""


@pytest.mark.parametrize("count", [1, 2, 5])
def test_files_that_nobody_asked_for_are_closed(
    owner: ShmTransport, writer: ShmTransport, region: Region, count: int
) -> None:
    open_before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        with dial(owner) as stranger:
            socket.send_fds(stranger, [ask(owner)], [0] * count)
            assert hung_up_on(stranger)
    eventually(lambda: len(os.listdir("/proc/self/fd")) == open_before, "every file is closed")
    still_serves(owner, writer, region)


def test_a_guest_who_asks_and_never_reads_delays_nobody(
    owner: ShmTransport, writer: ShmTransport, region: Region
) -> None:
    with dial(owner) as flooder:
        flooder.setblocking(False)
        question = ask(owner, regions=[[region.id, region.generation]] * wire.MAX_ASKED)
        with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
            for _ in range(10_000):
                flooder.send(question)
        still_serves(owner, writer, region)


def test_who_says_nothing_is_hung_up_on(owner: ShmTransport, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_shm_courier, "GREETING_TIMEOUT_S", 0.05)
    with dial(owner) as silent:
        assert hung_up_on(silent)


def test_connections_are_bounded(
    owner: ShmTransport, writer: ShmTransport, region: Region, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_shm_courier, "MAX_GUESTS", 2)
    with dial(owner) as first, dial(owner) as second:
        for guest in (first, second):
            guest.send(ask(owner))
            assert isinstance(wire.decode_answer(guest.recv(4096)), wire.Welcome)
        with dial(owner) as third, contextlib.suppress(BrokenPipeError, ConnectionResetError):
            third.send(ask(owner))
            assert third.recv(4096) == b""
    still_serves(owner, writer, region)  # there is room again


def test_another_user_is_refused_on_both_ends(
    owner: ShmTransport, writer: ShmTransport, region: Region, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = wire.peer_uid
    monkeypatch.setattr(wire, "peer_uid", lambda connection: ours(connection) + 1)
    with dial(owner) as stranger:
        assert hung_up_on(stranger)
    peer = writer.connect(owner.describe())

    def refused() -> bool:
        try:
            writer.post(peer, [Copy(filled(writer, b"x"), 0, at(region), 0, 1)])
        except TransportError as error:
            return "user" in error.cause
        return False

    eventually(refused)
    assert bytes(region.memory.view()) == bytes(4096)


if os.geteuid() == 0:  # only root can become somebody else

    def test_a_process_of_another_user_gets_nothing(owner: ShmTransport) -> None:
        code = (
            "import os, socket, sys\n"
            "os.setuid(int(sys.argv[3]))\n"
            "s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n"
            "s.connect(b'\\0' + bytes.fromhex(sys.argv[1]))\n"
            "try:\n"
            "    s.send(bytes.fromhex(sys.argv[2]))\n"
            "    print(s.recv(4096))\n"
            "except (BrokenPipeError, ConnectionResetError):\n"
            "    print(b'')\n"
        )

        def said_to(user: int) -> str:
            arguments = [told_by(owner).socket.hex(), ask(owner).hex(), str(user)]
            done = subprocess.run(
                [sys.executable, "-S", "-c", code, *arguments], capture_output=True, text=True, check=True
            )
            return done.stdout.strip()

        assert said_to(0) != "b''"
        assert said_to(65534) == "b''"


def test_accept_that_fails_is_tried_again_later_and_not_in_a_loop(
    owner: ShmTransport, writer: ShmTransport, region: Region, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing:
        """A listener in a process without file descriptors to spare."""

        def __init__(self, real: socket.socket) -> None:
            self.real = real
            self.calls = 0

        def fileno(self) -> int:
            return self.real.fileno()

        def accept(self) -> None:
            self.calls += 1
            raise OSError(24, "Too many open files")

    monkeypatch.setattr(_shm_courier, "ACCEPT_PAUSE_S", 3600.0)
    courier = owner._courier
    failing = Failing(courier._listener)
    monkeypatch.setattr(courier, "_listener", failing)
    with dial(owner) as guest:
        eventually(lambda: courier._accept_at < math.inf)
        monkeypatch.setattr(courier, "_listener", failing.real)
        assert failing.calls == 1

        def try_now() -> None:
            courier._accept_at = 0.0

        courier.call(try_now)
        guest.send(ask(owner))
        assert isinstance(wire.decode_answer(guest.recv(4096)), wire.Welcome)
    still_serves(owner, writer, region)


def test_close_gives_every_file_back_whoever_holds_what_it_made(owner: ShmTransport, region: Region) -> None:
    open_before = len(os.listdir("/proc/self/fd"))
    transport = ShmTransport(ShmOptions())
    peer = transport.connect(owner.describe())
    memory = transport.allocate(4096)
    own = transport.register(memory)
    ended(transport, transport.post(peer, [Copy(memory, 0, at(region), 0, 4096)]))
    assert len(os.listdir("/proc/self/fd")) > open_before
    transport.close()
    eventually(lambda: len(os.listdir("/proc/self/fd")) == open_before, "every file is closed")
    assert bytes(own.memory.view()) == bytes(4096)
    assert transport.peer_state(peer) is not PeerState.GONE


def test_only_memory_of_this_transport_is_shared(owner: ShmTransport, writer: ShmTransport) -> None:
    whole = owner.allocate(8192)
    for memory in (
        Memory(whole.address, whole.nbytes),
        Memory(whole.address, 4096, owner=whole.owner),
        writer.allocate(4096),
    ):
        with pytest.raises(Unsupported, match="allocate"):
            owner.register(memory)
    owner.register(whole)


# ---- liars on the owner's side -------------------------------------------------------------------------------


def memfd(nbytes: int, seals: int = fcntl.F_SEAL_SHRINK) -> int:
    fd = os.memfd_create("liar", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, nbytes)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


KEY = (0, 1)
LIES: dict[str, Callable[[bytes], list[tuple[bytes, list[int]]]]] = {
    "a file that can shrink": lambda _: [(wire.encode(wire.Give(KEY, 4096)), [memfd(4096, 0)])],
    "a file that is too short": lambda _: [(wire.encode(wire.Give(KEY, 4096)), [memfd(4095)])],
    "a length that was not described": lambda _: [(wire.encode(wire.Give(KEY, 8192)), [memfd(8192)])],
    "a pipe": lambda _: [(wire.encode(wire.Give(KEY, 4096)), [os.pipe()[0]])],
    "no file": lambda _: [(wire.encode(wire.Give(KEY, 4096)), [])],
    "two files": lambda _: [(wire.encode(wire.Give(KEY, 4096)), [memfd(4096), memfd(4096)])],
    "a region that nobody asked for": lambda _: [(wire.encode(wire.Give((5, 1), 4096)), [memfd(4096)])],
    "a refusal": lambda _: [(wire.encode(wire.Refuse(KEY)), [])],
    "noise": lambda _: [(b"\xc1 noise", [])],
    "a packet that is too long": lambda _: [(b"x" * (wire.MAX_PACKET_BYTES + 1), [])],
    "the end of another instance": lambda _: [(wire.encode(wire.Closed(bytes(16))), [])],
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
def test_an_owner_that_lies_gets_no_bytes_and_breaks_nothing(
    owner: ShmTransport, lie: Callable[[bytes], list[tuple[bytes, list[int]]]]
) -> None:
    told = told_by(owner)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(b"\0" + os.urandom(16).hex().encode())
    listener.listen()
    listener.settimeout(30)
    ending = threading.Event()

    def serve() -> None:
        while not ending.is_set():
            connection, _ = listener.accept()
            with connection:
                while packet := connection.recv(4096):
                    connection.send(wire.encode(wire.Welcome(told.instance)))
                    if not wire.decode_ask(packet).regions:
                        continue
                    for data, fds in lie(told.instance):
                        socket.send_fds(connection, [data], fds)
                        for fd in fds:
                            os.close(fd)

    serving = threading.Thread(target=lambda: suppressed(serve), daemon=True)
    serving.start()
    forged = msgspec.structs.replace(told, socket=listener.getsockname()[1:], regions=[(*KEY, 4096)])
    writer = ShmTransport(ShmOptions(map_timeout=0.5))
    peer = writer.connect(wire.encode(forged))
    try:
        handle = writer.post(peer, [Copy(filled(writer, b"x" * 4096), 0, RemoteRegion(*KEY), 0, 4096)])
    except TransportError:
        pass  # refused at once: the lie was noticed before the post
    else:
        assert ended(writer, handle) is Status.FAILED
    assert writer.peer_state(peer) is PeerState.ALIVE
    ending.set()
    writer.close()
    listener.close()


def suppressed(call: Callable[[], None]) -> None:
    """A liar whose connection was ended has nothing more to say."""
    try:
        call()
    except OSError:
        return


def test_a_region_that_changes_its_size_is_never_written_beyond_it(
    owner: ShmTransport, writer: ShmTransport, region: Region
) -> None:
    """The first mapping has 4096 bytes; a copy at 1 MiB past it would end the process."""
    peer = writer.connect(owner.describe())
    source = filled(writer, b"x" * 4096)
    assert ended(writer, writer.post(peer, [Copy(source, 0, at(region), 0, 4096)])) is Status.DONE
    told = told_by(owner)
    grown = [(region.id, region.generation, 8 << 20)]
    for revision in range(1, 20):
        forged = msgspec.structs.replace(told, revision=told.revision + revision, regions=grown)
        writer.connect(wire.encode(forged))
        try:
            handle = writer.post(peer, [Copy(source, 0, at(region), 1 << 20, 4096)])
        except TransportError:
            continue
        assert ended(writer, handle) is Status.FAILED


def test_a_region_that_shrinks_while_a_post_waits_for_it_fails_the_post(owner: ShmTransport, region: Region) -> None:
    told = msgspec.structs.replace(told_by(owner), regions=[(region.id, region.generation, 8 << 20)])
    writer = ShmTransport(ShmOptions())
    with owner._courier._slabs_lock:  # the owner does not answer yet
        peer = writer.connect(wire.encode(told))
        handle = writer.post(peer, [Copy(filled(writer, b"x" * 4096), 0, at(region), 1 << 20, 4096)])
        true = msgspec.structs.replace(told_by(owner), revision=told.revision + 1)
        writer.connect(wire.encode(true))
    assert ended(writer, handle) is Status.FAILED
    writer.close()


def test_many_regions_are_fetched_in_several_requests(owner: ShmTransport, writer: ShmTransport) -> None:
    regions = [owner.register(owner.allocate(4096)) for _ in range(3 * wire.MAX_ASKED + 1)]
    peer = writer.connect(owner.describe())
    source = filled(writer, b"x" * len(regions))
    copies = [Copy(source, index, at(one), index, 1) for index, one in enumerate(regions)]
    assert ended(writer, writer.post(peer, copies)) is Status.DONE
    assert [bytes(one.memory.view(index, 1)) for index, one in enumerate(regions)] == [b"x"] * len(regions)


def test_regions_that_come_and_go_under_posts_stay_apart(owner: ShmTransport, writer: ShmTransport) -> None:
    """Each region is written with its own number, before and after others were retired; none gets another's."""
    live: list[Region] = []
    posted: list[tuple[int, Region, int]] = []
    peer = None
    for number in range(1, 100):
        live.append(owner.register(owner.allocate(4096)))
        if len(live) > 3:
            owner.retire(live.pop(0))
        peer = writer.connect(owner.describe())
        for one in live:
            data = bytes([one.generation % 251]) * 4096
            posted.append((writer.post(peer, [Copy(filled(writer, data), 0, at(one), 0, 4096)]), one, number))
    last = {one.generation: (handle, one) for handle, one, _ in posted}
    statuses = {writer.poll(handle) for handle, *_ in posted if ended(writer, handle)}
    assert statuses <= {Status.DONE, Status.FAILED}
    for generation, (handle, one) in last.items():
        if writer.poll(handle) is Status.DONE:
            assert bytes(one.memory.view()) == bytes([generation % 251]) * 4096
    assert all(writer.poll(handle) is Status.DONE for handle, one, _ in posted if one in live)


def test_close_in_the_middle_of_everything_leaves_nothing_pending(owner: ShmTransport, region: Region) -> None:
    """Posts that wait for a mapping, mappings on their way, copies begun: whatever close meets, all ends drained."""
    open_before = 0
    for turn in range(60):
        writer = ShmTransport(ShmOptions())
        peer = writer.connect(owner.describe())
        source = filled(writer, b"x" * 4096)
        handles = [writer.post(peer, [Copy(source, 0, at(region), 0, 4096)]) for _ in range(turn % 7)]
        writer.close()
        assert all(writer.drained(handle) for handle in handles)
        if turn == 5:
            eventually(lambda: not owner._courier._guests)
            gc.collect()  # what earlier tests have left would go in the middle, and hide as much of a leak
            open_before = len(os.listdir("/proc/self/fd"))
    eventually(lambda: not owner._courier._guests)
    assert (
        len(os.listdir("/proc/self/fd")) <= open_before
    )  # fewer, where the collector has let go of earlier tests' files


def test_close_fails_what_waits_even_if_the_courier_hangs(
    owner: ShmTransport, region: Region, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_shm_courier, "STOP_TIMEOUT_S", 0.05)
    writer = ShmTransport(ShmOptions())
    with writer._courier.fork_lock:
        peer = writer.connect(owner.describe())
        handle = writer.post(peer, [Copy(filled(writer, b"x"), 0, at(region), 0, 1)])
        writer.close()
        assert writer.poll(handle) is Status.FAILED
    eventually(lambda: not writer._courier._thread.is_alive())
    assert bytes(region.memory.view(0, 1)) == b"\0"


def test_a_retired_region_is_handed_to_nobody_who_asks_by_an_old_descriptor(
    owner: ShmTransport, writer: ShmTransport, region: Region
) -> None:
    old = owner.describe()
    owner.retire(region)
    peer = writer.connect(old)
    handle = writer.post(peer, [Copy(filled(writer, b"x"), 0, at(region), 0, 1)])
    assert ended(writer, handle) is Status.FAILED
    assert bytes(region.memory.view(0, 1)) == b"\0"


# ---- which host ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"boot_id": "another"}, "another host"),
        ({"network": 1}, "network namespace"),
        ({"uid": 1 << 20}, "user 1048576"),
    ],
    ids=["host", "network namespace", "user"],
)
def test_where_no_path_exists_connect_says_why_and_what_helps(
    owner: ShmTransport, writer: ShmTransport, change: dict[str, object], says: str
) -> None:
    told = told_by(owner)
    if "uid" in change:
        told = msgspec.structs.replace(told, **change)
    else:
        told = msgspec.structs.replace(told, host=msgspec.structs.replace(told.host, **change))
    with pytest.raises(TransportMismatch, match=says) as caught:
        writer.connect(wire.encode(told))
    assert caught.value.hint


@pytest.mark.parametrize("change", [{"pids": 1}, {"time": 1}])
def test_a_pid_of_another_namespace_is_no_proof(
    owner: ShmTransport, writer: ShmTransport, change: dict[str, int]
) -> None:
    """There, the same number is another process, or none; the kernel's own word on the connection counts."""
    told = told_by(owner)
    told = msgspec.structs.replace(told, host=msgspec.structs.replace(told.host, **change), pid=1 << 29)
    unreachable = msgspec.structs.replace(told, instance=bytes(16), socket=b"nobody listens here")
    assert writer.peer_state(writer.connect(wire.encode(unreachable))) is PeerState.UNKNOWN
    peer = writer.connect(wire.encode(told))
    eventually(lambda: writer.peer_state(peer) is PeerState.ALIVE)


def test_a_peer_that_cannot_be_reached_is_not_called_gone(owner: ShmTransport, writer: ShmTransport) -> None:
    told = told_by(owner)
    told = msgspec.structs.replace(told, socket=b"nobody listens here", regions=[(0, 1, 4096)])
    peer = writer.connect(wire.encode(told))
    eventually(lambda: refuses(writer, peer))
    assert writer.peer_state(peer) is PeerState.ALIVE


def refuses(writer: ShmTransport, peer: object) -> bool:
    try:
        writer.post(peer, [Copy(filled(writer, b"x"), 0, RemoteRegion(0, 1), 0, 1)])
    except TransportError:
        return True
    return False


# ---- proofs --------------------------------------------------------------------------------------------------


def test_a_process_is_told_from_another_with_its_pid() -> None:
    started = _process.start_time(os.getpid())
    assert started is not None
    alive = _process.watch_claimed(os.getpid(), started)
    assert alive is not None
    assert not alive.ended()
    earlier = _process.watch_claimed(os.getpid(), started - 1)
    assert earlier is not None
    assert earlier.ended()


@pytest.mark.parametrize("pid", [0, -1, 1 << 31, 1 << 70])
def test_an_impossible_pid_proves_nothing(pid: int) -> None:
    assert _process.watch_claimed(pid, 1) is None


def test_a_peer_that_could_not_read_its_own_start_time_is_not_called_ended() -> None:
    assert _process.watch_claimed(os.getpid(), 0) is None


def test_a_process_whose_start_cannot_be_read_is_not_called_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_process, "start_time", lambda _: None)
    assert _process.watch_claimed(os.getpid(), 1) is None


def test_a_closed_file_is_no_proof_of_death() -> None:
    pidfd = os.pidfd_open(os.getpid())
    watch = _process.ProcessWatch(pidfd)
    spare = os.dup(pidfd)
    os.close(pidfd)
    assert not watch.ended()
    os.dup2(spare, pidfd)  # the watch closes it
    os.close(spare)


def test_a_zombie_has_ended_and_stays_so() -> None:
    child = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE)
    started = _process.start_time(child.pid)
    assert started is not None
    watch = _process.watch_claimed(child.pid, started)
    assert watch is not None
    assert not watch.ended()
    child.kill()
    eventually(watch.ended)  # nobody has waited for it yet
    child.communicate()
    assert watch.ended()
    after = _process.watch_claimed(child.pid, started)
    assert after is not None
    assert after.ended()


def test_a_process_lives_until_its_last_thread_has_ended() -> None:
    """What writes is a thread; a process whose first thread has ended looks dead to most tools."""
    code = (
        "import ctypes, sys, threading\n"
        "threading.Thread(target=lambda: (print('on', flush=True), input())).start()\n"
        "ctypes.CDLL(None).syscall(60, 0)\n"  # exit(2) of this thread alone
    )
    child = subprocess.Popen([sys.executable, "-S", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    started = _process.start_time(child.pid)
    assert started is not None
    watch = _process.watch_claimed(child.pid, started)
    assert watch is not None
    assert child.stdout is not None
    assert child.stdout.readline() == b"on\n"
    status = Path(f"/proc/{child.pid}/status")
    eventually(lambda: "\nState:\tZ" in status.read_text(), "its first thread's end")
    assert not watch.ended()
    child.kill()
    eventually(watch.ended)
    child.communicate()


# ---- probe ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["memfd_create", "posix_fallocate"])
def test_probe_says_what_is_missing_and_never_raises(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, missing, refuse)
    answer = ShmTransport.probe()
    assert answer.readiness is Readiness.UNAVAILABLE
    assert "not permitted" in answer.reason
    assert answer.hint


def test_probe_is_degraded_without_pidfd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "pidfd_open")
    answer = ShmTransport.probe()
    assert answer.readiness is Readiness.DEGRADED
    assert "cannot be proved" in answer.reason


def test_probe_leaves_no_file_open() -> None:
    ShmTransport.probe()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(10):
        ShmTransport.probe()
    assert len(os.listdir("/proc/self/fd")) == before


def test_pages_are_there_before_the_first_write(owner: ShmTransport) -> None:
    nbytes = 8 << 20
    memory = owner.allocate(nbytes)
    with open("/proc/self/pagemap", "rb") as pagemap:
        page = os.sysconf("SC_PAGESIZE")
        pagemap.seek(memory.address // page * 8)
        entries = pagemap.read(nbytes // page * 8)
    present = [entries[index + 7] >> 7 for index in range(0, len(entries), 8)]
    assert sum(present) == nbytes // page

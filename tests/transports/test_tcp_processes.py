"""The tcp transport between two processes, and two networks: what lands, what is noticed, who waits for whom."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from transport_ends import Process, ended, eventually, filled, over

from tensorferry.backends import _tcp_wire as wire
from tensorferry.backends.tcp import TcpOptions, TcpTransport
from tensorferry.core.errors import TransportError
from tensorferry.core.transport import Copy, PeerState, RemoteRegion, Status

Start = Callable[..., Process]

pytestmark = pytest.mark.timeout(90)

LARGE = 64 << 20
"""More than the buffers of a connection hold: a write of it to a stopped process stays under way."""


@pytest.fixture
def here() -> Iterator[TcpTransport]:
    transport = TcpTransport(TcpOptions())
    yield transport
    transport.close()


@pytest.fixture
def impatient() -> Iterator[TcpTransport]:
    transport = TcpTransport(TcpOptions(connect_timeout=0.3, io_timeout=0.3))
    yield transport
    transport.close()


@pytest.fixture
def tcp(process: Start) -> Start:
    return lambda **options: process(kind="tcp", **options)


def write(transport: TcpTransport, peer: object, region: list[int], data: bytes = b"x") -> int:
    return transport.post(peer, [Copy(filled(transport, data), 0, RemoteRegion(*region), 0, len(data))])


def test_both_sides_write_into_each_other(here: TcpTransport, tcp: Start) -> None:
    there = tcp()
    nbytes = (3 << 20) + 17
    ours = here.register(here.allocate(nbytes))
    theirs = there.ask("share", nbytes=nbytes)
    there.ask("connect", descriptor=here.describe().hex())
    peer = here.connect(there.describe())
    status, written = there.ask("write", region=[ours.id, ours.generation], seed=1, nbytes=nbytes)
    assert status == "DONE"
    assert hashlib.sha256(ours.memory.view()).hexdigest() == written
    data = os.urandom(nbytes)
    assert ended(here, write(here, peer, theirs, data)) is Status.DONE
    assert there.ask("digest") == hashlib.sha256(data).hexdigest()


def test_a_killed_owner_is_gone_and_what_was_on_its_way_to_it_is_drained(here: TcpTransport, tcp: Start) -> None:
    there, other = tcp(), tcp()
    region, near = there.ask("share", nbytes=LARGE), other.ask("share", nbytes=4096)
    peer, neighbour = here.connect(there.describe()), here.connect(other.describe())
    assert ended(here, write(here, peer, region)) is Status.DONE
    assert here.peer_state(peer) is PeerState.ALIVE
    there.stop()
    handle = write(here, peer, region, b"\x55" * LARGE)
    assert here.poll(handle) is Status.PENDING
    there.signal(signal.SIGKILL)
    eventually(lambda: here.peer_state(peer) is PeerState.GONE)
    assert over(here, handle) is Status.UNKNOWN
    eventually(lambda: here.drained(handle))
    here.release(handle)
    with pytest.raises(TransportError):
        write(here, peer, region)
    assert ended(here, write(here, neighbour, near)) is Status.DONE


def test_a_killed_writer_is_gone_and_lands_nothing_after_that(here: TcpTransport, tcp: Start) -> None:
    there = tcp()
    ours = here.register(here.allocate(LARGE))
    there.ask("connect", descriptor=here.describe().hex())
    watched = here.connect(there.describe())
    there.ask("post", region=[ours.id, ours.generation], nbytes=LARGE)
    view = ours.memory.view()
    eventually(lambda: view[0] == 0x55)
    there.signal(signal.SIGKILL)
    eventually(lambda: here.peer_state(watched) is PeerState.GONE)
    after = hashlib.sha256(view).digest()
    again = here.register(here.allocate(4096))  # others' writes go on
    me = here.connect(here.describe())
    assert ended(here, write(here, me, [again.id, again.generation])) is Status.DONE
    assert hashlib.sha256(view).digest() == after


def test_a_peer_that_closed_is_gone_although_its_process_lives(here: TcpTransport, tcp: Start) -> None:
    there = tcp()
    region = there.ask("share", nbytes=4096)
    peer = here.connect(there.describe())
    assert ended(here, write(here, peer, region)) is Status.DONE
    there.ask("close")
    eventually(lambda: here.peer_state(peer) is PeerState.GONE)
    assert there.popen.poll() is None
    with pytest.raises(TransportError):
        write(here, peer, region)


def test_a_stopped_peer_delays_nobody_and_is_fenced_when_it_goes_on(impatient: TcpTransport, tcp: Start) -> None:
    stopped, running = tcp(), tcp()
    far, near = stopped.ask("share", nbytes=LARGE), running.ask("share", nbytes=4096)
    peer, other = impatient.connect(stopped.describe()), impatient.connect(running.describe())
    assert ended(impatient, write(impatient, peer, far)) is Status.DONE
    stopped.stop()
    stuck = write(impatient, peer, far, b"\x55" * LARGE)
    assert ended(impatient, write(impatient, other, near)) is Status.DONE
    assert over(impatient, stuck) is Status.UNKNOWN
    assert not impatient.drained(stuck)
    assert impatient.peer_state(peer) is not PeerState.GONE
    refused = write(impatient, peer, far)  # the kernel takes the connection, nobody greets
    assert ended(impatient, refused) is Status.FAILED
    assert ended(impatient, write(impatient, other, near)) is Status.DONE
    assert not impatient.drained(stuck)
    stopped.signal(signal.SIGCONT)
    eventually(lambda: impatient.drained(stuck))
    assert impatient.poll(stuck) is Status.UNKNOWN
    assert ended(impatient, write(impatient, peer, far, b"again")) is Status.DONE


def test_close_does_not_wait_for_a_stopped_peer(here: TcpTransport, tcp: Start) -> None:
    there = tcp()
    region = there.ask("share", nbytes=LARGE)
    peer = here.connect(there.describe())
    assert ended(here, write(here, peer, region)) is Status.DONE
    there.stop()
    handle = write(here, peer, region, b"\x55" * LARGE)
    eventually(lambda: any(link.busy for link in peer.links))
    before = time.monotonic()
    here.close()
    assert time.monotonic() - before < 30
    assert here.poll(handle) is Status.UNKNOWN
    assert not here.drained(handle)
    there.signal(signal.SIGKILL)
    eventually(lambda: here.drained(handle))  # the end of its process is proof after close, too


def test_an_owner_that_is_stopped_reads_our_goodbye_later(here: TcpTransport, tcp: Start) -> None:
    there = tcp()
    there.ask("connect", descriptor=here.describe().hex())
    eventually(lambda: any(here._harbor._inlets))
    there.stop()
    here.close()
    there.signal(signal.SIGCONT)
    eventually(lambda: there.ask("state") == "gone")


def test_a_forked_child_cannot_use_what_it_inherited_and_keeps_nothing_open(here: TcpTransport, tcp: Start) -> None:
    there = tcp()
    answers = there.ask("fork_and_use")
    assert answers == {"describe": "BadCall", "poll": "BadCall", "allocate": "BadCall", "close": "returned"}
    region = there.ask("share", nbytes=4096)
    peer = here.connect(there.describe())
    assert ended(here, write(here, peer, region)) is Status.DONE
    port = msgspec.msgpack.decode(there.describe(), type=wire.Descriptor).port
    child = there.ask("fork")
    try:
        there.signal(signal.SIGKILL)
        eventually(lambda: here.peer_state(peer) is PeerState.GONE)
        eventually(lambda: not listening(port), "the child lets go of the port")
        assert Path(f"/proc/{child}").exists()
    finally:
        os.kill(child, signal.SIGKILL)


def listening(port: int) -> bool:
    lines = Path("/proc/net/tcp").read_text() + Path("/proc/net/tcp6").read_text()
    return any(f":{port:04X} " in line.split("0A")[0] and " 0A " in line for line in lines.splitlines())


def test_a_process_without_files_to_spare_answers_once_it_has_some(here: TcpTransport, tcp: Start) -> None:
    there = tcp()
    region = there.ask("share", nbytes=4096)
    descriptor = there.describe()
    there.ask("limit_files", more=0)
    handle = write(here, here.connect(descriptor), region)
    there.ask("limit_files", more=None)
    assert ended(here, handle) is Status.DONE


def test_thirty_openings_leave_no_file_or_thread(tcp: Start) -> None:
    there = tcp()
    region = there.ask("share", nbytes=4096)
    descriptor = there.describe()

    def once() -> None:
        transport = TcpTransport(TcpOptions())
        handle = write(transport, transport.connect(descriptor), region)
        assert ended(transport, handle) is Status.DONE
        transport.close()

    def held() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    once()
    files, threads = held()
    for _ in range(30):
        once()
    assert held()[0] < files + 15  # what earlier tests have dropped may close a file meanwhile
    assert held()[1] <= threads


# ---- between two networks --------------------------------------------------------------------------------------


@pytest.fixture
def networks() -> Iterator[tuple[str, str]]:
    """Two network namespaces with a cable between them."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("needs netns: only root with iproute2 can make network namespaces")
    tag = secrets.token_hex(3)
    names = f"tf-{tag}-a", f"tf-{tag}-b"
    try:
        for name in names:
            if ip("netns", "add", name).returncode:
                pytest.skip("needs netns: network namespaces cannot be made here")
        ends = f"v{tag}a", f"v{tag}b"
        cable = ip("link", "add", ends[0], "netns", names[0], "type", "veth", "peer", ends[1], "netns", names[1])
        if cable.returncode:
            pytest.skip(f"needs netns: no veth pair can be made: {cable.stderr.decode()}")
        for number, (name, end) in enumerate(zip(names, ends, strict=True), 1):
            for words in (
                ("addr", "add", f"10.99.0.{number}/24", "dev", end),
                ("addr", "add", f"fd99::{number}/64", "dev", end, "nodad"),
                ("link", "set", end, "up"),
                ("link", "set", "lo", "up"),
            ):
                done = ip("-n", name, *words)
                assert not done.returncode, done.stderr
        yield names
    finally:
        for name in names:
            ip("netns", "del", name)


def ip(*words: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["ip", *words], capture_output=True, timeout=20, check=False)


@pytest.mark.parametrize("family", ["both", "ipv6"])
def test_two_network_namespaces_reach_each_other_by_their_addresses(
    process: Start, networks: tuple[str, str], family: str
) -> None:
    """Loopback, which the descriptor names too, would lead each of them to itself."""
    options = {"host": "fd99::1"} if family == "ipv6" else {}
    owner = process(inside=("ip", "netns", "exec", networks[0]), kind="tcp", **options)
    writer = process(inside=("ip", "netns", "exec", networks[1]), kind="tcp")
    nbytes = 2 << 20
    region = owner.ask("share", nbytes=nbytes)
    told = msgspec.msgpack.decode(owner.describe(), type=wire.Descriptor)
    expected = ["fd99::1"] if family == "ipv6" else ["10.99.0.1", "fd99::1", "127.0.0.1", "::1"]
    assert told.addresses == expected
    writer.ask("connect", descriptor=owner.describe().hex())
    status, written = writer.ask("write", region=region, seed=3, nbytes=nbytes)
    assert status == "DONE"
    assert owner.ask("digest") == written
    owner.signal(signal.SIGKILL)  # one pid namespace: the end of the process can be proved across networks
    eventually(lambda: writer.ask("state") == "gone")


def test_a_cable_that_is_cut_proves_nothing(process: Start, networks: tuple[str, str]) -> None:
    owner = process(inside=("ip", "netns", "exec", networks[0]), kind="tcp")
    options = {"io_timeout": 0.5, "connect_timeout": 0.3}
    writer = process(inside=("ip", "netns", "exec", networks[1]), kind="tcp", **options)
    region = owner.ask("share", nbytes=4096)
    writer.ask("connect", descriptor=owner.describe().hex())
    assert writer.ask("write", region=region, seed=3, nbytes=4096)[0] == "DONE"
    end = f"v{networks[0][3:9]}a"
    assert not ip("-n", networks[0], "link", "set", end, "down").returncode
    assert writer.ask("write", region=region, seed=4, nbytes=4096)[0] == "UNKNOWN"
    assert writer.ask("state") != "gone"
    assert not ip("-n", networks[0], "link", "set", end, "up").returncode
    eventually(lambda: writer.ask("write", region=region, seed=5, nbytes=4096)[0] == "DONE")
    assert writer.ask("all_drained")

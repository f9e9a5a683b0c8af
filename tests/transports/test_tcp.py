"""The tcp transport within one process: its fences, its time-outs, its way to a peer."""

from __future__ import annotations

import gc
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import ifaddr
import msgspec
import pytest
from transport_ends import PATIENCE_S, Brake, at, ended, eventually, filled, over

from tensorferry.backends import _tcp_harbor, _tcp_link
from tensorferry.backends import _tcp_wire as wire
from tensorferry.backends import tcp as tcp_module
from tensorferry.backends._addresses import local_addresses
from tensorferry.backends.tcp import TcpOptions, TcpTransport
from tensorferry.core.errors import ConfigError, ProtocolViolation, TransportMismatch, TransportUnavailable
from tensorferry.core.memory import Memory
from tensorferry.core.transport import Copy, PeerState, Region, Status

pytestmark = pytest.mark.timeout(60)

Open = Callable[..., TcpTransport]


@pytest.fixture
def opened() -> Iterator[Open]:
    made: list[TcpTransport] = []

    def open_one(**options: Any) -> TcpTransport:
        made.append(TcpTransport(TcpOptions(**options)))
        return made[-1]

    yield open_one
    for transport in made:
        transport.close()


class Hold:
    """Stops the owner's thread inside of its next receive of payload: past the gate, before the bytes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.held, self.go = threading.Event(), threading.Event()
        receive = _tcp_harbor.receive

        def receive_held(connection: socket.socket, view: memoryview) -> int:
            if len(view) > wire.FRAME_BYTES and not self.go.is_set():
                self.held.set()
                assert self.go.wait(PATIENCE_S)
            return receive(connection, view)

        monkeypatch.setattr(_tcp_harbor, "receive", receive_held)


def shared(owner: TcpTransport, nbytes: int) -> Region:
    return owner.register(owner.allocate(nbytes))


def post(writer: TcpTransport, peer: Any, region: Region, data: bytes, offset: int = 0) -> int:
    return writer.post(peer, [Copy(filled(writer, data), 0, at(region), offset, len(data))])


def redirected(owner: TcpTransport, **changes: Any) -> bytes:
    told = msgspec.msgpack.decode(owner.describe(), type=wire.Descriptor)
    return msgspec.msgpack.encode(msgspec.structs.replace(told, **changes))


# ---- over several connections ----------------------------------------------------------------------------------


@pytest.mark.parametrize("connections", [1, 2, 3])
def test_a_large_post_goes_over_all_connections_and_arrives(opened: Open, connections: int) -> None:
    """Sides that use different numbers of threads serve each other."""
    owner, writer = opened(connections=2), opened(connections=connections)
    data = os.urandom(1 << 20) * 9 + b"odd"
    region, source = shared(owner, len(data) + 7), filled(writer, data)
    copies = [
        Copy(source, start, at(region), 7 + start, min(3_333_333, len(data) - start))
        for start in range(0, len(data), 3_333_333)
    ]
    peer = writer.connect(owner.describe())
    assert ended(writer, writer.post(peer, copies)) is Status.DONE
    assert region.memory.view(7) == data
    assert [link.up for link in peer.links] == [True] * connections


# ---- the fences ------------------------------------------------------------------------------------------------


def test_a_write_that_makes_no_progress_is_unknown_until_a_later_connection_is_welcome(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, writer = opened(), opened(io_timeout=0.2)
    region = shared(owner, 1 << 20)
    peer = writer.connect(owner.describe())
    hold = Hold(monkeypatch)
    handle = post(writer, peer, region, b"\x55" * 1000)
    assert hold.held.wait(PATIENCE_S)
    assert over(writer, handle) is Status.UNKNOWN
    assert not writer.drained(handle)
    eventually(lambda: peer.links[0]._connection, "it dials again")
    assert not writer.drained(handle)
    assert not any(region.memory.view())
    hold.go.set()
    eventually(lambda: writer.drained(handle))
    assert writer.poll(handle) is Status.UNKNOWN
    after = bytes(region.memory.view())
    assert after in (bytes(1 << 20), b"\x55" * 1000 + bytes((1 << 20) - 1000))  # it landed late, or not at all
    assert ended(writer, post(writer, peer, region, b"next", offset=5000)) is Status.DONE
    assert bytes(region.memory.view(0, 5000)) == after[:5000]  # drained: nothing has landed since
    writer.release(handle)


def test_retire_waits_for_the_chunk_that_is_being_placed(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, writer = opened(), opened()
    region = shared(owner, 1 << 16)
    hold = Hold(monkeypatch)
    handle = post(writer, writer.connect(owner.describe()), region, b"\x55" * (1 << 16))
    assert hold.held.wait(PATIENCE_S)
    retiring = threading.Thread(target=owner.retire, args=(region,))
    retiring.start()
    retiring.join(0.05)
    assert retiring.is_alive(), "a chunk is being placed"
    hold.go.set()
    retiring.join()
    after = bytes(region.memory.view())
    assert ended(writer, handle) in (Status.DONE, Status.FAILED)
    assert bytes(region.memory.view()) == after


def test_nothing_lands_after_retire_in_the_middle_of_a_large_write(opened: Open) -> None:
    owner, writer = opened(), opened()
    nbytes = 32 << 20
    region = shared(owner, nbytes)
    peer = writer.connect(owner.describe())
    assert ended(writer, post(writer, peer, region, b"\1")) is Status.DONE
    view = region.memory.view()
    handle = post(writer, peer, region, b"\x55" * nbytes)
    eventually(lambda: view[1 << 20] == 0x55)
    owner.retire(region)
    view[:] = b"\xaa" * nbytes
    assert ended(writer, handle) in (Status.DONE, Status.FAILED)
    assert view == b"\xaa" * nbytes


def test_retired_memory_is_let_go_of(opened: Open) -> None:
    import gc
    import weakref

    class Owner:
        pass

    transport, owner = opened(), Owner()
    backing = transport.allocate(4096)
    alive = weakref.ref(owner)
    region = transport.register(Memory(backing.address, 4096, owner=owner))
    del owner
    transport.retire(region)
    del region
    gc.collect()
    assert alive() is None


def test_a_writer_that_closed_is_gone_only_when_what_it_had_sent_cannot_land(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last word is on one connection, its bytes may wait in another one's socket."""
    owner, writer = opened(connections=1), opened(connections=1)
    region = shared(owner, 1 << 16)
    watched = owner.connect(writer.describe())
    peer = writer.connect(owner.describe())
    assert ended(writer, post(writer, peer, region, b"\1")) is Status.DONE
    eventually(lambda: watched.links[0].up)
    hold = Hold(monkeypatch)
    post(writer, peer, region, b"\x55" * (1 << 16))
    assert hold.held.wait(PATIENCE_S)
    watched.route.closed = True  # as if it had said so
    states = {owner.peer_state(watched) for _ in range(100)}
    assert states == {PeerState.UNKNOWN}
    hold.go.set()
    eventually(lambda: owner.peer_state(watched) is PeerState.GONE)
    after = bytes(region.memory.view())
    with pytest.raises(ConnectionError):  # nor is it let in again
        hello_again(owner, writer)
    assert bytes(region.memory.view()) == after


def hello_again(owner: TcpTransport, writer: TcpTransport) -> None:
    told = msgspec.msgpack.decode(owner.describe(), type=wire.Descriptor)
    with socket.create_connection(("127.0.0.1", told.port), timeout=10) as connection:
        connection.sendall(wire.pack_hello(wire.Hello(told.token, writer._instance, 77, 1)))
        if not connection.recv(1):
            raise ConnectionResetError


def test_a_peer_that_is_seen_dead_at_first_sight_is_no_proof(opened: Open) -> None:
    """Two machines cloned from one snapshot have the same boot id: on which of them it ran cannot be told."""
    owner, writer = opened(), opened(connect_timeout=0.1)
    peer = writer.connect(redirected(owner, pid=1 << 22, started=1))
    assert writer.peer_state(peer) is not PeerState.GONE


# ---- cancelling ------------------------------------------------------------------------------------------------


def test_a_post_that_is_cancelled_on_its_way_ends_at_a_frame(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp_module, "PIECE_BYTES", 1024)
    monkeypatch.setattr(_tcp_link, "CHUNK_BYTES", 1024)
    owner, writer = opened(connections=1), opened(connections=1)
    region = shared(owner, 4096)
    peer = writer.connect(owner.describe())
    assert ended(writer, post(writer, peer, region, b"\1")) is Status.DONE
    brake = Brake()
    monkeypatch.setattr(_tcp_link, "transmit", brake.transmit)
    handle = post(writer, peer, region, b"\x55" * 4096)
    brake.until_held()
    writer.cancel(handle)
    brake.release()
    assert ended(writer, handle) is Status.FAILED
    assert bytes(region.memory.view()) == b"\x55" * 1024 + bytes(3072)
    assert ended(writer, post(writer, peer, region, b"next")) is Status.DONE


# ---- the way to a peer -----------------------------------------------------------------------------------------


def test_a_port_where_nobody_listens_fails_what_waits_and_says_why(
    opened: Open, caplog: pytest.LogCaptureFixture
) -> None:
    owner, writer = opened(), opened()
    region = shared(owner, 4096)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        free = listener.getsockname()[1]
    peer = writer.connect(redirected(owner, addresses=["127.0.0.1"], port=free))
    with caplog.at_level(logging.WARNING):
        handle = post(writer, peer, region, b"x")
        assert ended(writer, handle) is Status.FAILED
    assert writer.drained(handle)
    assert "ECONNREFUSED" in caplog.text


def test_a_listener_that_never_greets_fails_what_waits_after_the_time_out(opened: Open) -> None:
    owner, writer = opened(), opened(connect_timeout=0.2)
    region = shared(owner, 4096)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        peer = writer.connect(redirected(owner, addresses=["127.0.0.1"], port=silent.getsockname()[1]))
        assert ended(writer, post(writer, peer, region, b"x")) is Status.FAILED


def test_another_transport_at_the_address_is_passed_over(opened: Open) -> None:
    """An address that two hosts have (a bridge's, say) leads to the wrong one: it does not know the token."""
    stranger, owner, writer = opened(host="127.0.0.2"), opened(host="127.0.0.1"), opened()
    region = shared(owner, 4096)
    told = msgspec.msgpack.decode(owner.describe(), type=wire.Descriptor)
    elsewhere = opened(host="127.0.0.2", port=told.port)
    peer = writer.connect(redirected(owner, addresses=["127.0.0.2", "127.0.0.3", "127.0.0.1"]))
    assert ended(writer, post(writer, peer, region, b"x")) is Status.DONE
    assert elsewhere._harbor.dropped >= 1
    assert stranger._harbor.dropped == 0


def test_posts_wait_for_a_peer_that_comes_in_time(opened: Open) -> None:
    owner, writer = opened(), opened()
    region = shared(owner, 1 << 20)
    peer = writer.connect(owner.describe())
    handles = [post(writer, peer, region, bytes([n]) * 100, offset=n * 100) for n in range(50)]
    assert {ended(writer, handle) for handle in handles} == {Status.DONE}
    assert region.memory.view(0, 5000) == b"".join(bytes([n]) * 100 for n in range(50))


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "auto", "0.0.0.0", "::"])
def test_addresses_of_both_families_work(opened: Open, host: str) -> None:
    owner, writer = opened(host=host), opened(host=host)
    region = shared(owner, 4096)
    told = msgspec.msgpack.decode(owner.describe(), type=wire.Descriptor)
    if host in ("127.0.0.1", "::1"):
        assert told.addresses == [host]
    else:
        assert told.addresses == [*local_addresses(), "127.0.0.1", "::1"]
    for address in told.addresses:
        peer = writer.connect(redirected(owner, addresses=[address]))
        assert ended(writer, post(writer, peer, region, b"x")) is Status.DONE
        writer.disconnect(peer)


def test_a_peer_on_loopback_of_another_host_has_no_path(opened: Open) -> None:
    owner, writer = opened(host="127.0.0.1"), opened()
    told = msgspec.msgpack.decode(owner.describe(), type=wire.Descriptor)
    other = msgspec.structs.replace(told.host, boot_id="another")
    with pytest.raises(TransportMismatch, match="loopback"):
        writer.connect(redirected(owner, host=other))
    assert "127.0.0.1" not in writer._way_to(msgspec.structs.replace(told, host=other, addresses=["192.0.2.9"]))


def test_a_descriptor_tells_the_addresses_of_now(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """A transport that was opened before its network came up can be reached once it is there."""
    monkeypatch.setattr(tcp_module, "local_addresses", list)
    transport = opened()

    def told() -> list[str]:
        return msgspec.msgpack.decode(transport.describe(), type=wire.Descriptor).addresses

    assert "192.0.2.7" not in told()
    monkeypatch.setattr(tcp_module, "local_addresses", lambda: ["192.0.2.7"])
    assert told()[0] == "192.0.2.7"


def test_a_list_of_interfaces_that_came_back_empty_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    here = ifaddr.Adapter("up0", "up0", [ifaddr.IP("192.0.2.7", 24, "up0")])
    answers = [[], [here]]
    monkeypatch.setattr(ifaddr, "get_adapters", lambda: answers.pop(0))
    assert local_addresses() == ["192.0.2.7"]
    answers = [[], []]
    assert local_addresses() == []


def test_an_address_that_is_none_is_a_violation(opened: Open) -> None:
    owner, writer = opened(), opened()
    with pytest.raises(ProtocolViolation):
        writer.connect(redirected(owner, addresses=["example.org"]))


def test_a_range_of_ports_is_tried_in_order_and_ends(opened: Open) -> None:
    low = opened(host="127.0.0.77")._port  # an address that nobody else listens on, so the next port is free
    both = f"{low}-{low + 1}"
    assert opened(host="127.0.0.77", port=both)._port == low + 1
    with pytest.raises(TransportUnavailable, match=both):
        opened(host="127.0.0.77", port=both)


@pytest.mark.parametrize("port", ["x", "5-", "-5", "9-8", "0-5", 65536, -1, "1-65536", ""])
def test_a_port_that_cannot_be_is_refused(port: int | str) -> None:
    with pytest.raises(ConfigError):
        TcpTransport(TcpOptions(port=port))


def test_a_host_that_is_no_address_is_refused() -> None:
    with pytest.raises(ConfigError):
        TcpTransport(TcpOptions(host="localhost"))


# ---- the end ---------------------------------------------------------------------------------------------------


def test_close_with_a_write_that_is_never_answered_is_bounded_and_leaves_it_unknown(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_tcp_link, "WIND_DOWN_S", 0.1)
    owner, writer = opened(), opened()
    region = shared(owner, 1 << 16)
    hold = Hold(monkeypatch)
    handle = post(writer, writer.connect(owner.describe()), region, b"\x55" * 4096)
    assert hold.held.wait(PATIENCE_S)
    watcher = opened()
    watched = watcher.connect(writer.describe())
    eventually(lambda: watched.links[0].up)
    start = time.monotonic()
    writer.close()
    assert time.monotonic() - start < PATIENCE_S
    assert writer.poll(handle) is Status.UNKNOWN
    assert not writer.drained(handle)
    eventually(lambda: not watched.links[0].up)
    assert watcher.peer_state(watched) is not PeerState.GONE  # it did not say goodbye: something of it may still land
    hold.go.set()


def test_disconnected_peers_leave_no_file(opened: Open) -> None:
    owner, writer = opened(), opened()
    region = shared(owner, 4096)

    def once() -> None:
        peer = writer.connect(owner.describe())
        assert ended(writer, post(writer, peer, region, b"x")) is Status.DONE
        writer.disconnect(peer)

    def files() -> int:
        return len(os.listdir("/proc/self/fd"))

    once()
    gc.collect()  # what earlier tests have dropped closes its files at some time, which would be taken for ours
    before = files()
    for _ in range(40):
        once()
    eventually(lambda: files() < before + 20, "connections and watches are closed")

    def links() -> int:
        peer = writer.connect(owner.describe())
        writer.disconnect(peer)
        return len(writer._links)

    eventually(lambda: links() == 2, "what has ended is forgotten when a peer is connected")


def test_two_way_traffic_between_a_pair(opened: Open) -> None:
    one, other = opened(), opened()
    regions = {one: shared(one, 8 << 20), other: shared(other, 8 << 20)}
    handles = []
    for writer, owner in ((one, other), (other, one)):
        peer = writer.connect(owner.describe())
        handles.append((writer, post(writer, peer, regions[owner], b"\x55" * (8 << 20))))
    assert {ended(writer, handle) for writer, handle in handles} == {Status.DONE}
    assert all(region.memory.view() == b"\x55" * (8 << 20) for region in regions.values())


def test_probe_names_addresses_and_connections() -> None:
    probe = TcpTransport.probe()
    assert probe.usable
    assert probe.path == "tcp"
    assert set(probe.facts) == {"addresses", "authentication", "binding", "connections"}

"""What the nixl transport reads from the kernel about its connections, over plain sockets of this process."""

from __future__ import annotations

import select
import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tensorferry.backends import _nixl_sockets
from tensorferry.backends._nixl_sockets import Aftermath, Stalled, cut_connections


class Ends:
    """Connections to one port, each as (the end that has dialled, the end that has accepted)."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        self.port = self._listener.getsockname()[1]

    def at(self, address: str) -> socket.socket:
        """A connection to the same port of another address."""
        other = self._stack.enter_context(socket.create_server((address, self.port)))
        dialled = self._stack.enter_context(socket.create_connection(other.getsockname()))
        self._stack.enter_context(other.accept()[0])
        return dialled

    def one(self) -> tuple[socket.socket, socket.socket]:
        dialled = self._stack.enter_context(socket.create_connection(self._listener.getsockname()))
        return dialled, self._stack.enter_context(self._listener.accept()[0])


@pytest.fixture
def ends() -> Iterator[Ends]:
    with ExitStack() as stack:
        yield Ends(stack)


@pytest.fixture
def watch(ends: Ends) -> Iterator[select.epoll]:
    """As UCX watches its connections."""
    with select.epoll() as made:
        yield made


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What has been read is placed."""
    monkeypatch.setattr(_nixl_sockets, "PLACING_S", 0.0)


def is_open(one: socket.socket) -> bool:
    one.setblocking(False)
    try:
        return one.recv(1) != b""
    except BlockingIOError:
        return True


def fill(one: socket.socket) -> int:
    """Send until nothing more goes; how many bytes."""
    one.setblocking(False)
    sent = 0
    while True:
        try:
            sent += one.send(bytes(1 << 20))
        except BlockingIOError:
            return sent


# ---- ending connections --------------------------------------------------------------------------------------


def test_a_peer_of_another_host_with_the_same_port_keeps_its_connection(ends: Ends, watch: select.epoll) -> None:
    """As where a firewall gives UCX one port on every host."""
    (sick, _), well, foreign = ends.one(), ends.at("127.0.0.2"), ends.one()[0]
    watch.register(sick)
    watch.register(well)
    cut_connections([ends.port], ["127.0.0.1"], [watch.fileno()])
    assert not is_open(sick)
    assert is_open(well)
    assert is_open(foreign), "it is not this agent's"


def test_a_connection_that_the_peer_has_dialled_is_ended_when_nothing_goes_on(ends: Ends, watch: select.epoll) -> None:
    (_, stuck), (reads, slow), (_, idle), foreign = ends.one(), ends.one(), ends.one(), ends.at("127.0.0.2")
    for one in (stuck, slow, idle, foreign):
        watch.register(one)
    for one in (stuck, slow, foreign):
        fill(one)
    stalled = Stalled({"127.0.0.1"}, [watch.fileno()])
    stalled.cut(100.0, 5.0)
    stalled.cut(104.9, 5.0)
    assert is_open(stuck)
    before = _nixl_sockets._tcp_info(slow, _nixl_sockets._BYTES_ACKED)
    while _nixl_sockets._tcp_info(slow, _nixl_sockets._BYTES_ACKED) == before:
        assert reads.recv(1 << 20)
    fill(slow)
    stalled.cut(105.0, 5.0)
    assert not is_open(stuck)
    assert [is_open(one) for one in (slow, idle, foreign)] == [True] * 3


# ---- a dead peer's bytes -------------------------------------------------------------------------------------


def test_bytes_of_a_dead_peer_count_although_the_other_end_is_open(ends: Ends, at_once: None) -> None:
    """A child that the dead one has forked keeps it open, and what was sent is still to land."""
    theirs, ours = ends.one()
    theirs.sendall(b"some")
    aftermath = Aftermath([ends.port], [])
    assert not aftermath.settled()
    assert ours.recv(2) == b"so"
    assert not aftermath.settled()
    assert ours.recv(9) == b"me"
    assert aftermath.settled()


def test_what_lies_at_the_other_end_counts_too(ends: Ends, at_once: None) -> None:
    theirs, ours = ends.one()
    sent = fill(theirs)
    aftermath = Aftermath([ends.port], [])
    while sent > 0:
        assert not aftermath.settled()
        sent -= len(ours.recv(min(sent, 4 << 20)))
    assert aftermath.settled()


def test_a_peer_that_never_pauses_keeps_no_dead_one(ends: Ends, at_once: None) -> None:
    """It is seen neither empty nor closed. What lay there at first has been read all the same."""
    theirs, ours = ends.one()
    theirs.sendall(bytes(100))
    aftermath = Aftermath([ends.port], [])
    assert not aftermath.settled()
    theirs.sendall(bytes(100))
    assert len(ours.recv(99)) == 99
    assert not aftermath.settled()
    assert len(ours.recv(1)) == 1
    assert aftermath.settled()


def test_what_was_read_last_is_given_time_to_be_placed(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours = ends.one()
    theirs.sendall(b"some")
    now = [1000.0]
    monkeypatch.setattr("tensorferry.backends._nixl_sockets.time.monotonic", lambda: now[0])
    aftermath = Aftermath([ends.port], [])
    assert not aftermath.settled()
    now[0] += 10
    ours.recv(4)
    assert not aftermath.settled()
    looks = 0
    while not aftermath.settled():
        now[0] += 3600.0  # this process was stopped: so was the thread that is to place it
        looks += 1
    assert looks >= _nixl_sockets.PLACING_S / _nixl_sockets.LOOK_S


def test_an_end_that_was_seen_is_waited_for_until_our_side_is_closed(ends: Ends, at_once: None) -> None:
    theirs, ours = ends.one()
    theirs.close()
    aftermath = Aftermath([ends.port], [])
    assert not aftermath.settled(), "all is read, and UCX has not seen the end yet"
    ours.close()
    assert aftermath.settled()


def test_connections_that_are_made_later_and_those_of_others_are_nobodys_concern(ends: Ends, at_once: None) -> None:
    other = socket.create_server(("127.0.0.1", 0))
    with other, socket.create_connection(other.getsockname()) as dialled, other.accept()[0]:
        dialled.sendall(b"of another port")
        theirs, ours = ends.one()
        theirs.sendall(b"at first")
        aftermath = Aftermath([ends.port], [])
        assert not aftermath.settled()
        ends.one()[0].sendall(b"later")
        ours.recv(100)
        assert aftermath.settled()

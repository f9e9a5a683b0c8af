"""What the nixl transport reads from the kernel about its connections, over plain sockets of this process."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tensorferry.backends import _nixl_sockets
from tensorferry.backends._nixl_sockets import Aftermath


class Ends:
    """Connections to one port, each as (the end that has dialled, the end that has accepted)."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        self.port = self._listener.getsockname()[1]

    def one(self) -> tuple[socket.socket, socket.socket]:
        dialled = self._stack.enter_context(socket.create_connection(self._listener.getsockname()))
        return dialled, self._stack.enter_context(self._listener.accept()[0])


@pytest.fixture
def ends() -> Iterator[Ends]:
    with ExitStack() as stack:
        yield Ends(stack)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What has been read is placed."""
    monkeypatch.setattr(_nixl_sockets, "PLACING_S", 0.0)


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
    theirs.setblocking(False)
    sent = 0
    while True:
        try:
            sent += theirs.send(bytes(1 << 20))
        except BlockingIOError:
            break
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
    now[0] += _nixl_sockets.PLACING_S
    assert aftermath.settled()


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

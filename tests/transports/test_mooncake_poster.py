"""The mooncake transport's thread: how it ends when peers or the engine do not answer, and when it rests."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
from engine_kit import changed
from transport_ends import Brake, Process, at, ended, eventually, need, source

from tensorferry.backends import _engine_transport
from tensorferry.backends import _mooncake_wire as wire
from tensorferry.backends._engine_thread import WATCH_S
from tensorferry.backends._mooncake_contact import Contact
from tensorferry.backends._mooncake_jobs import Job, Submit, Target
from tensorferry.backends._mooncake_poster import Limits, Poster
from tensorferry.backends._mooncake_sockets import Aftermath
from tensorferry.backends.mooncake import MooncakeOptions, MooncakeTransport
from tensorferry.core.transport import Copy, PeerState, RemoteRegion, Status

Open = Callable[[], MooncakeTransport]
HERE = "127.0.0.1"
SYN_SENT = 2


@pytest.fixture
def opened() -> Iterator[Open]:
    need("mooncake")
    transports: list[MooncakeTransport] = []

    def open_one() -> MooncakeTransport:
        transports.append(MooncakeTransport(MooncakeOptions(host=HERE)))
        return transports[-1]

    yield open_one
    for transport in transports:
        transport.close()


@pytest.fixture
def hole() -> Iterator[int]:
    """A port that answers nobody: who waits to be accepted has the only place."""
    with socket.create_server((HERE, 0), backlog=0) as listener:
        port = int(listener.getsockname()[1])
        with socket.create_connection((HERE, port)):
            yield port


def dialling(contact: Contact) -> bool:
    waiting = contact._socket
    with contextlib.suppress(OSError):  # it was closed just now: the next one comes
        return waiting is not None and waiting.getsockopt(socket.SOL_TCP, socket.TCP_INFO, 1)[0] == SYN_SENT
    return False


@pytest.mark.parametrize("which", ["handshake", "data"])
def test_an_attempt_at_contact_that_is_abandoned_is_over_while_it_still_dials(
    opened: Open, hole: int, which: str
) -> None:
    told = msgspec.msgpack.decode(opened().describe(), type=wire.Descriptor)
    with socket.create_server((HERE, 0)) as engine:

        def answer() -> None:
            connection, _ = engine.accept()
            with connection:
                connection.recv(100)
                said = msgspec.json.encode({"name": f"{HERE}:1", "protocol": "tcp", "tcp_data_port": hole})
                connection.sendall(struct.pack("<QB", len(said) + 1, 1) + said)

        port = hole if which == "handshake" else engine.getsockname()[1]
        thread = threading.Thread(target=answer)
        if which == "data":
            thread.start()
        told = msgspec.structs.replace(told, port=port, data_port=hole, protocol="tcp")
        contact = Contact(told, 600.0, lambda: pytest.fail("nothing is told any more"))
        eventually(lambda: dialling(contact) and not thread.is_alive())
        contact.abandon()
        contact.join(30)
        assert contact.over


def test_attempts_at_contact_that_hang_hold_close_up_together_and_what_never_began_fails(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they do in the resolver, which nothing ends."""
    answered = threading.Event()
    monkeypatch.setattr(Contact, "_try", lambda _: answered.wait(60))
    here, there = opened(), opened()
    region = there.register(there.allocate(64))
    local = source(here, b"x")
    peers = [here.connect(changed(there.describe())) for _ in range(12)]
    handles = [here.post(peer, [Copy(local, 0, at(region), 0, 1)]) for peer in peers]
    eventually(lambda: sum(peer.target.contact is not None for peer in peers) == len(peers))
    here.close()
    assert not here._poster.thread.is_alive()
    assert {here.poll(handle) for handle in handles} == {Status.FAILED}
    answered.set()


def test_where_the_engine_does_not_come_back_nothing_stays_pending_and_nobody_is_called_gone(
    opened: Open, brake: Callable[[], Brake], process: Callable[..., Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = opened(), process(kind="mooncake")
    region = there.ask("share", nbytes=64)
    peer = here.connect(there.describe())
    local = source(here, b"x")

    def post() -> int:
        return here.post(peer, [Copy(local, 0, RemoteRegion(*region), 0, 1)])

    assert ended(here, post()) is Status.DONE
    monkeypatch.setattr(_engine_transport, "CLOSE_TIMEOUT_S", 0.1)
    monkeypatch.setattr(Aftermath, "settled", lambda _: False)
    held = brake()
    begun = post()
    held.until_held()
    waits = post()
    here.close()
    assert (here.poll(begun), here.poll(waits)) == (Status.UNKNOWN, Status.FAILED)
    assert not here.drained(begun)
    there.end()
    eventually(peer.target.ended)
    assert here.peer_state(peer) is PeerState.UNKNOWN, "the engine lives, and places what comes"
    held.release()
    here._poster.thread.join(30)
    assert here.peer_state(peer) is PeerState.GONE
    assert (here.poll(begun), here.poll(waits)) == (Status.UNKNOWN, Status.FAILED)
    assert here.drained(begun)


def test_a_thread_whose_window_is_full_of_what_is_lost_rests(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that waits for room has waited longer than a peer may take to answer."""
    told = msgspec.msgpack.decode(opened().describe(), type=wire.Descriptor)
    monkeypatch.setattr(Poster, "_run", lambda _: None)  # nobody else looks at what follows
    engine: Any = None
    poster = Poster(engine, Limits(1, 1.0, 1.0, 4))
    target = Target(told, None, ready=True)
    lost = Job(target, deque(), (), 0.0, Status.UNKNOWN)
    target.under_way[1] = Submit(lost, 1, 0.0)
    target.jobs.append(Job(target, deque([(0, 0, 1)]), (), time.monotonic() - 60))
    poster._targets = [target]
    assert poster._pause() == WATCH_S

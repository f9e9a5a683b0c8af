"""How an endpoint begins and ends: what fails to begin leaves nothing, and what ends does so once, from anywhere."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import zmq
from scenario_kit import PATIENCE, SMALL, Quay, assert_same, eventually, rows

import tensorferry as tf
from tensorferry import errors
from tensorferry.backends import tcp
from tensorferry.backends.memory import MemoryOptions, MemoryTransport
from tensorferry.backends.shm import ShmOptions, ShmTransport
from tensorferry.core import asking, carriers, control, receiving, sending
from tensorferry.core.endpoint import Asked
from tensorferry.core.transport import Region


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


@pytest.fixture
def nothing_left(port: str) -> Iterator[None]:
    """No descriptor, no thread, and nothing whose collection hangs (the test's time limit says so)."""
    tf.Sender(SMALL, transport="shm", bind=port).close()  # whatever is made once in a process
    gc.collect()
    before = descriptors(), threading.active_count()
    yield
    gc.collect()
    assert (descriptors(), threading.active_count()) == before
    tf.Sender(SMALL, transport="shm", bind=port).close()


# ---- failing to begin ----------------------------------------------------------------------------------------


def out_of_memory(*args: object, **more: object) -> Any:
    raise OSError("Cannot allocate memory")


def a_defect(*args: object, **more: object) -> Any:
    raise RuntimeError("a defect")


@pytest.mark.usefixtures("nothing_left")
def test_a_sender_whose_staging_cannot_be_leaves_nothing(port: str) -> None:
    for _ in range(3):
        with pytest.raises(errors.ConfigError, match="staging of 8 bytes"):
            tf.Sender(SMALL, transport="shm", bind=port, staging_bytes=8)


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("what", ["SenderMachine", "Poster"])
def test_a_sender_that_fails_half_made_leaves_nothing(port: str, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sending, what, a_defect)
        with pytest.raises(RuntimeError):
            tf.Sender(SMALL, transport="shm", bind=port)


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("what", ["PoolBuffers", "receiver_policy", "Gatherer"])
def test_a_receiver_that_fails_half_made_leaves_nothing(port: str, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(receiving, what, out_of_memory)
        with pytest.raises(OSError, match="Cannot allocate"):
            tf.Receiver(SMALL, transport="shm", group=tf.Group(0, 2, port))


@pytest.mark.usefixtures("nothing_left")
def test_a_receiver_with_a_leader_that_is_no_address_leaves_nothing() -> None:
    for _ in range(3):
        with pytest.raises(errors.ConfigError, match="no address"):
            tf.Receiver(SMALL, transport="shm", group=tf.Group(1, 2, "tcp://nonsense"))


@pytest.mark.usefixtures("nothing_left")
def test_an_endpoint_whose_thread_cannot_start_leaves_nothing(port: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for make in both_kinds(port):
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", a_defect)
            with pytest.raises(RuntimeError):
                make()


def both_kinds(port: str) -> list[Callable[[], object]]:
    return [
        lambda: tf.Sender(SMALL, transport="memory", bind=port),  # which has no thread of its own
        lambda: tf.Receiver(SMALL, transport="memory", group=tf.Group(0, 2, port)),
    ]


@pytest.mark.usefixtures("nothing_left")
def test_ctrl_c_when_the_thread_has_begun_leaves_nothing(
    port: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    start, starts = threading.Thread.start, list[str]()

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        if thread.name.startswith("tensorferry-"):
            starts.append(thread.name)
            raise KeyboardInterrupt

    for make in both_kinds(port):
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", interrupted)
            with pytest.raises(KeyboardInterrupt):
                make()
    assert len(starts) == 2
    assert caplog.text == ""  # it has not gone on with what was closed


@pytest.mark.usefixtures("nothing_left")
def test_ctrl_c_before_the_thread_has_begun_leaves_it_nothing_to_do(
    port: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    start, late = threading.Thread.start, list[threading.Thread]()

    def interrupted(thread: threading.Thread) -> None:
        if not thread.name.startswith("tensorferry-"):
            return start(thread)
        late.append(thread)
        raise KeyboardInterrupt

    for make in both_kinds(port):
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", interrupted)
            with pytest.raises(KeyboardInterrupt):
                make()
    for thread in late:
        thread.start()
        thread.join(PATIENCE)
        assert not thread.is_alive()
    assert len(late) == 2
    assert caplog.text == ""
    late.clear()


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("what", ["bind", "getsockopt_string", "MAXMSGSIZE", "ROUTER_MANDATORY"])
def test_a_control_channel_that_fails_half_made_leaves_nothing(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    setsockopt = zmq.Socket.setsockopt

    def fails_at_one(socket: zmq.Socket[bytes], option: int, value: Any) -> None:
        if option == getattr(zmq, what):
            a_defect()
        setsockopt(socket, option, value)

    with monkeypatch.context() as patch:
        patch.setattr(zmq.Socket, *((what, a_defect) if what.islower() else ("setsockopt", fails_at_one)))
        with pytest.raises(RuntimeError):
            control.Control(b"x", "tcp://127.0.0.1:0")


class Counting(MemoryTransport):
    """Knows which regions are live, and has memory for so many registrations."""

    room = 3

    def __init__(self) -> None:
        super().__init__(MemoryOptions())
        self.live: set[int] = set()
        self.closed = 0

    def register(self, memory: Any) -> Region:
        if len(self.live) == self.room:
            raise errors.TransportError("no room for another region")
        region = super().register(memory)
        self.live.add(region.id)
        return region

    def retire(self, region: Region) -> None:
        super().retire(region)
        self.live.discard(region.id)

    def close(self) -> None:
        self.live_at_the_end = set(self.live)
        self.closed += 1
        super().close()


def test_a_pool_that_finds_no_room_is_given_back_whole() -> None:
    transport = Counting()
    with pytest.raises(errors.TransportError, match="no room"):
        tf.Receiver(SMALL, transport=transport)
    assert transport.closed == 1
    assert transport.live_at_the_end == set()


def test_a_transport_that_was_handed_over_is_closed_whatever_is_raised() -> None:
    wrong: list[dict[str, Any]] = [
        {"block_size": 0}, {"name": "x" * 129}, {"require": "rdma"}, {"no_such_setting": 1}, {"name": 5},
        {"pool_blocks": 1 << 20, "slabs": 0},
    ]  # fmt: skip
    for arguments in wrong:
        for make in (tf.Sender, tf.Receiver):
            transport = ShmTransport(ShmOptions())
            before = descriptors()
            with pytest.raises(errors.FerryError):
                make(SMALL, transport=transport, **arguments)
            assert descriptors() < before


def test_an_address_that_is_no_string_is_refused() -> None:
    with pytest.raises(errors.ConfigError, match="bind is a string"):
        tf.Sender(SMALL, transport="memory", bind=5555)  # type: ignore[arg-type]


def test_what_is_no_transport_is_refused() -> None:
    for nonsense in (5, ShmTransport, ["shm"]):
        with pytest.raises(errors.ConfigError, match="a name or an open Transport"):
            tf.Sender(SMALL, transport=nonsense)  # type: ignore[arg-type]


# ---- a network that comes up later -------------------------------------------------------------------------------


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The addresses of this host: none so far."""
    addresses: list[str] = []
    monkeypatch.setattr(tcp, "local_addresses", lambda: addresses)
    monkeypatch.setattr(carriers, "LOOK_SECONDS", 0.0)
    return addresses


def test_a_sender_that_was_opened_before_its_network_was_up_tells_its_addresses_since(network: list[str]) -> None:
    with tf.Sender(SMALL, transport="tcp") as sender:
        [before] = (first := asking.ask(sender.address, PATIENCE)).offers
        network.append("192.0.2.7")
        [since] = (second := asking.ask(sender.address, PATIENCE)).offers
        assert b"192.0.2.7" not in before.descriptor
        assert b"192.0.2.7" in since.descriptor
        assert second.revision == first.revision + 1
        assert asking.ask(sender.address, PATIENCE).revision == second.revision  # nothing has changed since


def test_a_receiver_that_was_opened_before_its_network_was_up_tells_its_addresses_since(network: list[str]) -> None:
    with Quay("tcp", layout=SMALL) as quay:
        quay.carry(10)

        def told() -> tuple[int, bool]:
            hello = quay.sender.machine.receivers[quay.receiver.incarnation].hello
            return hello.revision, b"192.0.2.7" in hello.offers[0].descriptor

        assert told() == (1, False)
        network.append("192.0.2.7")
        sending = quay.sender.announce(2, 300)
        receiving = quay.receive(2)
        eventually(lambda: told() == (2, True))
        given = rows(300, layout=SMALL)
        sending.put(0, **given)  # what has begun goes on
        assert_same(receiving.result(PATIENCE), given)
        quay.carry(10, room=3)
        assert told() == (2, True)  # nothing has changed since


# ---- ending --------------------------------------------------------------------------------------------------


@pytest.fixture
def interrupt() -> Iterator[Callable[[Callable[[], object]], Callable[[], None]]]:
    """Makes a function that, the first time, is interrupted by a signal whose handler calls what it was given."""
    before = signal.getsignal(signal.SIGUSR1)

    def make(handle: Callable[[], object]) -> Callable[[], None]:
        signal.signal(signal.SIGUSR1, lambda number, frame: handle() and None)
        pending = [signal.SIGUSR1]

        def strike() -> None:
            if pending:
                signal.raise_signal(pending.pop())

        return strike

    yield make
    signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("where", ["join", "wake"])
def test_a_handler_may_close_what_is_being_closed(
    where: str, interrupt: Callable[..., Callable[[], None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Quay(layout=SMALL, clean=False) as quay:
        receiving = quay.receive()
        over: list[bool] = []

        def close() -> None:
            quay.receiver.close()
            over.append(quay.receiver._over)

        strike = interrupt(close)
        join, write = quay.receiver._thread.join, os.eventfd_write

        def interrupted_join(timeout: float) -> None:
            strike()
            join(timeout)

        def interrupted_write(descriptor: int, n: int) -> None:
            if threading.current_thread() is threading.main_thread():
                strike()
            write(descriptor, n)

        if where == "join":
            monkeypatch.setattr(quay.receiver._thread, "join", interrupted_join)
        else:
            monkeypatch.setattr(control.os, "eventfd_write", interrupted_write)
        quay.receiver.close()
        assert over == [True]  # the handler has not waited for what only this thread could go on with
        assert not quay.receiver._thread.is_alive()
        with pytest.raises(errors.Cancelled):
            receiving.wait(PATIENCE)


def test_everybody_who_closes_returns_when_it_is_over() -> None:
    with Quay(layout=SMALL, clean=False) as quay:
        over: list[bool] = []

        def close() -> None:
            quay.sender.close()
            over.append(quay.sender._over)

        threads = [threading.Thread(target=close) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        assert over == [True] * 4  # all is released; the thread itself may live a moment longer


def test_whoever_calls_while_it_ends_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with Quay(layout=SMALL, clean=False) as quay:
        release, waiting = quay.sender._release, Asked(lambda: None)

        def call_too_late() -> None:
            quay.sender._commands.append(waiting)
            release()

        monkeypatch.setattr(quay.sender, "_release", call_too_late)
        quay.sender.close()
        assert waiting.answered(PATIENCE)
        with pytest.raises(errors.BadCall, match="closed"):
            waiting.answer()


def test_whoever_calls_when_it_has_just_ended_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with Quay(layout=SMALL, clean=False) as quay:
        monkeypatch.setattr(quay.sender, "_check_caller", lambda later: quay.sender.close())  # over when it goes on
        with pytest.raises(errors.BadCall, match="closed"):
            quay.sender._call(lambda: 5)
        assert not quay.sender._commands


# ---- fork ----------------------------------------------------------------------------------------------------


def in_a_forked_child(work: dict[str, Callable[[], object]]) -> dict[str, str]:
    """What each of `work` does in a child: "done", or the name of what it raises; nothing for what does not return."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(10)
            for name, one in work.items():
                try:
                    one()
                    outcome = "done"
                except Exception as problem:  # noqa: BLE001 - it is the answer
                    outcome = type(problem).__name__
                os.write(write, (json.dumps([name, outcome]) + "\n").encode())
        finally:
            os._exit(0)
    os.close(write)
    with open(read) as answers:
        told = dict(json.loads(line) for line in answers)
    os.waitpid(child, 0)
    return told


def test_a_forked_child_is_refused_at_once_and_its_parent_goes_on() -> None:
    with Quay("shm", layout=SMALL) as quay:
        given = rows(100, layout=SMALL)
        over = quay.carry(10, room=5)
        sending, receiving = quay.sender.announce(1, 100), quay.receive()
        eventually(lambda: receiving.total_tokens == 100)

        async def awaited() -> Any:
            return await receiving

        told = in_a_forked_child(
            {
                "wait": lambda: receiving.wait(5), "for ever": sending.wait, "result": receiving.result,
                "rows": lambda: next(receiving.rows()), "await": lambda: asyncio.run(awaited()),
                "put": lambda: sending.put(0, **given), "cancel": sending.cancel, "over": over.result,
                "send": lambda: quay.sender.send(2, **given), "close": quay.close,
            }
        )  # fmt: skip
        refused = dict.fromkeys(["wait", "for ever", "result", "rows", "await", "put", "cancel", "send"], "BadCall")
        assert told == {**refused, "over": "done", "close": "done"}
        sending.put(0, **given)
        assert_same(receiving.result(PATIENCE), given)
        sending.wait(PATIENCE)

"""The control channel: what does not decode is counted and ends nothing; what cannot be sent is dropped and counted."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import zmq

from tensorferry.core import control as control_module
from tensorferry.core import messages as m
from tensorferry.core.control import MOST_FRAMES_A_TURN, Control, speaks_for
from tensorferry.core.endpoint import BUSY_POLL
from tensorferry.core.errors import ConfigError, Overloaded
from tensorferry.core.wire import encode

PATIENCE_S = 30.0

PING, PONG = m.Ping(src=1, dst=2), m.Pong(src=2, dst=1)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def listening(stack: ExitStack, bind: str = "tcp://127.0.0.1:0") -> Control:
    control = Control(b"server", bind)
    stack.callback(control.close)
    return control


def dialling(stack: ExitStack, address: str, identity: bytes = b"client") -> Control:
    control = Control(identity)
    stack.callback(control.close)
    control.connect(address)
    return control


def stranger(stack: ExitStack, address: str) -> zmq.Socket[bytes]:
    """A socket that sends what it likes."""
    context = stack.enter_context(zmq.Context())
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.LINGER, 0)
    socket.connect(address)
    stack.callback(socket.close)
    return socket


def received(control: Control, n: int) -> list[tuple[str, m.Message]]:
    """The next `n` messages."""
    found: list[tuple[str, m.Message]] = []
    deadline = time.monotonic() + PATIENCE_S
    while len(found) < n:
        assert time.monotonic() < deadline, f"{len(found)} of {n} messages came"
        found.extend(control.receive(0.05))
    return found


def test_a_route_answers_whoever_spoke(stack: ExitStack) -> None:
    server = listening(stack)
    one, two = (dialling(stack, server.address, identity) for identity in (b"one", b"two"))
    one.send(server.address, PING)
    two.send(server.address, m.Ping(src=7, dst=2))
    routes = {message.src: route for route, message in received(server, 2)}
    assert routes == {1: b"one/1".hex(), 7: b"two/1".hex()}
    server.send(routes[7], PONG)
    assert received(two, 1) == [(server.address, PONG)]
    assert one.receive(0) == []


def test_two_addresses_of_one_listener_are_two_routes_and_neither_is_deaf(stack: ExitStack) -> None:
    server = listening(stack, "tcp://0.0.0.0:0")
    port = server.address.rpartition(":")[2]
    one, two = f"tcp://127.0.0.1:{port}", f"tcp://127.0.0.2:{port}"
    client = dialling(stack, one)
    client.send(one, PING)
    first = received(server, 1)[0][0]
    client.connect(two)
    client.send(two, PING)
    second = received(server, 1)[0][0]
    for route in (first, second, first):
        server.send(route, PONG)
    assert sorted(received(client, 3)) == sorted([(one, PONG), (one, PONG), (two, PONG)])
    assert first != second
    assert all(speaks_for(route, b"client") for route in (first, second))


@pytest.mark.parametrize("called", [b"client2/1", b"clien/1", b"/1", b"/client", b"client2", b"\0\x01\x02\x03\x04"])
def test_nobody_speaks_for_one_that_is_called_otherwise(called: bytes) -> None:
    assert speaks_for(b"client/17".hex(), b"client")
    assert not speaks_for(called.hex(), b"client")


def test_garbage_is_counted_by_reason_and_what_follows_is_heard(stack: ExitStack) -> None:
    server = listening(stack)
    socket = stranger(stack, server.address)
    good = encode(PING)
    garbage = [
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        good[:-1],
        good[:4] + b"\x09" + good[5:],
        b"TFry\x01\0\0\0\0\0\0\0",
        os.urandom(500),
    ]
    for frame in garbage:
        socket.send(frame)
    socket.send_multipart([b"two", b"parts"])
    socket.send_multipart([good, good])
    socket.send(good)
    assert [message for _, message in received(server, 1)] == [PING]
    assert server.dropped == {"size": 1, "magic": 2, "checksum": 1, "version": 1, "content": 1, "parts": 2}


def test_a_frame_beyond_the_bound_never_arrives(stack: ExitStack) -> None:
    server = listening(stack)
    socket = stranger(stack, server.address)
    socket.send(bytes(control_module.MAX_FRAME_BYTES + 1))
    client = dialling(stack, server.address)
    client.send(server.address, PING)
    assert [message for _, message in received(server, 1)] == [PING]
    assert server.dropped == {}  # ZMQ ends that connection before the frame is in memory


def test_many_frames_take_turns_with_the_rest(stack: ExitStack) -> None:
    server = listening(stack)
    client = dialling(stack, server.address)
    for k in range(2 * MOST_FRAMES_A_TURN):
        client.send(server.address, m.Ping(src=k, dst=2))
    seen: list[int] = []
    deadline = time.monotonic() + PATIENCE_S
    while len(seen) < 2 * MOST_FRAMES_A_TURN and time.monotonic() < deadline:
        turn = server.receive(0.05)
        assert len(turn) <= MOST_FRAMES_A_TURN
        seen.extend(message.src for _, message in turn)
    assert seen == list(range(2 * MOST_FRAMES_A_TURN))  # in order, each once


def test_a_peer_that_is_not_there_costs_a_bounded_queue(stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_module, "QUEUE_FRAMES", 10)
    free = listening(stack)
    address = free.address
    free.close()
    client = dialling(stack, address)
    for _ in range(100):
        client.send(address, PING)
    assert client.dropped["queue full"] >= 80


def test_a_message_that_cannot_be_encoded_ends_nothing(stack: ExitStack) -> None:
    server = listening(stack)
    client = dialling(stack, server.address)
    client.send(server.address, m.Abort(src=1, dst=2, xfer=3, code="x", cause="\udcff"))
    client.send(server.address, m.Ping(src=object(), dst=2))  # type: ignore[arg-type]
    client.send(server.address, m.Ping(src=1 << 64, dst=2))
    client.send(server.address, PING)
    assert [message for _, message in received(server, 1)] == [PING]
    assert client.dropped == {"unencodable": 3}


@pytest.mark.parametrize("route", ["00ff", "tcp://nobody:1", "xyz", ""])
def test_a_route_that_does_not_exist_is_counted(stack: ExitStack, route: str) -> None:
    server, client = listening(stack), Control(b"client")
    stack.callback(client.close)
    for control in (server, client):
        control.send(route, PING)
        assert sum(control.dropped.values()) == 1


@pytest.mark.parametrize(
    "address", ["nonsense", "tcp://", "tcp://127.0.0.1", "tcp://127.0.0.1:99999", "http://x:1", "tcp://127.0.0.1:x"]
)
def test_what_is_no_address_is_a_config_error(stack: ExitStack, address: str) -> None:
    with pytest.raises(ConfigError, match=r"cannot bind|ports are"):
        Control(b"x", address)
    client = Control(b"client")
    stack.callback(client.close)
    with pytest.raises(ConfigError, match=r"no address|ports are"):
        client.connect(address)


def test_an_address_that_is_taken_is_a_config_error(stack: ExitStack) -> None:
    server = listening(stack)
    with pytest.raises(ConfigError, match="cannot bind"):
        Control(b"other", server.address)


def test_connecting_twice_is_connecting_once(stack: ExitStack) -> None:
    server = listening(stack)
    client = dialling(stack, server.address)
    client.connect(server.address)
    client.send(server.address, PING)
    assert len(received(server, 1)) == 1
    assert client.routes == (server.address,)


def test_a_successor_with_the_same_name_takes_over_the_route(stack: ExitStack) -> None:
    server = listening(stack)
    first = dialling(stack, server.address, b"same")
    first.send(server.address, PING)
    (route, _), *_ = received(server, 1)
    second = dialling(stack, server.address, b"same")
    second.send(server.address, m.Ping(src=9, dst=2))
    assert received(server, 1) == [(route, m.Ping(src=9, dst=2))]
    server.send(route, PONG)
    assert received(second, 1) == [(server.address, PONG)]


def test_wake_ends_a_wait_from_any_thread(stack: ExitStack) -> None:
    server = listening(stack)
    threading.Thread(target=server.wake).start()
    assert server.receive(PATIENCE_S * 4) == []  # without the wake: far longer than a test may take
    server.wake()
    server.wake()
    assert server.receive(PATIENCE_S * 4) == []


def test_closing_twice_is_closing_once_and_a_late_wake_does_nothing() -> None:
    server = Control(b"x", "tcp://127.0.0.1:0")
    server.close()
    server.close()
    server.wake()


def test_what_was_said_before_closing_still_leaves(stack: ExitStack) -> None:
    server = listening(stack)
    client = Control(b"client")
    client.connect(server.address)
    client.send(server.address, PING)
    client.close()
    assert [message for _, message in received(server, 1)] == [PING]


def test_only_this_host_is_bound_unless_told_otherwise(stack: ExitStack) -> None:
    import inspect

    from tensorferry.core.sending import Sender

    assert inspect.signature(Sender.__init__).parameters["bind"].default == "tcp://127.0.0.1:0"
    assert listening(stack).address.startswith("tcp://127.0.0.1:")


def test_routes_can_be_left_again_and_again(stack: ExitStack) -> None:
    """More than a context's usual 1023 sockets, one after the other, and nothing is left of them."""
    control = Control(b"client")
    stack.callback(control.close)
    files = len(os.listdir("/proc/self/fd"))
    for port in range(20_000, 21_200):
        control.connect(f"tcp://127.0.0.1:{port}")
        control.disconnect(f"tcp://127.0.0.1:{port}")
    assert control.routes == ()
    control.disconnect("tcp://127.0.0.1:1")
    deadline = time.monotonic() + PATIENCE_S
    while len(os.listdir("/proc/self/fd")) > files + 20:
        assert time.monotonic() < deadline
        control.receive(0.05)


def test_where_there_is_no_socket_for_another_address_the_error_is_typed(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    control = Control(b"client")
    stack.callback(control.close)

    def none_left(kind: int) -> None:
        raise zmq.ZMQError(24)

    monkeypatch.setattr(control, "_socket", none_left)
    with pytest.raises(Overloaded, match="no socket"):
        control.connect("tcp://127.0.0.1:20000")
    assert control.routes == ()


FEW_FILES = """
import os, resource, sys
from tensorferry.core.control import Control
from tensorferry.core.errors import Overloaded

resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
for left in range(24):
    child = os.fork()
    if not child:
        held = []
        try:
            while True:
                held.append(os.dup(0))
        except OSError:
            for fd in held[len(held) - left:]:
                os.close(fd)
        try:
            control = Control(b"x", sys.argv[1])
            print(left, "made", flush=True)
            if not sys.argv[1]:
                try:
                    while True:
                        held.append(os.dup(0))
                except OSError:
                    control.connect("tcp://127.0.0.1:1")
        except Overloaded as problem:
            print(left, "ulimit -n" in str(problem), flush=True)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status:
        print(left, "ended by", status, flush=True)
"""


@pytest.mark.parametrize("bind", ["tcp://127.0.0.1:0", ""])
def test_at_the_limit_of_open_files_the_error_is_typed_and_the_process_goes_on(bind: str) -> None:
    """With so many left, each in a process of its own: libzmq ends one in which its threads get no file."""
    done = subprocess.run(
        [sys.executable, "-c", FEW_FILES, bind], capture_output=True, text=True, timeout=PATIENCE_S, check=True
    )
    told = [line.split(maxsplit=1) for line in done.stdout.splitlines()]
    assert {what for left, what in told if int(left) < 16} == {"True"}, done.stdout + done.stderr
    assert [left for left, what in told if what == "made"] == [str(left) for left in range(16, 24)]
    assert {what for _, what in told} <= {"True", "made"}, done.stdout + done.stderr


def test_a_wait_of_less_than_a_millisecond_is_one(stack: ExitStack) -> None:
    """ZMQ counts in whole ones; a transport that does not wake us would be looked at five times too seldom."""
    server = listening(stack)
    took = []
    for _ in range(200):
        began = time.perf_counter()
        assert server.receive(BUSY_POLL) == []
        took.append(time.perf_counter() - began)
    assert BUSY_POLL <= min(took) < 0.0009


def test_what_comes_during_a_short_wait_is_found_by_it(stack: ExitStack) -> None:
    server = listening(stack)
    client = dialling(stack, server.address)
    client.send(server.address, PING)
    found: list[tuple[str, m.Message]] = []
    deadline = time.monotonic() + PATIENCE_S
    while not found and time.monotonic() < deadline:
        found = server.receive(BUSY_POLL)
    assert [message for _, message in found] == [PING]

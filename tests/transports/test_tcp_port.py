"""The port of a tcp transport under attack: nothing that a stranger sends crashes it, holds it up, or lands."""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Iterator

import msgspec
import pytest
from transport_ends import at, ended, eventually, filled

from tensorferry.backends import _tcp_harbor
from tensorferry.backends import _tcp_wire as wire
from tensorferry.backends.tcp import TcpOptions, TcpTransport
from tensorferry.core.transport import Copy, Region, Status

SIZE = 64 << 10
WRITER = b"w" * 16

pytestmark = pytest.mark.timeout(60)


class Scene:
    """A transport with two regions side by side in memory, of which peers were told one."""

    def __init__(self) -> None:
        self.owner = TcpTransport(TcpOptions())
        whole = self.owner.allocate(3 * SIZE)
        self.whole = whole
        self.region = self.owner.register(type(whole)(whole.address + SIZE, SIZE, "cpu", whole))
        self.told = msgspec.msgpack.decode(self.owner.describe(), type=wire.Descriptor)
        self.connections: list[socket.socket] = []
        self.writer = TcpTransport(TcpOptions())
        self.peer = self.writer.connect(self.owner.describe())

    def dial(self) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.told.port), timeout=20)
        self.connections.append(connection)
        return connection

    def hello(self, link: int = 0, incarnation: int = 1, token: bytes | None = None) -> socket.socket:
        connection = self.dial()
        connection.sendall(wire.pack_hello(wire.Hello(token or self.told.token, WRITER, link, incarnation)))
        return connection

    def welcomed(self, link: int = 0, incarnation: int = 1) -> socket.socket:
        connection = self.hello(link, incarnation)
        assert reply(connection) == (wire.Word.WELCOME, 0, self.told.instance)
        return connection

    def frame(self, nbytes: int, offset: int = 0, region: Region | None = None, part: int = 1, **more: int) -> bytes:
        target = region or self.region
        number, generation = more.get("id", target.id), more.get("generation", target.generation)
        return wire.pack_frame(wire.Frame(wire.Kind.PIECE, True, part, number, generation, offset, nbytes))

    def others_go_on(self) -> None:
        handle = self.writer.post(self.peer, [Copy(filled(self.writer, b"ok"), 0, at(self.region), 0, 2)])
        assert ended(self.writer, handle) is Status.DONE
        assert bytes(self.region.memory.view(0, 2)) == b"ok"
        self.region.memory.view()[:2] = b"\0\0"

    def untouched(self) -> bool:
        return not any(self.whole.view())


def reply(connection: socket.socket) -> tuple[int, int, bytes]:
    data = b""
    while len(data) < wire.REPLY_BYTES:
        more = connection.recv(wire.REPLY_BYTES - len(data))
        assert more, "the connection was ended"
        data += more
    return tuple(wire.unpack_reply(data))  # type: ignore[return-value]


def hung_up(connection: socket.socket) -> bool:
    """The other side ends the connection, with nothing more to say."""
    try:
        return connection.recv(1) == b""
    except ConnectionError:
        return True


def cut_off(connection: socket.socket, data: bytes) -> bool:
    """Goes on sending until it cannot."""
    try:
        for _ in range(10_000):
            connection.sendall(data)
    except ConnectionError:
        return True
    return False


@pytest.fixture
def scene() -> Iterator[Scene]:
    made = Scene()
    yield made
    for connection in made.connections:
        connection.close()
    made.writer.close()
    made.owner.close()


@pytest.mark.parametrize(
    "said",
    [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" + b"x" * 100, bytes(200), b"\xff" * 200, wire.MAGIC + b"\xff" * 200],
    ids=["http", "zeros", "ones", "our-magic"],
)
def test_garbage_is_dropped_and_counted(scene: Scene, said: bytes) -> None:
    connection = scene.dial()
    connection.sendall(said)
    assert hung_up(connection)
    eventually(lambda: scene.owner._harbor.dropped == 1)
    scene.others_go_on()


def test_another_token_is_dropped_and_never_answered(scene: Scene) -> None:
    assert hung_up(scene.hello(token=b"t" * 16))
    eventually(lambda: scene.owner._harbor.dropped == 1)
    scene.others_go_on()


def test_half_a_greeting_is_dropped_in_time(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tcp_harbor, "GREETING_TIMEOUT_S", 0.1)
    connection = scene.dial()
    connection.sendall(wire.MAGIC)
    assert hung_up(connection)
    scene.others_go_on()


def test_a_thousand_who_say_nothing_take_nobodys_place(scene: Scene) -> None:
    files = len(os.listdir("/proc/self/fd"))
    for _ in range(1000):
        scene.dial()
    eventually(lambda: scene.owner._harbor.dropped >= 1000 - _tcp_harbor.MAX_GUESTS)
    assert len(os.listdir("/proc/self/fd")) <= files + 1000 + _tcp_harbor.MAX_GUESTS + 10
    scene.others_go_on()
    late = TcpTransport(TcpOptions())
    try:
        handle = late.post(late.connect(scene.owner.describe()), [Copy(filled(late, b"l"), 0, at(scene.region), 9, 1)])
        assert ended(late, handle) is Status.DONE
    finally:
        late.close()


WRONG = {
    "past the end": {"offset": SIZE - 1, "nbytes": 2},
    "far past the end": {"offset": (1 << 64) - 1, "nbytes": 2},
    "longer than the region": {"offset": 0, "nbytes": SIZE + 1},
    "no such region": {"offset": 0, "nbytes": 2, "id": 7},
    "no such region by far": {"offset": 0, "nbytes": 2, "id": (1 << 64) - 1},
    "a later generation": {"offset": 0, "nbytes": 2, "generation": 99},
    "no generation": {"offset": 0, "nbytes": 2, "generation": 0},
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_what_lies_outside_a_live_region_is_refused_and_goes_nowhere(scene: Scene, wrong: dict[str, int]) -> None:
    """With our token, too. The connection goes on, and the next write is placed."""
    connection = scene.welcomed()
    connection.sendall(scene.frame(part=5, **wrong) + b"!" * wrong["nbytes"])
    assert reply(connection) == (wire.Word.REFUSED, 5, scene.told.instance)
    assert scene.untouched()
    connection.sendall(scene.frame(4, SIZE - 4, part=6) + b"last")
    assert reply(connection) == (wire.Word.PLACED, 6, scene.told.instance)
    assert bytes(scene.region.memory.view(SIZE - 4)) == b"last"


def test_a_retired_region_is_refused_in_the_middle_of_a_frame(scene: Scene) -> None:
    connection = scene.welcomed()
    connection.sendall(scene.frame(SIZE) + b"1" * 1000)
    view = scene.region.memory.view()
    eventually(lambda: view[999])
    scene.owner.retire(scene.region)
    connection.sendall(b"2" * (SIZE - 1000))
    assert reply(connection)[0] == wire.Word.REFUSED
    assert bytes(view) == b"1" * 1000 + bytes(SIZE - 1000)


@pytest.mark.parametrize(
    "said",
    [
        b"\xff" * wire.FRAME_BYTES,
        bytes(wire.FRAME_BYTES),
        wire.pack_frame(wire.Frame(1, True, 1, 0, 1, 0, wire.MAX_PIECE_BYTES + 1)),
        wire.pack_frame(wire.Frame(1, True, 1, 0, 1, 0, (1 << 64) - 1)),
        wire.pack_frame(wire.Frame(1, True, 1, 0, 1, 0, 0)),
        wire.pack_frame(wire.Frame(9, True, 1, 0, 1, 0, 0)),
        wire.pack_frame(wire.Frame(2, False, 1, 0, 1, 0, 0)),
        wire.pack_frame(wire.Frame(2, True, 1, 0, 1, 0, 5)),
    ],
    ids=["ones", "zeros", "too long", "huge", "empty", "kind 9", "abort without end", "abort with bytes"],
)
def test_a_frame_that_cannot_be_ends_its_connection_alone(scene: Scene, said: bytes) -> None:
    connection = scene.welcomed()
    connection.sendall(said)
    assert hung_up(connection)
    assert scene.untouched()
    scene.others_go_on()


def test_a_part_inside_another_ends_the_connection(scene: Scene) -> None:
    connection = scene.welcomed()
    connection.sendall(wire.pack_frame(wire.Frame(1, False, 1, scene.region.id, scene.region.generation, 0, 1)) + b"!")
    connection.sendall(scene.frame(1, part=2) + b"!")
    assert hung_up(connection)


def test_random_bytes_with_our_token_land_nowhere(scene: Scene) -> None:
    dice = random.Random(1)
    for link in range(40):
        connection = scene.welcomed(link)
        good = bytearray(scene.frame(8) + b"payload!")
        good[dice.randrange(8)] ^= 1 << dice.randrange(8)  # magic, kind, flags, or what must be zero
        connection.sendall(good + dice.randbytes(100))
        connection.close()
    scene.others_go_on()
    assert not any(scene.whole.view(0, SIZE))
    assert not any(scene.whole.view(2 * SIZE))


def test_who_reads_no_replies_is_cut_off(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tcp_harbor, "MAX_UNSENT_BYTES", 4096)
    connection = scene.hello()
    many = (scene.frame(1) + b"!") * 1000
    assert cut_off(connection, many)
    scene.others_go_on()


def test_a_later_connection_of_a_link_ends_the_earlier_one_and_then_is_welcome(scene: Scene) -> None:
    """What the writer takes for its fence."""
    first = scene.welcomed(link=3, incarnation=1)
    first.sendall(scene.frame(SIZE) + b"1" * 1000)
    view = scene.region.memory.view()
    eventually(lambda: view[999])
    scene.welcomed(link=3, incarnation=2)
    assert cut_off(first, b"2" * 1000)
    assert bytes(view) == b"1" * 1000 + bytes(SIZE - 1000)


def test_an_earlier_connection_that_comes_late_is_not_welcome(scene: Scene) -> None:
    connection = scene.welcomed(link=3, incarnation=2)
    assert hung_up(scene.hello(link=3, incarnation=1))
    assert hung_up(scene.hello(link=3, incarnation=2))
    connection.sendall(scene.frame(2) + b"ok")
    assert reply(connection)[0] == wire.Word.PLACED

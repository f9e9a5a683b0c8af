"""Garbage on the control ports while transfers go on: counted, never fatal, never bytes in the wrong place."""

from __future__ import annotations

import os
import random
import socket
import struct
import threading
import zlib
from typing import Any

import msgspec
import pytest
import zmq
from scenario_kit import PATIENCE, SMALL, Quay, assert_same, eventually, rows

from tensorferry.core import messages as m
from tensorferry.core import wire

SIZES: dict[str, Any] = {"layout": SMALL, "block_size": 16, "pool_blocks": 8, "first_grant": 64}
HUGE = (1 << 63) - 1


def framed(payload: bytes) -> bytes:
    return struct.pack("<4sB3xI", b"TFry", 1, zlib.crc32(payload)) + payload


def random_frames(dice: random.Random) -> list[bytes]:
    good = wire.encode(m.Ping(src=1, dst=2))
    damaged = bytearray(good)
    damaged[dice.randrange(len(damaged))] ^= 1 << dice.randrange(8)
    return [
        b"", b"x", os.urandom(dice.randrange(2000)), good[:-1], good + b"x", bytes(damaged), b"TFry" + os.urandom(40),
        framed(os.urandom(dice.randrange(200))), framed(b"\xdd\xff\xff\xff\xff"), framed(b"\xc6\xff\xff\xff\xff"),
        framed(b"\x91" * 100_000), framed(msgspec.msgpack.encode(["G", 1, 2, 3])),
        framed(msgspec.msgpack.encode(["ZZ", 1, 2])), framed(msgspec.msgpack.encode(["I", -1, 2**64 - 1])),
        framed(msgspec.msgpack.encode(["I", "1", "2"])), framed(msgspec.msgpack.encode({"a": 1})),
    ]  # fmt: skip


def hello(**change: Any) -> m.Hello:
    plain = m.Hello(
        src=HUGE, dst=0, min_live=1, version=m.PROTOCOL_VERSION, name="stranger", layout=SMALL.fingerprint,
        block_size=16, pool_blocks=8, slabs=8, generations=m.pack_generations([1] * 8),
        offers=(m.Offer("memory", 1, "memcpy", b"\x00" * 100, bytes(64)),), revision=1, ack=0,
    )  # fmt: skip
    return msgspec.structs.replace(plain, **change)


def absurd_messages(to: int) -> list[m.Message]:
    """Well-formed, and of no sense."""
    about = {"src": HUGE, "dst": to, "min_live": 1, "xfer": 1}
    most = (1 << 32) - 1
    return [
        hello(), hello(pool_blocks=most, slabs=most, generations=b""), hello(generations=b"abc", revision=2),
        hello(slabs=0, pool_blocks=0), hello(block_size=0), hello(offers=(), revision=3),
        hello(offers=(m.Offer("shm", 1, "", os.urandom(60_000), b"torn"),), revision=4),
        hello(pool_blocks=most, slabs=1, revision=5),
        m.Open(**about, room=HUGE, rank=4095, ranks=4096, dummy=False),
        m.Open(**about, room=1, rank=3, ranks=1, dummy=True), m.Open(**about, room=1, rank=0, ranks=1, dummy=False),
        m.Grant(**about, epoch=most, prefix=most, runs=m.pack_grant([(most, most, most, most)])),
        m.Grant(**about, epoch=1, prefix=0, runs=m.pack_grant([(k * 1000, 0, 8, 1) for k in range(4000)])),
        m.Grant(**about, epoch=2, prefix=0, runs=b"torn"), m.Revoke(**about, upto=most),
        m.Complete(**about, ok=True, code="", cause=""),
        m.Complete(**about, ok=False, code="no such", cause="x" * 1024),
        m.Close(**{**about, "xfer": HUGE}, code="", cause=""), m.Admitted(**about), m.Ping(src=HUGE, dst=to),
        m.Query(src=HUGE, dst=to, xfer=1, room=1, rank=1, ranks=2, heard=False, code="x", cause=""),
        m.Verdict(src=HUGE, dst=to, xfer=1, run=True, code="", cause=""),
        m.Announce(src=HUGE, dst=to, xfer=1, total=(1 << 48) - 1, content_id=bytes(16), present=most, aux=bytes(128),
                   integrity="nothing", ready=0, via="x"),
        m.Done(src=HUGE, dst=to, xfer=1, epoch=1, runs=m.pack_done([(0, most)]), digests=b"", path=""),
        m.Done(src=HUGE, dst=to, xfer=1, epoch=1, runs=m.pack_done([(0, 1)]), digests=b"12345678", path="x"),
        m.Fenced(src=HUGE, dst=to, xfer=1, upto=most), m.Commit(src=HUGE, dst=to, xfer=1),
        m.Abort(src=HUGE, dst=to, xfer=1, code="", cause=""),
    ]  # fmt: skip


def throw(address: str, frames: list[bytes], parts: int = 1, identity: bytes = b"") -> None:
    context: zmq.Context[Any] = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    if identity:
        dealer.setsockopt(zmq.ROUTING_ID, identity)
    dealer.setsockopt(zmq.LINGER, 2000)
    dealer.connect(address)
    for frame in frames:
        dealer.send_multipart([frame] * parts)
    dealer.close()
    context.term()


class Thrower:
    """Throws everything at an address, again and again, until the `with` block ends; at least once. `introduced`: also
    as an endpoint would, under the name that its messages say."""

    def __init__(self, address: str, to: int, introduced: bool = False) -> None:
        self.rounds = 0
        self._introduced = introduced
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(address, to))

    def _run(self, address: str, to: int) -> None:
        dice = random.Random(5)
        while self.rounds == 0 or not self._stop.is_set():
            throw(address, random_frames(dice))
            throw(address, [b"a", b"b"], parts=3)
            nonsense = [wire.encode(message) for message in absurd_messages(to)]
            throw(address, nonsense)
            if self._introduced:
                throw(address, nonsense, identity=f"{HUGE:016x}/1".encode())
            self.rounds += 1

    def __enter__(self) -> Thrower:
        self._thread.start()
        return self

    def __exit__(self, *rest: object) -> None:
        self._stop.set()
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()
        assert self.rounds


def test_a_sender_under_garbage_serves_its_rooms(kind: str) -> None:
    with Quay(kind, **SIZES, clean=False) as quay:
        with Thrower(quay.sender.address, quay.sender.incarnation, introduced=True) as thrower:
            for room in range(100, 120):
                quay.carry(1000, room=room, seed=room)
            eventually(lambda: thrower.rounds > 1)
        eventually(lambda: not quay.sender._call(lambda: quay.sender.machine.writes))
        dropped = quay.sender._call(lambda: dict(quay.sender._control.dropped))
        assert {"size", "magic", "checksum", "content", "parts", "identity"} <= set(dropped)
        quay.carry(1000)
        assert quay.receiver.free_blocks == 8
        assert not quay.receiver.stale_writes


def test_a_leader_under_garbage_decides_for_its_group(kind: str) -> None:
    with Quay(kind, **SIZES, ranks=2) as quay, Thrower(quay.receiver.leader_address, quay.receiver.incarnation):
        for room in range(100, 110):
            given = rows(500, room, SMALL)
            receiving = [quay.receive(room, rank) for rank in range(2)]
            quay.sender.send(room, **given).wait(PATIENCE)
            for transfer in receiving:
                assert_same(transfer.result(PATIENCE), given)


def test_a_receiver_whose_sender_talks_nonsense_serves_its_other_rooms(kind: str) -> None:
    """A ROUTER that answers every Hello with everything that makes no sense."""
    context: zmq.Context[Any] = zmq.Context()
    router = context.socket(zmq.ROUTER)
    router.bind("tcp://127.0.0.1:0")
    router.setsockopt(zmq.LINGER, 0)
    stop = threading.Event()

    def talk(to: int) -> None:
        dice = random.Random(6)
        while not stop.is_set():
            if not router.poll(20):
                continue
            route = router.recv_multipart()[0]
            said = [*random_frames(dice), *(wire.encode(message) for message in absurd_messages(to))]
            for frame in said:
                router.send_multipart([route, frame])

    with Quay(kind, **SIZES, heartbeat=0.1, peer_timeout=1.0) as quay:
        thread = threading.Thread(target=talk, args=(quay.receiver.incarnation,))
        thread.start()
        try:
            nonsense = quay.receiver.receive(1, router.getsockopt_string(zmq.LAST_ENDPOINT))
            for room in range(100, 110):
                quay.carry(1000, room=room, seed=room)
            with pytest.raises(Exception, match=r".") as raised:
                nonsense.wait(PATIENCE)
            assert raised.value is nonsense.error
        finally:
            stop.set()
            thread.join(PATIENCE)
            router.close()
            context.term()


def test_an_oversized_frame_costs_its_sender_the_connection_and_nobody_else_anything(kind: str) -> None:
    with Quay(kind, **SIZES) as quay:
        throw(quay.sender.address, [bytes(wire.MAX_FRAME_BYTES + 1)])
        quay.carry(1000)


def test_bytes_that_are_no_zmq_at_all_are_nothing(kind: str) -> None:
    with Quay(kind, **SIZES) as quay:
        host, port = quay.sender.address.removeprefix("tcp://").rsplit(":", 1)
        for junk in (b"GET / HTTP/1.1\r\n\r\n", os.urandom(500), b"\xff" * 64):
            with socket.create_connection((host, int(port))) as connection:
                connection.sendall(junk)
        quay.carry(1000)

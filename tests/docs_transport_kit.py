"""What the contract asks of the example transport, each behaviour run in a process that has it installed."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable

from tensorferry.core.errors import BadCall, FerryError, OutOfBounds, ProtocolViolation, Unsupported
from tensorferry.core.memory import Memory
from tensorferry.core.transport import Copy, PeerState, Region, RemoteRegion, Status, Transport
from tensorferry.plugins import registry


def opened() -> Transport:
    return registry.open_transport("file")


def at(region: Region) -> RemoteRegion:
    return RemoteRegion(region.id, region.generation)


def ended(transport: Transport, handle: int) -> Status:
    deadline = time.monotonic() + 30
    while not transport.drained(handle):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return transport.poll(handle)


def refuses(error: type[FerryError], call: Callable[[], object]) -> None:
    try:
        call()
    except error:
        return
    raise AssertionError(f"not refused with {error.__name__}")


def filled(transport: Transport, data: bytes) -> Memory:
    memory = transport.allocate(len(data))
    memory.view()[:] = data
    return memory


def behaves_done_means_that_the_bytes_are_in_place() -> None:
    owner, writer = opened(), opened()
    region = owner.register(owner.allocate(10 << 20))
    data = os.urandom(9 << 20)
    handle = writer.post(writer.connect(owner.describe()), [Copy(filled(writer, data), 0, at(region), 4096, len(data))])
    assert ended(writer, handle) is Status.DONE
    assert bytes(region.memory.view(4096, len(data))) == data
    assert bytes(region.memory.view(0, 4096)) == bytes(4096)
    writer.release(handle)
    refuses(BadCall, lambda: writer.poll(handle))
    owner.close(), writer.close()


def behaves_a_wrong_copy_is_refused_before_a_byte_moves() -> None:
    owner, writer = opened(), opened()
    region = owner.register(owner.allocate(4096))
    peer, source = writer.connect(owner.describe()), filled(writer, b"x" * 64)
    good = Copy(source, 0, at(region), 0, 64)
    for wrong in (
        Copy(source, 1, at(region), 0, 64),
        Copy(source, 0, at(region), 4033, 64),
        Copy(source, 0, at(region), -1, 64),
        Copy(source, 0, at(region), 1 << 62, 64),
        Copy(source, 0, at(region), 0, 0),
        Copy(source, 0, RemoteRegion(region.id + 1, region.generation), 0, 64),
        Copy(source, 0, RemoteRegion(region.id, region.generation + 1), 0, 64),
    ):
        refuses(OutOfBounds, lambda wrong=wrong: writer.post(peer, [good, wrong]))
    refuses(BadCall, lambda: writer.post(peer, []))
    refuses(Unsupported, lambda: writer.post(peer, [good] * (writer.capabilities.max_copies + 1)))
    refuses(Unsupported, lambda: owner.register(Memory(4096, 4096, "cuda")))
    assert ended(writer, writer.post(peer, [Copy(source, 0, at(region), 4095, 1)])) is Status.DONE
    assert bytes(region.memory.view(0, 4095)) == bytes(4095)
    owner.close(), writer.close()


def behaves_a_retired_region_takes_no_new_writes_and_its_memory_stays() -> None:
    owner, writer = opened(), opened()
    region = owner.register(owner.allocate(4096))
    peer, source = writer.connect(owner.describe()), filled(writer, b"x" * 8)
    before = owner.describe()
    owner.retire(region)
    owner.retire(region)
    fresh = owner.register(owner.allocate(4096))
    assert (fresh.id, fresh.generation > region.generation) == (region.id, True)
    assert writer.connect(owner.describe()) is peer
    assert writer.connect(before) is peer  # older: changes nothing
    refuses(OutOfBounds, lambda: writer.post(peer, [Copy(source, 0, at(region), 0, 8)]))
    assert ended(writer, writer.post(peer, [Copy(source, 0, at(fresh), 0, 8)])) is Status.DONE
    assert (bytes(region.memory.view(0, 8)), bytes(fresh.memory.view(0, 8))) == (bytes(8), b"x" * 8)
    owner.close(), writer.close()


def behaves_what_is_no_descriptor_is_refused() -> None:
    transport = opened()
    good = transport.describe()
    for wrong in (b"", b"\xff", b"x" * 100_000, good[:-1], good + b"x"):
        refuses(ProtocolViolation, lambda wrong=wrong: transport.connect(wrong))
    transport.close()


def behaves_a_peer_is_gone_only_when_it_has_ended() -> None:
    transport = opened()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        mine = opened()
        region = mine.register(mine.allocate(4096))
        os.write(writing, bytes([region.id, region.generation]) + mine.describe())
        signal.pause()
    message = os.read(reading, 65536)
    peer = transport.connect(message[2:])
    assert transport.peer_state(peer) is PeerState.ALIVE
    os.kill(child, signal.SIGSTOP)
    assert transport.peer_state(peer) is PeerState.ALIVE  # silence is not death
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert transport.peer_state(peer) is PeerState.GONE
    transport.close()
    opened().close()  # sweeps what the child has left


def behaves_close_ends_everything_and_answers_still() -> None:
    owner, writer = opened(), opened()
    region = owner.register(owner.allocate(4096))
    peer = writer.connect(owner.describe())
    handle = writer.post(peer, [Copy(filled(writer, b"x"), 0, at(region), 0, 1)])
    assert ended(writer, handle) is Status.DONE
    writer.close()
    writer.close()
    assert writer.poll(handle) is Status.DONE
    refuses(BadCall, lambda: writer.post(peer, []))
    watching = opened()
    seen = watching.connect(owner.describe())
    owner.close()
    assert watching.peer_state(seen) is PeerState.GONE
    watching.close()


if __name__ == "__main__":
    globals()[sys.argv[1]]()

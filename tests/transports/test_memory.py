"""What is special about the memory transport: one process, and a close that keeps writers out."""

from __future__ import annotations

import threading

import msgspec
import pytest
from transport_ends import OPENERS, REGION_BYTES, at, ended, eventually, filled

from tensorferry.backends import _copier, _hostcopy
from tensorferry.core.errors import PeerUnreachable, TransportMismatch
from tensorferry.core.transport import Copy, PeerState, Status


def test_an_endpoint_of_another_process_is_a_mismatch_that_says_what_helps() -> None:
    transport = OPENERS["memory"]()
    fields = msgspec.msgpack.decode(transport.describe())
    fields[2] = bytes(16)
    with pytest.raises(TransportMismatch, match=r"one process.*shm"):
        transport.connect(msgspec.msgpack.encode(fields))
    transport.close()


@pytest.mark.parametrize("how", ["closed", "never there"])
def test_an_instance_that_is_not_there_is_unreachable(how: str) -> None:
    there, here = OPENERS["memory"](), OPENERS["memory"]()
    fields = msgspec.msgpack.decode(there.describe())
    if how == "never there":
        fields[3] = bytes(16)
    there.close()
    with pytest.raises(PeerUnreachable):
        here.connect(msgspec.msgpack.encode(fields))
    here.close()


def test_close_waits_for_the_chunk_inside_and_lets_no_other_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the owner's close nothing lands: its memory may be somebody else's by then."""
    monkeypatch.setattr(_copier, "CHUNK_BYTES", 1024)
    inside, go = threading.Event(), threading.Event()
    original = _copier.memmove

    def held(destination: int, source: int, nbytes: int) -> object:
        inside.set()
        assert go.wait(30)
        return original(destination, source, nbytes)

    monkeypatch.setattr(_copier, "memmove", held)
    owner, writer = OPENERS["memory"](), OPENERS["memory"]()
    region = owner.register(owner.allocate(REGION_BYTES))
    peer = writer.connect(owner.describe())
    source = filled(writer, b"x" * REGION_BYTES)
    handles = [writer.post(peer, [Copy(source, 0, at(region), 0, REGION_BYTES)]) for _ in range(2)]
    assert inside.wait(30)

    closing = threading.Thread(target=owner.close)
    closing.start()
    eventually(lambda: not peer.there.open)
    assert closing.is_alive()
    assert writer.peer_state(peer) is not PeerState.GONE
    go.set()
    closing.join()

    region.memory.view()[:] = b"y" * REGION_BYTES
    assert [ended(writer, handle) for handle in handles] == [Status.FAILED] * 2
    assert bytes(region.memory.view()) == b"y" * REGION_BYTES
    assert writer.peer_state(peer) is PeerState.GONE
    writer.close()


def test_close_does_not_wait_for_ever_for_a_writer_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tensorferry.backends.memory.CLOSE_TIMEOUT_S", 0.05)
    monkeypatch.setattr(_hostcopy, "CLOSE_TIMEOUT_S", 0.05)
    owner = OPENERS["memory"]()
    there = owner.connect(owner.describe()).there
    assert there.enter()
    owner.close()
    there.leave()
    assert not there.enter()

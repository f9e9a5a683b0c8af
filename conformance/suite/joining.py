"""CON: descriptors, and the peers that they name."""

from __future__ import annotations

import pickletools
import tempfile
from functools import partial
from pathlib import Path

from tensorferry.conformance.model import check
from tensorferry.conformance.patterns import GUARD
from tensorferry.conformance.stage import Stage, at
from tensorferry.core.errors import (
    BadCall,
    FerryError,
    OutOfBounds,
    PeerUnreachable,
    ProtocolViolation,
    TransportMismatch,
    VersionMismatch,
)
from tensorferry.core.transport import MAX_DESCRIPTOR_BYTES, Copy, Region, Status

TYPED = (ProtocolViolation, VersionMismatch, PeerUnreachable, TransportMismatch)


@check("CON-1", joined=False)
def bounded_bytes(stage: Stage) -> None:
    transport = stage.open()
    for count in range(65):
        descriptor = transport.describe()
        stage.expect(isinstance(descriptor, bytes), f"describe answered a {type(descriptor).__name__}")
        size = len(descriptor)
        stage.expect(size <= MAX_DESCRIPTOR_BYTES, f"with {count} regions the descriptor has {size} bytes")
        transport.register(transport.allocate(4096))
    stage.note("bytes with 64 regions", size)


@check("CON-2", joined=False)
def changes_with_regions(stage: Stage) -> None:
    transport = stage.open()
    told = [transport.describe()]
    region = stage.region(transport, 4096)
    told.append(transport.describe())
    stage.expect(told[1] != told[0], "the descriptor did not change when a region was registered")
    transport.retire(region)
    told.append(transport.describe())
    stage.expect(told[2] != told[1], "the descriptor did not change when a region was retired")


@check("CON-3")
def follows_new_descriptors(stage: Stage) -> None:
    pair = stage.pair()
    retired: list[Region] = []
    for count in range(1, 7):
        region = stage.region(pair.owner, 4096)
        peer = pair.writer.connect(pair.owner.describe())
        stage.expect(
            peer is pair.peer or peer == pair.peer, "a newer descriptor of the same transport gave another peer"
        )
        data = stage.pattern(100, count)
        pair.done(pair.post(data, region=region), f"a post to region {count}, told by a newer descriptor,")
        pair.placed(data, region=region, what=f"a post to region {count}, told by a newer descriptor,")
        stage.sealed(*retired, after=f"they were retired, and region {count} was written to, in retired regions")
        if count % 2 == 0:  # the next may have its id
            pair.owner.retire(region)
            stage.seal(region)
            retired.append(region)


@check("CON-4")
def ignores_old_descriptors(stage: Stage) -> None:
    pair = stage.pair()
    gone = pair.target(4096)
    old = pair.owner.describe()
    pair.owner.retire(gone)
    fresh = pair.target(4096)
    peer = pair.writer.connect(old)
    stage.expect(peer is pair.peer, "an older descriptor of the same transport gave another peer")
    answer = stage.attempt(lambda: pair.post(b"fresh", region=fresh), "post")
    if isinstance(answer, FerryError):
        stage.fail(f"an older descriptor took a region back that a newer one had told: {answer}")
    pair.done(answer)
    pair.placed(b"fresh", region=fresh)
    stage.refused(lambda: pair.post(b"x", region=gone), OutOfBounds, what="a post to a region that an older one names")


@check("CON-5", joined=False)
def refuses_garbage(stage: Stage) -> None:
    transport = stage.open()
    good = transport.describe()
    garbage = [b"", b"\0", b"\xff" * 16, b"null", b"{}", b"[]", b"\xc0", b"\x90", b"x" * MAX_DESCRIPTOR_BYTES]
    garbage += [b"\0" * (MAX_DESCRIPTOR_BYTES + 1), good * (1 + (MAX_DESCRIPTOR_BYTES // len(good)))]
    garbage += [b"\x91" * 5000, b"[" * 5000]  # nested too deep for a decoder that recurses
    garbage += [stage.random.randbytes(stage.random.randrange(1, 300)) for _ in range(stage.times(20, 200, 5000))]
    for data in garbage:
        what = f"connect with {len(data)} bytes that are no descriptor ({data[:12]!r}…)"
        stage.refused(partial(transport.connect, data), ProtocolViolation, what=what)


@check("CON-6", seconds=60)
def survives_damage(stage: Stage) -> None:
    pair = stage.pair()
    stage.region(pair.owner, 4096)
    good = pair.owner.describe()
    writer = stage.open()
    for cut in {0, 1, len(good) // 2, len(good) - 1, *(stage.random.randrange(len(good)) for _ in range(10))}:
        what = f"connect with the first {cut} of a descriptor's {len(good)} bytes"
        stage.refused(partial(writer.connect, good[:cut]), *TYPED, what=what)
    for _ in range(stage.times(50, 300, 5000)):
        damaged = bytearray(good)
        place = stage.random.randrange(len(good))
        damaged[place] ^= 1 << stage.random.randrange(8)
        what = f"connect with byte {place} of a descriptor changed to {damaged[place]:#04x}"
        answer = stage.attempt(partial(writer.connect, bytes(damaged)), what)
        if isinstance(answer, FerryError):
            stage.expect(isinstance(answer, TYPED), f"{what} raised {answer!r}; expected one of connect's errors")
        else:
            writer.disconnect(answer)
    peer = writer.connect(good)
    source = stage.source(writer, data := stage.pattern(100))
    stage.done(
        writer, writer.post(peer, [Copy(source, 0, at(pair.region), 0, 100)]), "a post after damaged descriptors"
    )
    pair.flush()
    pair.placed(data)


@check("CON-7", joined=False)
def refuses_other_versions(stage: Stage) -> None:
    if not stage.hooks.has("other_version"):
        stage.unknown("needs the hook other_version: the suite does not know where a descriptor has its version")
    transport = stage.open()
    other = stage.hooks.other_version(transport.describe())
    what = "connect with a descriptor of another version"
    stage.refused(lambda: stage.open().connect(other), VersionMismatch, what=what)


def _trap(protocol: int, path: Path) -> bytes:
    """A pickle that makes a directory when it is loaded. By hand: nothing that ships imports pickle."""
    head = bytes([0x80, protocol]) if protocol else b""
    return head + b"cos\nmkdir\n(V" + str(path).encode() + b"\ntR."


@check("CON-8", joined=False)
def loads_no_pickle(stage: Stage) -> None:
    transport = stage.open()
    stage.region(transport, 4096)
    descriptor = transport.describe()
    try:
        operations = [name.name for name, _, _ in pickletools.genops(descriptor)]
    except Exception:  # noqa: BLE001 - whatever the parser says, it is no pickle
        operations = []
    stage.expect(not operations, f"the descriptor is a pickle ({', '.join(operations[:5])}, …)")
    with tempfile.TemporaryDirectory() as folder:
        for protocol in (0, 2, 3, 4, 5):
            sprung = Path(folder, str(protocol))
            data = _trap(protocol, sprung)
            stage.attempt(partial(transport.connect, data), "connect with a pickle")
            stage.expect(
                not sprung.exists(), f"connect loaded a pickle (protocol {protocol}): it ran what the pickle says"
            )


@check("CON-9")
def forgets_peers(stage: Stage) -> None:
    pair = stage.pair()
    pair.done(pair.post(b"before"))
    pair.region.memory.view()[:] = bytes([GUARD]) * 4096
    for _ in range(3):
        pair.writer.disconnect(pair.peer)
    stage.refused(lambda: pair.post(b"after"), BadCall, what="a post to a peer that was disconnected")
    stage.settle()
    stage.expect(pair.read(0, 6) == bytes([GUARD]) * 6, "a refused post to a disconnected peer wrote")


@check("CON-10")
def knows_its_own_peers(stage: Stage) -> None:
    pair = stage.pair()
    other = stage.open()
    source = stage.source(other, b"x")
    copies = [Copy(source, 0, at(pair.region), 0, 1)]
    for name, peer in (("another instance's peer", pair.peer), ("None", None), ("a str", "peer")):
        stage.refused(partial(other.post, peer, copies), BadCall, what=f"post to {name}")
        stage.refused(partial(other.peer_state, peer), BadCall, what=f"peer_state of {name}")


@check("CON-11")
def keeps_handles_after_disconnect(stage: Stage) -> None:
    pair = stage.pair(8 << 20)
    data = stage.pattern(8 << 20)
    handle = pair.post(data)
    pair.writer.disconnect(pair.peer)
    status = pair.end(handle, 20)
    stage.note("ended", status.name)
    if status is Status.DONE:
        pair.flush()
        pair.placed(data, what="what was posted before disconnect")


@check("CON-12")
def comes_back(stage: Stage) -> None:
    pair = stage.pair()
    for count in range(stage.times(2, 5, 50)):
        pair.writer.disconnect(pair.peer)
        pair.reconnect()
        data = stage.pattern(100, count)
        pair.done(pair.post(data), "a post to a peer that was disconnected and connected again")
        pair.placed(data)


@check("CON-13", seconds=90)
def refuses_the_dead(stage: Stage) -> None:
    owner, writer = stage.open(), stage.open()
    region = stage.own_target(owner, 4096)
    descriptor = owner.describe()
    owner.close()
    peer = stage.attempt(lambda: writer.connect(descriptor), "connect to a transport that has closed")
    if isinstance(peer, FerryError):
        stage.expect(isinstance(peer, TYPED), f"connect to a transport that has closed raised {peer!r}")
        return
    copies = [Copy(stage.source(writer, b"x"), 0, at(region), 0, 1)]
    answer = stage.attempt(lambda: writer.post(peer, copies), "a post to a transport that has closed")
    if isinstance(answer, FerryError):
        return
    status = stage.end(writer, answer, 60)
    stage.expect(status is not Status.DONE, "a post to a transport that had closed before it was connected ended DONE")

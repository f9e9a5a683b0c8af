"""The mooncake transport over real verbs, through the Transport interface alone: one device, two processes, every byte.

    python tests/rdma/mooncake_over_verbs.py

A program, not a test for pytest: it runs where RDMA is, which may be an emulated machine in which importing torch takes
half a minute. So it imports none, nor numpy. It prints a line for each step, and at the end one line of JSON with `ok`
and `path`; it exits 0 when all is as it should be, else 1.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import IO, Any

import msgspec

from tensorferry.backends._mooncake_wire import Descriptor
from tensorferry.backends.mooncake import MooncakeOptions, MooncakeTransport
from tensorferry.core.errors import OutOfBounds, TransportError
from tensorferry.core.transport import Copy, PeerState, Region, RemoteRegion, Status, Transport

Open = Callable[[], Transport]

REGION = 8 << 20
PATIENCE_S = 120.0
OPTIONS = MooncakeOptions(require="rdma", contact_timeout=60.0, transfer_timeout=60)


def say(text: str) -> None:
    print(f"{time.monotonic() - BEGAN:7.2f} s  {text}", flush=True)


BEGAN = time.monotonic()


class Target:
    """The process that is written to."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, sys.argv[0], "target"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        told = self._hear()
        self.descriptor = bytes.fromhex(told["descriptor"])
        self.region = RemoteRegion(*told["region"])

    def _hear(self) -> dict[str, Any]:
        line = _pipe(self.process.stdout).readline()
        if not line:
            raise SystemExit(f"the target ended with {self.process.wait()}")
        return dict(json.loads(line))

    def read(self, offset: int, nbytes: int) -> bytes:
        stdin = _pipe(self.process.stdin)
        stdin.write(json.dumps([offset, nbytes]) + "\n")
        stdin.flush()
        return bytes.fromhex(self._hear()["data"])

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def _pipe(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream


def be_target(open_one: Open) -> None:
    transport = open_one()
    region = transport.register(transport.allocate(REGION))
    told = {"descriptor": transport.describe().hex(), "region": [region.id, region.generation]}
    print(json.dumps(told), flush=True)
    for line in sys.stdin:
        offset, nbytes = json.loads(line)
        print(json.dumps({"data": bytes(region.memory.view(offset, nbytes)).hex()}), flush=True)
    transport.close()


class Check:
    wire: type[msgspec.Struct] = Descriptor

    def __init__(self, open_one: Open) -> None:
        self.transport = open_one()
        self.source: Region = self.transport.register(self.transport.allocate(REGION))
        self.done: list[str] = []

    def expect(self, holds: bool, what: str) -> None:
        say(f"{'ok    ' if holds else 'FAILED'}  {what}")
        if not holds:
            raise SystemExit(what)
        self.done.append(what)

    def ended(self, handle: int) -> Status:
        deadline = time.monotonic() + PATIENCE_S
        while (status := self.transport.poll(handle)) is Status.PENDING:
            if time.monotonic() > deadline:
                raise SystemExit(f"a post did not end within {PATIENCE_S:g} s")
            time.sleep(0.001)
        return status

    def write(self, target: Target, peer: Any, pieces: list[tuple[int, int, int]], what: str) -> None:
        """Write (source offset, target offset, bytes) each with fresh random bytes, and compare all of the region."""
        view = self.source.memory.view()
        view[:] = random.Random(what).randbytes(REGION)
        expected = bytearray(target.read(0, REGION))
        for here, there, nbytes in pieces:
            expected[there : there + nbytes] = view[here : here + nbytes]
        began = time.monotonic()
        copies = [Copy(self.source, here, target.region, there, nbytes) for here, there, nbytes in pieces]
        handle = self.transport.post(peer, copies)
        status, took = self.ended(handle), time.monotonic() - began
        self.transport.release(handle)
        same = target.read(0, REGION) == bytes(expected)
        self.expect(status is Status.DONE and same, f"{what}: {status.name}, every byte as it should be ({took:.3f} s)")

    def run(self) -> None:
        self.expect(self.transport.path() == "rdma", f"this side's path is {self.transport.path()}")
        target = Target()
        peer = self.transport.connect(target.descriptor)
        self.expect(self.transport.path(peer) == "rdma", "the path to the peer is rdma")
        for nbytes in (1, 4096, 65_537, 1 << 20, (4 << 20) + 123, REGION):
            self.write(target, peer, [(0, 0, nbytes)], f"{nbytes} bytes")
        adjacent = [(n * 8192, 65_536 + n * 8192, 8192) for n in range(64)]
        self.write(target, peer, adjacent, "64 adjacent copies")
        slots = random.Random(1).sample(range(REGION // 16_384), 40)
        scattered = [(n * 20_000, slot * 16_384, 5000 + n) for n, slot in enumerate(slots)]
        self.write(target, peer, scattered, "40 scattered copies")
        self.refusals(target, peer)
        self.write(target, peer, [(5, 9, 100_000)], "a write after the refused ones")
        self.killed(target, peer)
        self.transport.close()

    def refusals(self, target: Target, peer: Any) -> None:
        beyond = [Copy(self.source, 0, target.region, REGION - 10, 11)]
        self.expect(
            self.refused(peer, beyond, OutOfBounds), "a copy past the end of the region is refused before a byte moves"
        )
        # The same past our own check, by a descriptor that lies.
        liar = self.connect_as(target, regions=[(target.region.id, target.region.generation, REGION + 4096)])
        handle = self.transport.post(liar, [Copy(self.source, 0, target.region, REGION, 4096)])
        self.past_the_registration(self.ended(handle), handle)

    def past_the_registration(self, status: Status, handle: int) -> None:
        """The device has to refuse it."""
        self.expect(
            status is Status.UNKNOWN and not self.transport.drained(handle),
            f"a write past the registration is not done: {status.name}",
        )

    def killed(self, target: Target, peer: Any) -> None:
        """To the peer whose end the kernel proves a post is refused. Of a peer on another host nothing is proved."""
        abroad = self.connect_as(target, host=["another host", 1, 1, 1])
        self.write(target, abroad, [(0, 0, 4096)], "a write to the same engine as if on another host")
        target.kill()
        self.expect(self.transport.peer_state(peer) is PeerState.GONE, "the target's end is proved")
        copies = [Copy(self.source, 0, target.region, 0, 4096)]
        self.expect(self.refused(peer, copies, TransportError), "a post to the dead target is refused")
        self.expect(self.transport.peer_state(abroad) is PeerState.UNKNOWN, "from another host its end is not proved")
        began = time.monotonic()
        handle = self.transport.post(abroad, copies)
        status = self.ended(handle)
        self.after_its_death(status, handle, f"{status.name} ({time.monotonic() - began:.1f} s)")

    def after_its_death(self, status: Status, handle: int, how: str) -> None:
        """It is submitted, and what the engine says of it is not believed to mean that nothing can land."""
        unknown = status is Status.UNKNOWN and not self.transport.drained(handle)
        self.expect(unknown, f"a post after the target was killed is not drained: {how}")

    def refused(self, peer: Any, copies: list[Copy], error: type[TransportError]) -> bool:
        try:
            self.transport.post(peer, copies)
        except error:
            return True
        return False

    def connect_as(self, target: Target, **fields: object) -> Any:
        """To the target's engine as another instance, of which something else is told."""
        values = msgspec.msgpack.decode(target.descriptor)
        for name, value in {"instance": os.urandom(16), **fields}.items():
            values[self.wire.__struct_fields__.index(name)] = value
        return self.transport.connect(msgspec.msgpack.encode(values))


def main(open_one: Open, kind: type[Check] = Check) -> int:
    if sys.argv[1:] == ["target"]:
        be_target(open_one)
        return 0
    verdict: dict[str, Any] = {"ok": False, "path": ""}
    try:
        check = kind(open_one)
        verdict["path"] = check.transport.path()
        check.run()
        verdict |= {"ok": True, "checks": len(check.done)}
    except (Exception, SystemExit) as error:  # noqa: BLE001 - the verdict is the last line, whatever happened
        verdict["error"] = repr(error)
    verdict["torch_imported"] = "torch" in sys.modules
    verdict["seconds"] = round(time.monotonic() - BEGAN, 1)
    print(json.dumps(verdict), flush=True)
    return 0 if verdict["ok"] and not verdict["torch_imported"] else 1


if __name__ == "__main__":
    raise SystemExit(main(lambda: MooncakeTransport(OPTIONS)))

"""The other process of a pair: `python -m tensorferry.conformance.peer SPEC` does what it reads, JSON a line."""

from __future__ import annotations

import hashlib
import json
import os
import select
import sys
import time
from typing import IO, Any

import msgspec

from tensorferry.conformance.patterns import GUARD, SEAL, difference, pattern
from tensorferry.conformance.target import Spec, resolve
from tensorferry.core.errors import FerryError
from tensorferry.core.transport import Copy, Region, RemoteRegion, Status, Transport

FINAL = (Status.DONE, Status.FAILED, Status.UNKNOWN)


def reserve_stdout() -> IO[str]:
    """Keep standard output for this process's own words, and send what others print there to standard error."""
    own = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return own


class Peer:
    """The verbs. One thread calls them all, as an endpoint's would."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.regions: list[Region] = []
        self.peers: list[Any] = []
        self.kept: dict[tuple[int, str], Any] = {}

    @property
    def transport(self) -> Transport:
        return self._transport

    def open(self) -> None:
        self._transport = resolve(self.spec.name, self.spec.options).open()

    def region(self, nbytes: int, fill: int = GUARD) -> list[int]:
        memory = self.transport.allocate(nbytes)
        memory.view()[:] = bytes([fill]) * nbytes
        region = self.transport.register(memory)
        self.regions.append(region)
        return [region.id, region.generation]

    def address(self, index: int = 0) -> int:
        return self.regions[index].memory.address

    def retire(self, index: int) -> None:
        self.transport.retire(self.regions[index])

    def describe(self) -> str:
        return self.transport.describe().hex()

    def connect(self, descriptor: str) -> int:
        peer = self.transport.connect(bytes.fromhex(descriptor))
        if peer not in self.peers:
            self.peers.append(peer)
        return self.peers.index(peer)

    def state(self, peer: int = 0) -> str:
        return str(self.transport.peer_state(self.peers[peer]))

    def post(self, remote: list[int], offset: int, nbytes: int, seed: str, peer: int = 0) -> int:
        source = self.kept.get((nbytes, seed))
        if source is None:
            memory = self.transport.allocate(nbytes)
            memory.view()[:] = pattern(seed, nbytes)
            source = self.transport.register(memory) if self.transport.capabilities.registers_sources else memory
            self.kept[nbytes, seed] = source
        return self.transport.post(self.peers[peer], [Copy(source, 0, RemoteRegion(*remote), offset, nbytes)])

    def poll(self, handle: int) -> list[object]:
        status = self.transport.poll(handle)
        return [status.name, self.transport.drained(handle)]

    def outcome(self, handle: int, within: float = 20.0) -> list[object]:
        deadline = time.monotonic() + within
        while self.transport.poll(handle) not in FINAL and time.monotonic() < deadline:
            time.sleep(0.0005)
        return self.poll(handle)

    def stream(self, remote: list[int], nbytes: int, seed: str, peer: int = 0) -> int:
        """Write over and over, four posts at a time, until the next command comes. Answers with how many were DONE."""
        done, flying = 0, [self.post(remote, 0, nbytes, seed, peer) for _ in range(4)]
        print(json.dumps({"value": "streaming"}), file=OUT, flush=True)
        while not select.select([sys.stdin], [], [], 0)[0]:
            ended = [handle for handle in flying if self.transport.poll(handle) in FINAL]
            done += sum(self.transport.poll(handle) is Status.DONE for handle in ended)
            flying = [handle for handle in flying if handle not in ended]
            flying += [self.post(remote, 0, nbytes, seed, peer) for _ in ended]
        self.outcome(flying[-1])
        return done

    def flush(self, index: int = 0) -> None:
        if self.transport.capabilities.needs_flush:
            self.transport.flush(self.regions[index])

    def differs(self, offset: int, nbytes: int, seed: str, index: int = 0) -> str:
        self.flush(index)
        return difference(self.regions[index].memory.view(offset, nbytes), pattern(seed, nbytes))

    def seal(self, pieces: list[list[int]], index: int = 0) -> None:
        """Fill these [offset, nbytes] with SEAL."""
        self.flush(index)
        for offset, nbytes in pieces:
            self.regions[index].memory.view(offset, nbytes)[:] = bytes([SEAL]) * nbytes

    def unsealed(self, pieces: list[list[int]], index: int = 0) -> str:
        """Where SEAL stands no more."""
        self.flush(index)
        for offset, nbytes in pieces:
            view = self.regions[index].memory.view(offset, nbytes)
            if wrong := difference(view, bytes([SEAL]) * nbytes, offset):
                return wrong
        return ""

    def digest(self, offset: int, nbytes: int, index: int = 0) -> str:
        self.flush(index)
        return hashlib.sha256(self.regions[index].memory.view(offset, nbytes)).hexdigest()

    def close(self) -> None:
        self.transport.close()


OUT: IO[str] = sys.stdout


def main() -> int:
    global OUT
    OUT = reserve_stdout()
    peer = Peer(msgspec.json.decode(sys.argv[1], type=Spec))
    lines = os.fdopen(os.dup(0), "rb", buffering=0)  # unbuffered, so that select sees what is not read
    while line := lines.readline():
        verb, arguments = json.loads(line)
        try:
            answer: dict[str, object] = {"value": getattr(peer, verb)(**arguments)}
        except FerryError as error:
            answer = {"ferry": error.code, "cause": error.cause}
        except Exception as error:  # noqa: BLE001 - told to the other side
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=OUT, flush=True)
    os._exit(0)  # the pipe is closed: whoever asked is gone


if __name__ == "__main__":
    sys.exit(main())

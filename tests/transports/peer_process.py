"""A transport (shm, or another by its kind) that does what it is told, one JSON line at a time. Run by the tests."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import resource
import signal
import sys
import time
from typing import Any

from tensorferry.backends.mooncake import MooncakeOptions, MooncakeTransport
from tensorferry.backends.nixl import NixlOptions, NixlTransport
from tensorferry.backends.shm import ShmOptions, ShmTransport
from tensorferry.backends.tcp import TcpOptions, TcpTransport
from tensorferry.core.transport import Copy, Region, RemoteRegion, Status, Transport


class Peer:
    def __init__(self, options: dict[str, Any]) -> None:
        self.transport = opened(**options)
        self.regions: list[Region] = []
        self.peer: Any = None

    def describe(self) -> str:
        return self.transport.describe().hex()

    def share(self, nbytes: int) -> list[int]:
        """Register a region and say its id and generation."""
        region = self.transport.register(self.transport.allocate(nbytes))
        self.regions.append(region)
        return [region.id, region.generation]

    def retire(self) -> None:
        self.transport.retire(self.regions[-1])

    def digest(self) -> str:
        return hashlib.sha256(self.regions[-1].memory.view()).hexdigest()

    def bytes_there(self) -> str:
        """Which values the bytes of the last region have."""
        return bytes(sorted(set(bytes(self.regions[-1].memory.view())))).hex()

    def drop_first(self) -> bool:
        """Forget the first region's memory, as if every reference to it had gone; is its address still taken?"""
        assert isinstance(self.transport, NixlTransport)
        region = self.regions.pop(0)
        address = region.memory.address
        self.transport.retire(region)
        self.transport._retired.pop(region.memory)
        self.transport._agent.unregister(region.memory)
        del region
        gc.collect()
        with open("/proc/self/maps", encoding="ascii") as maps:
            rows = [line.split()[:2] for line in maps]
        ranges = [(*(int(end, 16) for end in where.split("-")), access) for where, access in rows]
        return any(low <= address < high and access == "---p" for low, high, access in ranges)

    def seal_first(self) -> None:
        """Give back the pages of the first region, as if its owner had unmapped them; it stays registered."""
        owner: Any = self.regions[0].memory.owner
        getattr(owner, "mapping", owner).seal()

    def connect(self, descriptor: str) -> None:
        self.peer = self.transport.connect(bytes.fromhex(descriptor))

    def write(self, region: list[int], seed: int, nbytes: int) -> list[str]:
        """Write `nbytes` seeded bytes into the region; the final status and the digest of what was written."""
        memory = self.transport.allocate(nbytes)
        memory.view()[:] = seeded(seed, nbytes)
        source = self.transport.register(memory) if self.transport.capabilities.registers_sources else memory
        handle = self.transport.post(self.peer, [Copy(source, 0, RemoteRegion(*region), 0, nbytes)])
        while (status := self.transport.poll(handle)) is Status.PENDING:
            time.sleep(0.001)
        return [status.name, hashlib.sha256(memory.view()).hexdigest()]

    def post(self, region: list[int], nbytes: int) -> int:
        """Write that many bytes of 0x55, and do not wait."""
        source = self.transport.allocate(nbytes)
        source.view()[:] = b"\x55" * nbytes
        return int(self.transport.post(self.peer, [Copy(source, 0, RemoteRegion(*region), 0, nbytes)]))

    def all_drained(self) -> bool:
        """Nothing that was posted can land any more."""
        return all(self.transport.drained(handle) for handle in self.transport._batches)  # type: ignore[attr-defined]

    def state(self) -> str:
        return str(self.transport.peer_state(self.peer))

    def lose_connections(self) -> None:
        """What a daemonizing application does to files that it does not know: close them under their owner."""
        assert isinstance(self.transport, ShmTransport)
        courier = self.transport._courier
        for guest in list(courier._guests):
            guest.connection.close()
        courier._listener.close()

    def fork(self) -> int:
        """Fork a child that lives until it is killed."""
        child = os.fork()
        if child == 0:
            signal.pause()
            os._exit(0)
        return child

    def fork_and_use(self) -> dict[str, str]:
        """What a forked child gets from each verb of the transport that it inherited."""
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            answers = {}
            for verb, call in {
                "describe": self.transport.describe,
                "poll": lambda: self.transport.poll(1),
                "allocate": lambda: self.transport.allocate(4096),
                "close": self.transport.close,
            }.items():
                try:
                    call()
                    answers[verb] = "returned"
                except Exception as error:  # noqa: BLE001 - which one is the answer
                    answers[verb] = type(error).__name__
            os.write(writer, json.dumps(answers).encode())
            os._exit(0)
        os.close(writer)
        with open(reader, encoding="utf-8") as pipe:
            answers = dict(json.loads(pipe.read()))
        os.waitpid(child, 0)
        return answers

    def limit_files(self, more: int | None) -> None:
        """Allow only so many further files; None: as before."""
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if more is None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            return
        lowest = os.dup(0)
        os.close(lowest)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + more, hard))

    def close(self) -> None:
        self.transport.close()


def opened(kind: str = "shm", environment: dict[str, str] | None = None, **options: Any) -> Transport:
    os.environ.update(environment or {})
    if kind == "mooncake":
        return MooncakeTransport(MooncakeOptions(host="127.0.0.1", **options))
    if kind == "nixl":
        return NixlTransport(NixlOptions(**options))
    if kind == "tcp":
        return TcpTransport(TcpOptions(**options))
    return ShmTransport(ShmOptions(**options))


def seeded(seed: int, nbytes: int) -> bytes:
    return hashlib.shake_256(seed.to_bytes(8, "little")).digest(nbytes)


def main() -> None:
    peer = Peer(json.loads(sys.argv[1]))
    for line in sys.stdin:
        verb, arguments = json.loads(line)
        try:
            answer = {"value": getattr(peer, verb)(**arguments)}
        except Exception as error:  # noqa: BLE001 - told to the test
            answer = {"error": repr(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()

"""Two ends of a transport, a second process to put one of them in, and a way to hold copies back."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tensorferry.backends import _copier, _tcp_link
from tensorferry.backends._mooncake_engine import Engine
from tensorferry.backends._nixl_engine import Agent, Request
from tensorferry.backends.memory import MemoryOptions, MemoryTransport
from tensorferry.backends.mooncake import MooncakeOptions, MooncakeTransport
from tensorferry.backends.nixl import NixlOptions, NixlTransport
from tensorferry.backends.shm import ShmOptions, ShmTransport
from tensorferry.backends.tcp import TcpOptions, TcpTransport
from tensorferry.core.memory import Memory
from tensorferry.core.transport import Copy, Region, RemoteRegion, Status, Transport

PATIENCE_S = 30.0


def eventually(condition: Callable[[], Any], what: str | Callable[[], str] = "") -> Any:
    """The condition's first true value; fails when there is none for half a minute, and then asks `what`."""
    deadline = time.monotonic() + PATIENCE_S
    while not (value := condition()):
        assert time.monotonic() < deadline, f"never: {what() if callable(what) else what or condition}"
        time.sleep(0.001)
    return value


def ended(transport: Transport, handle: int) -> Status:
    """The handle's terminal status."""
    eventually(
        lambda: transport.poll(handle) in (Status.DONE, Status.FAILED),
        lambda: f"the end of handle {handle}, which is {transport.poll(handle).name}",
    )
    return transport.poll(handle)


def over(transport: Transport, handle: int) -> Status:
    """The handle's first status that is not PENDING."""
    eventually(lambda: transport.poll(handle) is not Status.PENDING, f"an outcome of handle {handle}")
    return transport.poll(handle)


def filled(transport: Transport, data: bytes) -> Memory:
    memory = transport.allocate(len(data))
    memory.view()[:] = data
    return memory


def source(transport: Transport, data: bytes) -> Region | Memory:
    """Data to write from: registered where the transport asks for that."""
    memory = filled(transport, data)
    return transport.register(memory) if transport.capabilities.registers_sources else memory


def at(region: Region) -> RemoteRegion:
    return RemoteRegion(region.id, region.generation)


def wheel(folder: Path, name: str, library: str, there: bytes | None) -> str:
    """Installs a distribution 9.9 in the folder, which it returns. By its record the library has 7 bytes."""
    info = folder / f"{name.replace('-', '_')}-9.9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.9\n")
    (info / "RECORD").write_text(f"{library},sha256=anything,7\n{info.name}/RECORD,,\n")
    if there is not None:
        (folder / library).parent.mkdir()
        (folder / library).write_bytes(there)
        ((folder / library).parent / "__init__.py").write_text("")
    return str(folder)


@dataclass
class Pair:
    """Two ends of one kind in this process: `writer` writes into `region` of `owner`."""

    name: str
    open: Callable[[], Transport]
    owner: Transport
    writer: Transport
    region: Region
    peer: Any

    def post(self, data: bytes, offset: int = 0) -> int:
        return self.writer.post(self.peer, [Copy(source(self.writer, data), 0, at(self.region), offset, len(data))])

    def landed(self) -> bytes:
        return bytes(self.region.memory.view())

    def reconnect(self) -> None:
        assert self.writer.connect(self.owner.describe()) is self.peer


REGION_BYTES = 4096

OPENERS: dict[str, Callable[[], Transport]] = {
    "memory": lambda: MemoryTransport(MemoryOptions()),
    "mooncake": lambda: MooncakeTransport(MooncakeOptions(host="127.0.0.1")),
    # One worker: an agent starts in a third of the time.
    "nixl": lambda: NixlTransport(NixlOptions(workers=1)),
    "shm": lambda: ShmTransport(ShmOptions()),
    # One connection: tests hold one post back and expect the next one to wait behind it.
    "tcp": lambda: TcpTransport(TcpOptions(connections=1)),
}


def need(kind: str) -> None:
    """Skip the test where this kind of transport cannot be had. CI has to have it."""
    engines: dict[str, type[Transport]] = {"mooncake": MooncakeTransport, "nixl": NixlTransport}
    if kind in engines and not (probe := engines[kind].probe()).usable:
        pytest.skip(f"needs {kind}: {probe.reason}")


def told_to_stop(transport: Transport) -> bool:
    """`close` has reached the thread that moves bytes."""
    if isinstance(transport, TcpTransport):
        return all(link.winding for link in transport._links)
    mover = next(filter(None, (getattr(transport, name, None) for name in ("_copier", "_poster", "_crew"))), None)
    return bool(getattr(mover, "_stopping", False))


def in_chunks(monkeypatch: pytest.MonkeyPatch, nbytes: int, *transports: Transport) -> None:
    """Let these transports move so many bytes at a time: a chunk of the copier or for a socket, or a submit."""
    monkeypatch.setattr(_copier, "CHUNK_BYTES", nbytes)
    monkeypatch.setattr(_tcp_link, "CHUNK_BYTES", nbytes)
    for transport in transports:
        if isinstance(transport, MooncakeTransport):
            monkeypatch.setattr(transport, "_submit_bytes", nbytes)
        if isinstance(transport, NixlTransport):
            monkeypatch.setattr(transport, "_options", msgspec.structs.replace(transport._options, submit_bytes=nbytes))


@dataclass
class Brake:
    """Holds back every chunk that a copier wants to copy, a socket or the engine is to write, until it is let go."""

    waiting: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    go: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    off: bool = False
    chunks: int = 0

    def memmove(self, destination: int, source: int, nbytes: int) -> object:
        if not self.off:
            self.waiting.release()
            assert self.go.acquire(timeout=PATIENCE_S)
        self.chunks += 1
        return ORIGINAL(destination, source, nbytes)

    def submit(self, engine: Engine, session: str, source: int, target: int, nbytes: int) -> int:
        if not self.off:
            self.waiting.release()
            assert self.go.acquire(timeout=PATIENCE_S)
        self.chunks += 1
        return ORIGINAL_SUBMIT(engine, session, source, target, nbytes)

    def request(self, agent: Agent, request: Request) -> bool:
        if not self.off:
            self.waiting.release()
            assert self.go.acquire(timeout=PATIENCE_S)
        self.chunks += 1
        return ORIGINAL_REQUEST(agent, request)

    def transmit(self, connection: socket.socket, buffers: Sequence[memoryview]) -> int:
        if not self.off:
            self.waiting.release()
            assert self.go.acquire(timeout=PATIENCE_S)
        self.chunks += 1
        return ORIGINAL_TRANSMIT(connection, buffers)

    def until_held(self) -> None:
        assert self.waiting.acquire(timeout=PATIENCE_S), "no copy came"

    def let_one_go(self) -> None:
        self.go.release()

    def release(self) -> None:
        self.off = True
        self.go.release(1000)


ORIGINAL = _copier.memmove
ORIGINAL_SUBMIT = Engine.submit
ORIGINAL_REQUEST = Agent.submit
ORIGINAL_TRANSMIT = _tcp_link.transmit


class Process:
    """A transport in another process (shm, or the `kind` that it is given), which does what it is told by `ask`."""

    def __init__(self, *, inside: Sequence[str] = (), **options: object) -> None:
        """`inside`: a command to run it in."""
        self.popen = subprocess.Popen(
            [*inside, sys.executable, str(Path(__file__).with_name("peer_process.py")), json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self.popen.pid

    def tell(self, verb: str, **arguments: object) -> None:
        assert self.popen.stdin is not None
        self.popen.stdin.write(json.dumps([verb, arguments]) + "\n")
        self.popen.stdin.flush()

    def hear(self) -> Any:
        assert self.popen.stdout is not None
        line = self.popen.stdout.readline()
        assert line, "the process has ended"
        answer = json.loads(line)
        assert "error" not in answer, answer["error"]
        return answer["value"]

    def ask(self, verb: str, **arguments: object) -> Any:
        self.tell(verb, **arguments)
        return self.hear()

    def describe(self) -> bytes:
        return bytes.fromhex(self.ask("describe"))

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def stop(self) -> None:
        """SIGSTOP, and wait until each of its threads has stopped."""
        os.kill(self.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED)

    def end(self) -> None:
        self.popen.kill()
        self.popen.wait()
        for stream in (self.popen.stdin, self.popen.stdout):
            if stream is not None:
                stream.close()

"""A tensorferry transport through files of a directory that two processes of one host share.

The target's memory is a file that the target has mapped; a writer opens the same file and calls pwrite. Both are the
same pages of one kernel's page cache, so what pwrite has written is in the target's memory when it returns. That
holds within one kernel only. Between hosts, network file systems cache on each side, so a descriptor from another host
is refused.

In the directory, for an instance with the random id ID:

    ID.alive      locked (flock) as long as the instance can write; the kernel drops the lock when its process ends
    ID-N          the N-th piece of memory that the instance allocated
"""

from __future__ import annotations

import ctypes
import fcntl
import itertools
import logging
import mmap
import os
import queue
import re
import secrets
import stat
import threading
import weakref
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec

from tensorferry.core.errors import (
    BadCall,
    OutOfBounds,
    PeerUnreachable,
    ProtocolViolation,
    TransportError,
    TransportMismatch,
    TransportUnavailable,
    Unsupported,
    VersionMismatch,
)
from tensorferry.core.memory import Memory
from tensorferry.core.transport import (
    MAX_DESCRIPTOR_BYTES,
    Capabilities,
    Copy,
    Fence,
    Options,
    PeerState,
    Probe,
    Readiness,
    Region,
    Status,
    Transport,
)

log = logging.getLogger("ferry_file_transport")

DESCRIPTOR_VERSION = 1
VARIABLE = "FERRY_FILE_DIRECTORY"
LOCAL = frozenset({"tmpfs", "ext4", "xfs", "btrfs", "overlay"})
MAX_REGIONS = 512  # the descriptor has to fit into MAX_DESCRIPTOR_BYTES
CHUNK = 4 << 20  # bytes between two looks at whether to stop
CLOSE_S = 5.0


# ---- what a user can set, and what peers tell each other ---------------------------------------------------------


class FileOptions(Options, frozen=True):
    directory: Annotated[
        str, msgspec.Meta(description=f"The directory that both sides share; empty: what {VARIABLE} says.")
    ] = ""


Natural = Annotated[int, msgspec.Meta(ge=0)]


class _Header(msgspec.Struct, array_like=True, frozen=True):
    kind: str
    version: int


class _Descriptor(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    kind: str
    version: int
    host: str
    instance: Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
    revision: Natural
    regions: Annotated[list[tuple[Natural, Natural, Natural, Natural]], msgspec.Meta(max_length=MAX_REGIONS)]
    """(id, generation, bytes, number of the file). No path: what a peer says can name nothing but a peer's files."""


def _decode(descriptor: bytes) -> _Descriptor:
    if len(descriptor) > MAX_DESCRIPTOR_BYTES:
        raise ProtocolViolation(f"a descriptor of {len(descriptor)} bytes", transport="file")
    try:
        header = msgspec.msgpack.decode(descriptor, type=_Header)
        if header.kind != "file":
            raise ProtocolViolation(f"a descriptor of transport {header.kind!r}, not of file", transport="file")
        if header.version != DESCRIPTOR_VERSION:  # before the rest is read: it may have any shape
            raise VersionMismatch(f"a file descriptor of version {header.version}", transport="file")
        told = msgspec.msgpack.decode(descriptor, type=_Descriptor)
    except (msgspec.MsgspecError, RecursionError, ValueError) as error:
        raise ProtocolViolation(f"not a file descriptor: {error}", transport="file") from error
    if len({number for number, *_ in told.regions}) != len(told.regions):
        raise ProtocolViolation("a descriptor with a region twice", transport="file")
    return told


def _host() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def _problem(directory: str) -> tuple[str, str]:
    """(what is wrong with the directory, what would help), or two empty strings."""
    if not directory:
        return "no directory is named", f"Set {VARIABLE}, or the option directory, to one that both sides share"
    if not os.access(directory, os.R_OK | os.W_OK | os.X_OK):
        return f"{directory!r} is no directory that can be written", "Create it, or name another"
    real, best, kind = os.path.realpath(directory), "", ""
    for line in Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace").splitlines():
        _, mount, system = line.split()[:3]
        if len(mount) >= len(best) and (Path(real) == Path(mount) or Path(mount) in Path(real).parents):
            best, kind = mount, system
    if kind not in LOCAL:
        return f"{directory!r} lies on {kind}, which is not known to be local", f"Use one of {', '.join(sorted(LOCAL))}"
    return "", ""


# ---- files ---------------------------------------------------------------------------------------------------------


class _Mapped:
    """A file of ours and its mapping. Whoever holds the Memory holds this; the pages outlive the file's name."""

    def __init__(self, path: Path, number: int, nbytes: int) -> None:
        """Raises OSError where there is no room."""
        self.path, self.number, self.nbytes = path, number, nbytes
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            # Takes the room now: a full file system is an error here, and would be SIGBUS at the first touch later.
            os.posix_fallocate(fd, 0, nbytes)
            self._mapping = mmap.mmap(fd, nbytes)
        except OSError:
            path.unlink()
            raise
        finally:
            os.close(fd)
        self._anchor = ctypes.c_char.from_buffer(self._mapping)
        self.address = ctypes.addressof(self._anchor)


class _Opened:
    """A peer's file, open as long as somebody needs it: a peer handle, or a batch that is on its way."""

    def __init__(self, path: Path, flags: int) -> None:
        self.fd = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW)
        # Not at exit: a daemon thread may be writing then, and the lock must outlive it. The kernel closes last.
        weakref.finalize(self, os.close, self.fd).atexit = False


def _dead(fd: int) -> bool:
    """Whether the lock on an .alive file is free: whoever held it has ended, with every thread."""
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    fcntl.flock(fd, fcntl.LOCK_UN)
    return True


def _sweep(directory: Path) -> None:
    """Remove what killed processes left behind."""
    for path in directory.glob("*.alive"):
        if not re.fullmatch("[0-9a-f]{32}", path.stem):
            continue
        with suppress(FileNotFoundError, PermissionError):  # another one sweeps, or it is another user's
            alive = _Opened(path, os.O_RDONLY)
            if _dead(alive.fd):
                for left in [*directory.glob(f"{path.stem}-*"), path]:
                    left.unlink(missing_ok=True)


# ---- writing -------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Batch:
    pieces: list[tuple[_Opened, int, memoryview]]
    """(file, offset in it, source). Holds the sources, and the files open, until the end."""
    status: Status = Status.PENDING
    drained: bool = False

    def end(self, status: Status) -> None:
        self.pieces = []
        if self.status is Status.PENDING:  # else `close` gave up waiting and said UNKNOWN, which stays
            self.status = status
        self.drained = True  # last: whoever sees it may use the memory again


class _Worker:
    """One thread that writes batches in order. It does not know the transport, so a forgotten one can be collected.

    The lock is the thread's: it is free when nothing can be written any more, and not before.
    """

    def __init__(self, alive: _Opened) -> None:
        self.alive: _Opened | None = alive
        self.batches: queue.SimpleQueue[_Batch | None] = queue.SimpleQueue()
        self.stopping = False
        self.thread = threading.Thread(target=self._run, name="ferry-file-writer", daemon=True)
        self.thread.start()

    def stop(self) -> None:
        self.stopping = True
        self.batches.put(None)

    def _run(self) -> None:
        while (batch := self.batches.get()) is not None:
            try:
                batch.end(Status.DONE if self._write(batch) else Status.FAILED)
            except Exception:  # whatever it is, this batch has ended, and the next one is not to blame
                log.exception("a batch could not be written")
                batch.end(Status.FAILED)
        self.alive = None

    def _write(self, batch: _Batch) -> bool:
        for file, offset, source in batch.pieces:
            at = 0
            while at < len(source):
                if self.stopping:
                    return False
                at += os.pwrite(file.fd, source[at : at + CHUNK], offset + at)
        return True


# ---- the transport -------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Peer:
    home: object
    instance: bytes
    alive: _Opened
    revision: int = -1
    regions: dict[tuple[int, int], tuple[_Opened, int]] = field(default_factory=dict)
    """(id, generation) -> (file, bytes)"""
    connected: bool = True
    gone: bool = False


class FileTransport(Transport):
    name = "file"
    contract_version = 1
    options_type = FileOptions
    capabilities = Capabilities(
        same_host_only=True,
        registers_sources=False,  # pwrite reads from anywhere
        allocates_targets=True,  # only a mapped file can be a target
        notices_dead_peer=True,  # by the lock
        fences=frozenset({Fence.DRAIN, Fence.PEER_GONE}),  # not RETIRE: who has the file open can go on writing
    )

    @classmethod
    def probe(cls) -> Probe:
        directory = os.environ.get(VARIABLE, "")
        try:
            problem, hint = _problem(directory)
        except OSError as error:
            problem, hint = f"cannot look at {directory!r}: {error}", ""
        if problem:
            return Probe(Readiness.UNAVAILABLE, problem, hint)
        return Probe(Readiness.READY, "works between processes of one host that share a directory", path="file")

    def __init__(self, options: Options) -> None:
        if not isinstance(options, FileOptions):
            raise BadCall(f"file takes FileOptions, not {type(options).__name__}")
        named = options.directory or os.environ.get(VARIABLE, "")
        try:
            problem, hint = _problem(named)
            if problem:
                raise TransportUnavailable(problem, hint=hint, transport=self.name)
            self._directory = Path(named)
            self._host = _host()
            self._instance = secrets.token_bytes(16)
            _sweep(self._directory)
            self._worker = _Worker(self._lock())
        except OSError as error:
            raise TransportUnavailable(f"{named!r}: {error}", transport=self.name) from error
        self._pid = os.getpid()
        self._home = object()
        self._closed = False
        self._revision = 0
        self._generation = 0
        self._numbers = itertools.count()
        self._handles = itertools.count(1)
        self._files: weakref.WeakSet[_Mapped] = weakref.WeakSet()
        self._live: dict[int, Region] = {}
        self._peers: dict[bytes, _Peer] = {}
        self._batches: dict[int, _Batch] = {}
        weakref.finalize(self, self._worker.stop).atexit = False

    def _path(self, instance: bytes, suffix: str) -> Path:
        return self._directory / f"{instance.hex()}{suffix}"

    def _lock(self) -> _Opened:
        # Locked before it has its name: whoever sees an .alive file without a lock takes its owner for dead.
        new, path = self._path(self._instance, ".new"), self._path(self._instance, ".alive")
        alive = _Opened(new, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        fcntl.flock(alive.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        new.rename(path)
        return alive

    # ---- our memory

    def allocate(self, nbytes: int, kind: str = "cpu", device: int = 0) -> Memory:
        self._check_open()
        if kind != "cpu":
            raise Unsupported(f"cannot allocate {kind} memory", transport=self.name)
        if nbytes <= 0:
            raise BadCall(f"cannot allocate {nbytes} bytes", transport=self.name)
        number = next(self._numbers)
        try:
            mapped = _Mapped(self._path(self._instance, f"-{number}"), number, nbytes)
        except (OSError, OverflowError) as error:
            raise TransportError(
                f"cannot allocate {nbytes} bytes in {self._directory}: {error}", transport=self.name
            ) from error
        self._files.add(mapped)
        return Memory(mapped.address, nbytes, kind, mapped)

    def register(self, memory: Memory) -> Region:
        self._check_open()
        if memory.kind != "cpu":
            raise Unsupported(f"cannot register {memory.kind} memory", transport=self.name)
        mapped = memory.owner
        if not isinstance(mapped, _Mapped) or mapped not in self._files or memory.nbytes != mapped.nbytes:
            raise Unsupported("only memory from this transport's allocate() can be a target", transport=self.name)
        if len(self._live) >= MAX_REGIONS:
            raise TransportError(f"{MAX_REGIONS} regions are registered already", transport=self.name)
        self._generation += 1
        self._revision += 1
        region = Region(next(n for n in itertools.count() if n not in self._live), self._generation, memory)
        self._live[region.id] = region
        return region

    def retire(self, region: Region) -> None:
        self._check_open()
        if self._live.get(region.id) == region:
            del self._live[region.id]
            self._revision += 1
            assert isinstance(region.memory.owner, _Mapped)
            if not any(other.memory == region.memory for other in self._live.values()):
                region.memory.owner.path.unlink(missing_ok=True)  # nobody can open it any more; the memory stays
        elif not isinstance(region.memory.owner, _Mapped) or region.memory.owner not in self._files:
            raise BadCall(f"region {region.id} was never registered here", transport=self.name)

    def describe(self) -> bytes:
        self._check_open()
        regions = [
            (region.id, region.generation, region.memory.nbytes, region.memory.owner.number)
            for region in self._live.values()
            if isinstance(region.memory.owner, _Mapped)
        ]
        told = _Descriptor(self.name, DESCRIPTOR_VERSION, self._host, self._instance, self._revision, regions)
        return msgspec.msgpack.encode(told)

    # ---- peers

    def connect(self, descriptor: bytes) -> _Peer:
        self._check_open()
        told = _decode(descriptor)
        if told.host != self._host:
            raise TransportMismatch(
                "the peer runs on another host, where writes to a file would not be seen in time",
                hint="Use a network transport on both sides",
                transport=self.name,
            )
        peer = self._peers.get(told.instance)
        if peer is None:
            try:
                alive = _Opened(self._path(told.instance, ".alive"), os.O_RDONLY)
            except OSError as error:
                raise PeerUnreachable(
                    f"the peer's files are not in {self._directory}: {error.strerror}",
                    hint="Name the same directory on both sides, run them as the same user, and see that the peer runs",
                    transport=self.name,
                ) from error
            peer = self._peers[told.instance] = _Peer(self._home, told.instance, alive)
        if told.revision > peer.revision:
            peer.revision = told.revision
            known, peer.regions = peer.regions, {}
            for number, generation, nbytes, file in told.regions:
                opened = known.get((number, generation)) or self._open(told.instance, file, nbytes)
                if opened is not None:
                    peer.regions[number, generation] = opened
        return peer

    def _open(self, instance: bytes, file: int, nbytes: int) -> tuple[_Opened, int] | None:
        """The peer's file; None where it is gone (retired meanwhile) or is not what the peer says."""
        try:
            opened = _Opened(self._path(instance, f"-{file}"), os.O_WRONLY)
        except OSError:
            return None
        found = os.fstat(opened.fd)
        return (opened, nbytes) if stat.S_ISREG(found.st_mode) and found.st_size == nbytes else None

    def disconnect(self, peer: Any) -> None:
        self._check_peer(peer)
        if peer.connected:
            peer.connected = False
            peer.regions = {}
            self._peers.pop(peer.instance, None)

    def peer_state(self, peer: Any) -> PeerState:
        self._check_peer(peer)
        peer.gone = peer.gone or _dead(peer.alive.fd)
        return PeerState.GONE if peer.gone else PeerState.ALIVE

    # ---- writing

    def post(self, peer: Any, copies: Sequence[Copy]) -> int:
        self._check_open()
        self._check_peer(peer)
        if not peer.connected:
            raise BadCall("this peer was disconnected", transport=self.name)
        if self.peer_state(peer) is PeerState.GONE:  # its files may outlive it, and nobody will read them
            raise TransportError("the peer has ended", transport=self.name)
        if not copies:
            raise BadCall("a post needs at least one copy", transport=self.name)
        if len(copies) > self.capabilities.max_copies:
            raise Unsupported(f"at most {self.capabilities.max_copies} copies in one post", transport=self.name)
        batch = _Batch([self._piece(peer, copy) for copy in copies])  # all are checked before a byte moves
        handle = next(self._handles)
        self._batches[handle] = batch
        self._worker.batches.put(batch)
        return handle

    def _piece(self, peer: _Peer, copy: Copy) -> tuple[_Opened, int, memoryview]:
        local = copy.local
        if isinstance(local, Region):
            if self._live.get(local.id) != local:
                raise OutOfBounds(f"local region {local.id} is not registered here (any more)", transport=self.name)
            local = local.memory
        if local.kind != "cpu":
            raise Unsupported(f"cannot read from {local.kind} memory", transport=self.name)
        if copy.nbytes <= 0 or copy.local_offset < 0 or copy.local_offset + copy.nbytes > local.nbytes:
            raise OutOfBounds(f"{copy.nbytes} bytes at {copy.local_offset} of the source", transport=self.name)
        file, nbytes = peer.regions.get((copy.remote.id, copy.remote.generation), (None, 0))
        if file is None:
            raise OutOfBounds(f"the peer has no live {copy.remote}", transport=self.name)
        if copy.remote_offset < 0 or copy.remote_offset + copy.nbytes > nbytes:
            raise OutOfBounds(f"{copy.nbytes} bytes at {copy.remote_offset} of {copy.remote}", transport=self.name)
        return file, copy.remote_offset, local.view(copy.local_offset, copy.nbytes)

    def poll(self, handle: int) -> Status:
        return self._batch(handle).status

    def drained(self, handle: int) -> bool:
        return self._batch(handle).drained

    def release(self, handle: int) -> None:
        if not self._batch(handle).drained:
            raise BadCall(f"handle {handle} is not drained", transport=self.name)
        del self._batches[handle]

    # ---- the end

    def close(self) -> None:
        if self._closed or os.getpid() != self._pid:
            return
        self._closed = True
        self._worker.stop()
        self._worker.thread.join(CLOSE_S)  # at most a chunk, unless the file system hangs
        if self._worker.thread.is_alive():
            log.error("a write did not return within %g s; peers see this process as alive until it does", CLOSE_S)
            for batch in self._batches.values():
                if not batch.drained:
                    batch.status = Status.UNKNOWN
        else:
            for batch in self._batches.values():
                if not batch.drained:
                    batch.end(Status.FAILED)  # it never began
            self._path(self._instance, ".alive").unlink(missing_ok=True)
        for left in self._directory.glob(f"{self._instance.hex()}-*"):
            left.unlink(missing_ok=True)
        self._live.clear()
        self._peers.clear()

    # ---- checks

    def _check_open(self) -> None:
        if os.getpid() != self._pid:
            raise BadCall("this transport is the parent's; open one in each process", transport=self.name)
        if self._closed:
            raise BadCall("the transport is closed", transport=self.name)

    def _check_peer(self, peer: Any) -> None:
        if not isinstance(peer, _Peer) or peer.home is not self._home:
            raise BadCall(f"a {type(peer).__name__} is not a peer of this transport", transport=self.name)

    def _batch(self, handle: int) -> _Batch:
        batch = self._batches.get(handle)
        if batch is None:
            raise BadCall(f"handle {handle!r} is unknown or released", transport=self.name)
        return batch

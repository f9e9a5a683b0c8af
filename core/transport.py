"""The Transport contract: moving bytes between registered regions of two processes.

A transport knows nothing of rooms, tokens or rounds. It never sees a tensor: memory is an address, a length and a
kind, so that this file and the backends import no torch. Everything below is versioned by `CONTRACT_VERSION`.

Life of a transport, on both sides:

    t = SomeTransport(options)                 open; unknown options are errors
    region = t.register(t.allocate(n))         memory that peers may write to, or that we write from
    blob = t.describe()                        bytes for the peer, sent over the control channel
    peer = t.connect(blob_of_the_peer)         again with a newer blob: the same peer, with its new regions
    handle = t.post(peer, [Copy(...), ...])    returns at once; refuses before any byte moves
    t.poll(handle)                             PENDING, DONE, FAILED or UNKNOWN
    t.retire(region); t.close()

Threads: every method may be called from one thread only (the endpoint's I/O thread) unless the capabilities declare
`thread_safe`. `probe` may be called from anywhere. No method blocks for longer than it takes to queue the work.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import Any, ClassVar

import msgspec

from tensorferry.core.memory import Memory

CONTRACT_VERSION = 1

MAX_DESCRIPTOR_BYTES = 64 * 1024
"""Longest answer of `describe`: it travels in one control frame."""


class Status(IntEnum):
    """What `poll` answers. DONE and FAILED are drained: nothing of this handle can land any more."""

    PENDING = 0
    DONE = 1  # every byte of every copy is placed
    FAILED = 2  # at least one byte is not placed, and nothing can land any more
    UNKNOWN = 3  # anything else, time-outs included: bytes may still land, and it may become known what they did


class PeerState(StrEnum):
    ALIVE = "alive"
    UNKNOWN = "unknown"  # no proof either way; silence is not death
    GONE = "gone"  # proved: the process, or everything in it that could write to us, has ended


class Fence(StrEnum):
    """Proofs, beyond normal completion, that no write can land any more (a transport declares the real ones)."""

    DRAIN = "drain"  # F2: UNKNOWN handles become drained on their own
    RETIRE = "retire"  # F3 as a proof: after `retire` returns, no late write reaches the region's memory
    PEER_GONE = "peer_gone"  # F4: `peer_state` can answer GONE


class Readiness(StrEnum):
    READY = "ready"
    DEGRADED = "degraded"  # works, but not as well as it could: the reason says why
    UNAVAILABLE = "unavailable"  # something is missing; the hint says what would help
    BROKEN = "broken"  # present, and fails


@dataclass(frozen=True)
class Probe:
    """Can this transport work here, and if not, why, and what would help?"""

    readiness: Readiness
    reason: str
    hint: str = ""
    facts: dict[str, str] = field(default_factory=dict)
    """Anything, by name. `tensorferry doctor` knows some: `engine`, the version of one that is installed, whether it
    works or not; `authentication`, how callers at its ports are told apart, beginning with "none" where they are not;
    `binding`, how it is kept to one interface; `ports`, as "15000-17000", from where it draws them."""
    path: str = ""
    """What `path` would answer, once it is open."""

    @property
    def usable(self) -> bool:
        return self.readiness in (Readiness.READY, Readiness.DEGRADED)


@dataclass(frozen=True)
class Capabilities:
    """What a transport declares. Declared means that the conformance suite tests it; undeclared means that the call
    raises `Unsupported`."""

    memory_kinds: frozenset[str] = frozenset({"cpu"})
    """Memory that can be registered and read from: "cpu", "cuda". The endpoint stages rows that lie elsewhere."""
    same_host_only: bool = False
    max_copies: int = 1024
    """Most copies in one `post` (a longer batch is refused as a whole)."""
    preferred_post_bytes: int = 4 << 20
    """Size of one `post` at which this transport is near its best rate; the endpoint splits larger grants."""
    registers_sources: bool = True
    """False: any readable host memory serves as the local side of a copy, and the caller's rows are read in place.
    True: the local side must lie in registered memory, and the endpoint stages rows it does not own."""
    allocates_targets: bool = False
    """True: only memory that `allocate` returned can be registered as a target of peers' writes."""
    cancellable: bool = False
    notices_dead_peer: bool = False
    fences: frozenset[Fence] = frozenset()
    needs_flush: bool = False
    """True: what is placed is visible to a reader only after `flush`, as with GPU memory that a card writes to."""
    thread_safe: bool = False
    reads: bool = False
    wakes: bool = False
    """True: calls the function given to `on_progress` when a handle's status changes; else the endpoint polls."""


@dataclass(frozen=True, slots=True)
class Region:
    """Registered local memory. `generation` tells two registrations with the same id apart."""

    id: int
    generation: int
    memory: Memory


@dataclass(frozen=True, slots=True)
class RemoteRegion:
    """A region of a peer, as named by the peer's descriptor: never an address."""

    id: int
    generation: int


@dataclass(frozen=True, slots=True)
class Copy:
    """`nbytes` bytes from `local_offset` in `local` to `remote_offset` in `remote`. Offsets in bytes from the start.

    `local` is a Region, or plain Memory where `registers_sources` is False.
    """

    local: Region | Memory
    local_offset: int
    remote: RemoteRegion
    remote_offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class EngineVariable:
    """An environment variable of an engine that a transport sets when it is opened, where the user has not."""

    name: str
    value: str
    """The default; an option of the transport may say otherwise."""
    reason: str


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of a transport's typed options. Subclass it; every field needs a default and a documented meaning."""


class Transport(ABC):
    """One engine. See the module's docstring for the life of an instance and docs/ for the numbered rules."""

    name: ClassVar[str]
    contract_version: ClassVar[int] = CONTRACT_VERSION
    """The version that the class was written for. A third party's class states it as a literal (the registry insists):
    what it inherits from here would agree with every version."""
    capabilities: Capabilities
    """The class's; what depends on where and how it was opened (`memory_kinds` and with it `needs_flush`: is there an
    engine, a device and a driver for GPU memory?) an instance states for itself, before its constructor returns and
    never after."""
    options_type: ClassVar[type[Options]] = Options
    sets: ClassVar[tuple[EngineVariable, ...]] = ()
    """Whatever is set of the engine's environment stands here, with the reason: `config show --origin` shows it."""

    @classmethod
    @abstractmethod
    def probe(cls) -> Probe:
        """Never raises, never blocks for long, imports the engine only inside itself."""

    @abstractmethod
    def __init__(self, options: Options) -> None:
        """Open. Raises TransportUnavailable (with the probe's reason) where it cannot work."""

    @abstractmethod
    def allocate(self, nbytes: int, kind: str = "cpu", device: int = 0) -> Memory:
        """Zeroed or untouched memory, aligned to at least 64 bytes, that `register` will take. `device`: which one of
        its kind; callers pass it for kinds other than "cpu". Raises Unsupported for a kind that is not declared."""

    @abstractmethod
    def register(self, memory: Memory) -> Region:
        """Make memory known to the engine. Raises Unsupported for a kind that is not declared."""

    @abstractmethod
    def retire(self, region: Region) -> None:
        """No new writes to it are accepted by anybody who learns of it; its memory stays valid until the peer is
        proved gone or the transport closes. Idempotent."""

    @abstractmethod
    def describe(self) -> bytes:
        """What a peer needs to write to our live regions and to watch us: versioned, at most MAX_DESCRIPTOR_BYTES,
        no pickle. Changes when a region is registered or retired."""

    @abstractmethod
    def connect(self, descriptor: bytes) -> Any:
        """A peer handle. A second call with a newer descriptor of the same process returns the same peer with its
        regions brought up to date; an older one changes nothing. Raises ProtocolViolation for a malformed descriptor,
        VersionMismatch for one of another version, PeerUnreachable or TransportMismatch where no path exists."""

    @abstractmethod
    def disconnect(self, peer: Any) -> None:
        """Forget a peer: posted handles keep their meaning; later posts to it raise. Idempotent."""

    @abstractmethod
    def peer_state(self, peer: Any) -> PeerState:
        """ALIVE, UNKNOWN, or GONE with proof. Cheap and non-blocking."""

    def path(self, peer: Any = None) -> str:
        """What carries the bytes, in a word: "rdma", "tcp", "memcpy"; to `peer`, where one is given. Only what is
        known: the setting `require` compares with it and fails closed. Non-blocking. Default: the name."""
        return self.name

    @abstractmethod
    def post(self, peer: Any, copies: Sequence[Copy]) -> int:
        """Start writing a batch; returns a handle at once. Raises *before any byte moves*: OutOfBounds, Unsupported for
        more than `max_copies` or another kind of memory, another TransportError where it is known that the peer cannot
        be written to, BadCall for no copies, a peer of another transport or a disconnected one. Once it has returned,
        the outcome is `poll`'s."""

    @abstractmethod
    def poll(self, handle: int) -> Status:
        """Never blocks. DONE and FAILED are repeated for ever until `release`, also after `close`. UNKNOWN is, too, or
        gives way to DONE or FAILED when it is known what became of the batch; PENDING never comes again. Raises BadCall
        for a handle that is unknown or released."""

    @abstractmethod
    def drained(self, handle: int) -> bool:
        """Nothing of this handle can land any more. Monotone: once True, always True."""

    def source_free(self, handle: int) -> bool:
        """The local side of this handle's copies is not read any more and may be written to. Monotone; `drained`
        implies it, and so does DONE. An engine that can tell it earlier, as where a write's outcome is unknown and
        nothing is left to send, says so here: else what a lost peer was sent is held for ever."""
        return self.drained(handle)

    @abstractmethod
    def release(self, handle: int) -> None:
        """Forget a drained handle. Raises BadCall for one that is not drained."""

    def flush(self, region: Region) -> None:
        """On the receiving side, where `needs_flush` is declared: placed bytes are visible to the reader after it, the
        host's or a GPU stream's, whichever can read the region. Raises DeviceError where the GPU cannot be told to."""
        from tensorferry.core.errors import Unsupported

        raise Unsupported(f"{self.name} does not declare needs_flush", transport=self.name)

    def cancel(self, handle: int) -> None:
        """Ask for an early end. Never a fence by itself: poll and drained still tell the truth."""
        from tensorferry.core.errors import Unsupported

        raise Unsupported(f"{self.name} does not declare cancellable", transport=self.name)

    def on_progress(self, wake: Callable[[], None]) -> None:
        """Where `wakes` is declared: `wake` is called, from any thread, after a handle's status changed."""
        from tensorferry.core.errors import Unsupported

        raise Unsupported(f"{self.name} does not declare wakes", transport=self.name)

    @abstractmethod
    def close(self) -> None:
        """Idempotent; releases everything; never hangs."""

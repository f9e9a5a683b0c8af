"""What a check works with: transports that are closed after it, a joined pair, patience, and words for findings."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from tensorferry.conformance.hooks import Hooks
from tensorferry.conformance.model import Inconclusive, NotApplicable, Tier, Violation
from tensorferry.conformance.patience import FACTOR
from tensorferry.conformance.patterns import GUARD, SEAL, difference, pattern
from tensorferry.conformance.target import Target
from tensorferry.core.errors import FerryError
from tensorferry.core.memory import Memory, host_memory
from tensorferry.core.transport import Capabilities, Copy, Fence, PeerState, Region, RemoteRegion, Status, Transport

if TYPE_CHECKING:
    from tensorferry.conformance.processes import PeerProcess

log = logging.getLogger("tensorferry.conformance")

T = TypeVar("T")
FINAL = (Status.DONE, Status.FAILED, Status.UNKNOWN)
PATIENCE_S = 10.0 * FACTOR


def at(region: Region) -> RemoteRegion:
    return RemoteRegion(region.id, region.generation)


def declares(capabilities: Capabilities, need: str) -> bool:
    """Whether a word of a rule's `needs` holds."""
    if need.startswith("!"):
        return not declares(capabilities, need[1:])
    if need.startswith("fence:"):
        return Fence(need.removeprefix("fence:")) in capabilities.fences
    return bool(getattr(capabilities, need))


@dataclass(eq=False)
class Pair:
    """Two instances of this process: `writer` writes into `region` of `owner`, which is filled with GUARD."""

    stage: Stage
    owner: Transport
    writer: Transport
    region: Region
    peer: Any

    def reconnect(self) -> None:
        """Tell the writer what the owner has now."""
        self.peer = self.writer.connect(self.owner.describe())

    def target(self, nbytes: int) -> Region:
        """One more region of the owner, known to the writer."""
        region = self.stage.region(self.owner, nbytes)
        self.reconnect()
        return region

    def source(self, data: bytes) -> Region | Memory:
        return self.stage.source(self.writer, data)

    def post(self, data: bytes, offset: int = 0, region: Region | None = None) -> int:
        target = at(region or self.region)
        return self.writer.post(self.peer, [Copy(self.source(data), 0, target, offset, len(data))])

    def end(self, handle: int, within: float = PATIENCE_S) -> Status:
        return self.stage.end(self.writer, handle, within)

    def done(self, handle: int, what: str = "a post") -> None:
        """The handle ends DONE, is flushed where that is declared, and is released."""
        self.stage.done(self.writer, handle, what)
        self.flush()
        self.writer.release(handle)

    def flush(self, region: Region | None = None) -> None:
        if self.owner.capabilities.needs_flush:
            self.owner.flush(region or self.region)

    def read(self, offset: int = 0, nbytes: int | None = None, region: Region | None = None) -> bytes:
        return self.stage.read(self.owner, region or self.region, offset, nbytes)

    def placed(self, data: bytes, offset: int = 0, region: Region | None = None, what: str = "the copy") -> None:
        """Expect `data` at `offset` of the region, which is flushed where that is declared."""
        self.flush(region)
        wrong = difference(self.read(offset, len(data), region), data)
        self.stage.expect(
            not wrong, f"DONE, and {what} of {len(data)} bytes to offset {offset} was not placed: {wrong}"
        )


@dataclass(eq=False)
class Stage:
    """Handed to each check, one of its own."""

    rule: str
    target: Target
    hooks: Hooks
    seed: int
    tier: Tier
    shared: dict[str, Any] = field(default_factory=dict)
    evidence: dict[str, str] = field(default_factory=dict)
    _open: list[Transport] = field(default_factory=list)
    _processes: list[PeerProcess] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(f"{self.seed}:{self.rule}")

    # ---- words

    def note(self, name: str, value: object) -> None:
        """Evidence for the report."""
        self.evidence[name] = str(value)

    def expect(self, holds: object, otherwise: str) -> None:
        if not holds:
            raise Violation(otherwise)

    def fail(self, message: str) -> NoReturn:
        raise Violation(message)

    def unknown(self, message: str) -> NoReturn:
        raise Inconclusive(message)

    def refused(self, call: Callable[[], object], *errors: type[BaseException], what: str) -> BaseException:
        """Expect one of these errors."""
        names = " or ".join(error.__name__ for error in errors)
        try:
            answer = call()
        except errors as error:
            return error
        except Exception as error:
            raise Violation(f"{what} raised {type(error).__name__}: {error}; expected {names}") from error
        raise Violation(f"{what} was not refused: expected {names}, and it answered {_short(answer)}")

    def attempt(self, call: Callable[[], T], what: str) -> T | FerryError:
        """What the call answers, or the FerryError that it raises; anything else that it raises is a violation."""
        try:
            return call()
        except FerryError as error:
            return error
        except Exception as error:
            raise Violation(f"{what} raised {type(error).__name__}: {error}, which is no FerryError") from error

    def once(self, what: str, make: Callable[[], T]) -> T:
        """What `make` answers, or the verdict that it raises: made by the first rule of a run that asks. Data alone:
        what is open is closed when that rule's check ends."""
        if what not in self.shared:
            try:
                self.shared[what] = make()
            except (Violation, Inconclusive, NotApplicable) as verdict:
                self.shared[what] = verdict
        found: T | Exception = self.shared[what]
        if isinstance(found, Exception):
            raise type(found)(*found.args)
        return found

    # ---- how much

    def times(self, quick: int, verify: int, everything: int) -> int:
        return (quick, verify, everything)[self.tier]

    def settle(self) -> None:
        """Time in which a late write shows itself."""
        time.sleep((0.15, 0.5, 2.5)[self.tier])

    # ---- transports

    def open(self) -> Transport:
        transport = self.target.open()
        if not isinstance(transport, Transport):
            raise Violation(f"opening gave a {type(transport).__name__}, which is no Transport")
        self._open.append(transport)
        return transport

    def region(self, transport: Transport, nbytes: int, fill: int = GUARD) -> Region:
        """Memory of the transport, filled and registered."""
        memory = transport.allocate(nbytes)
        self.expect(isinstance(memory, Memory), f"allocate({nbytes}) answered {_short(memory)}, which is no Memory")
        memory.view()[:nbytes] = bytes([fill]) * nbytes
        region = transport.register(memory)
        self.expect(isinstance(region, Region), f"register answered {_short(region)}, which is no Region")
        return region

    def own_target(self, transport: Transport, nbytes: int, fill: int = GUARD) -> Region:
        """As `region`, in memory that outlives the transport: it is this process's, where the transport takes that."""
        if transport.capabilities.allocates_targets:
            return self.region(transport, nbytes, fill)
        memory = host_memory(nbytes)
        memory.view()[:] = bytes([fill]) * nbytes
        return transport.register(memory)

    def source(self, transport: Transport, data: bytes) -> Region | Memory:
        """Data to write from: registered where that is declared as needed."""
        if transport.capabilities.registers_sources:
            memory = transport.allocate(len(data))
            memory.view()[: len(data)] = data
            return transport.register(memory)
        memory = host_memory(len(data))
        memory.view()[:] = data
        return memory

    def pair(self, nbytes: int = 4096, *, own: bool = False) -> Pair:
        """Two joined instances. `own`: the target's memory outlives its transport where that is possible."""
        owner, writer = self.open(), self.open()
        region = (self.own_target if own else self.region)(owner, nbytes)
        return Pair(self, owner, writer, region, writer.connect(owner.describe()))

    def read(self, transport: Transport, region: Region, offset: int = 0, nbytes: int | None = None) -> bytes:
        """What lies in the region: read past the transport where a hook does that."""
        size = region.memory.nbytes - offset if nbytes is None else nbytes
        if self.hooks.has("peek"):
            return self.hooks.peek(transport, region)[offset : offset + size]
        return bytes(region.memory.view(offset, size))

    def seal(self, *regions: Region) -> None:
        """Fill with SEAL what nothing may write to any more; `sealed` looks again."""
        for region in regions:
            region.memory.view()[: region.memory.nbytes] = bytes([SEAL]) * region.memory.nbytes

    def sealed(self, *regions: Region, after: str) -> None:
        for region in regions:
            found = region.memory.view()
            wrong = difference(found, bytes([SEAL]) * len(found))
            self.expect(not wrong, f"something landed after {after}: {wrong}")

    # ---- waiting

    def end(self, transport: Transport, handle: int, within: float = PATIENCE_S) -> Status:
        """The handle's final status; a violation where there is none in time."""
        deadline = time.monotonic() + within
        while (status := transport.poll(handle)) not in FINAL:
            if time.monotonic() > deadline:
                raise Violation(f"handle {handle} still says {_short(status)} after {within:g} s")
            time.sleep(0.0002)
        self.expect(isinstance(status, Status), f"poll answered {_short(status)}, which is no Status")
        return status

    def done(self, transport: Transport, handle: int, what: str = "a post") -> None:
        status = self.end(transport, handle)
        self.expect(status is Status.DONE, f"{what} between two healthy ends ended {status.name}, not DONE")

    def drained(self, transport: Transport, handles: Iterable[int], within: float = PATIENCE_S) -> bool:
        """Whether all of these handles are drained in time."""
        return self.eventually(lambda: all(transport.drained(h) for h in handles), within)

    def ended(self, transport: Transport, handles: Iterable[int], within: float = PATIENCE_S) -> bool:
        """Whether all of these handles have a final status in time."""
        return self.eventually(lambda: all(transport.poll(h) in FINAL for h in handles), within)

    def gone(self, transport: Transport, peer: Any, within: float) -> bool:
        """Whether `peer_state` says GONE in time."""
        return self.eventually(lambda: transport.peer_state(peer) is PeerState.GONE, within)

    def eventually(self, condition: Callable[[], object], within: float = PATIENCE_S) -> bool:
        deadline = time.monotonic() + within
        while not condition():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.001)
        return True

    def busy(self, seconds: float) -> None:
        """Time in which this thread keeps the interpreter to itself, as far as it may."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            pass

    def timed(self, call: Callable[[], T]) -> tuple[T, float]:
        begun = time.monotonic()
        answer = call()
        return answer, time.monotonic() - begun

    def pattern(self, nbytes: int, name: object = "") -> bytes:
        return pattern(f"{self.seed}:{self.rule}:{name}", nbytes)

    # ---- other processes

    def process(self) -> PeerProcess:
        """Another process with the transport under test open in it."""
        return self.processes(1)[0]

    def processes(self, count: int) -> list[PeerProcess]:
        """Several: they start side by side."""
        from tensorferry.conformance.processes import PeerProcess

        if self.target.spec is None:
            raise Inconclusive(
                "needs a second process, and what is under test is no entry point and cannot be imported"
            )
        started = []
        for _ in range(count):
            started.append(PeerProcess(self.target.spec))
            self._processes.append(started[-1])
            started[-1].tell("open")
        for process in started:
            process.hear("open")
        return started

    # ---- the end

    def close(self) -> list[str]:
        """Close all that the check opened; what that raised is no finding of this rule, LIF-2 has its own."""
        problems: list[str] = []
        for process in self._processes:
            process.end()
        for transport in reversed(self._open):
            try:
                transport.close()
            except Exception as error:  # noqa: BLE001 - kept as evidence
                problems.append(f"{type(error).__name__}: {error}")
        self._open.clear()
        return problems


def shuffled(rng: random.Random, items: Sequence[T]) -> list[T]:
    return rng.sample(items, len(items))


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."

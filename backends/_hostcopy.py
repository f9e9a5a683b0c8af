"""What the built-in transports share: local regions, the check of every copy, handles, and an orderly end.

`HostTransport` is what holds for host memory however its bytes travel. `HostCopyTransport` is for those that copy
with a thread of their own (`_copier`); they differ in how a peer's region becomes an address, which is
`_target`, and in what a descriptor says.
"""

from __future__ import annotations

import itertools
import logging
import os
import weakref
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Protocol, TypeVar

from tensorferry.backends._copier import Batch, Copier
from tensorferry.backends._descriptor import MAX_REGIONS
from tensorferry.backends._mapping import MADV_HUGEPAGE, Mapping
from tensorferry.core.cuda_driver import driver
from tensorferry.core.errors import BadCall, OutOfBounds, TransportError, Unsupported
from tensorferry.core.memory import Memory, check_available
from tensorferry.core.transport import Copy, Options, Region, RemoteRegion, Status, Transport

log = logging.getLogger("tensorferry.backends")

MAX_HANDLES = 65_536
"""Most handles that are posted and not released: a caller that forgets `release` gets an error, not a leak."""

CLOSE_TIMEOUT_S = 5.0
"""How long `close` waits for the chunk that is being copied. One chunk takes about a millisecond."""


Plan = list[tuple[Any, int, int, int]]
"""Copies that were checked: (the subclass's token for the remote region, offset in it, source address, bytes)."""


class Job(Protocol):
    """One post, as its handle knows it."""

    cancelled: bool

    @property
    def status(self) -> Status: ...

    @property
    def drained(self) -> bool: ...


@dataclass(slots=True, eq=False)
class HostPeer:
    """A peer as this side knows it: what its newest descriptor said."""

    home: object
    """The transport that made this handle (its marker): no other accepts it."""
    instance: bytes
    revision: int = -1
    regions: dict[tuple[int, int], int] = field(default_factory=dict)
    """(id, generation) -> bytes"""
    connected: bool = True

    def learn(self, revision: int, regions: Sequence[tuple[int, int, int]]) -> bool:
        """Take over a descriptor's regions, unless a newer descriptor was seen before. True: taken over."""
        if revision <= self.revision:
            return False
        self.revision = revision
        self.regions = {(number, generation): nbytes for number, generation, nbytes in regions}
        return True


J = TypeVar("J", bound=Job)


class HostTransport(Transport, Generic[J]):
    """Base of the transports between host memory and host memory. Not a transport by itself."""

    def __init__(self, options: Options) -> None:
        if not isinstance(options, self.options_type):
            raise BadCall(f"{self.name} takes {self.options_type.__name__}, not {type(options).__name__}")
        self._options = options
        self._pid = os.getpid()
        self._home = object()
        self._closed = False
        self._live: dict[int, Region] = {}
        self._generation = 0
        self._revision = 0
        self._batches: dict[int, J] = {}
        self._handles = itertools.count(1)

    # ---- what differs ------------------------------------------------------------------------------------

    @abstractmethod
    def _target(self, peer: HostPeer, remote: RemoteRegion) -> tuple[int, object]:
        """(bytes of the region, token for `_start`); raises OutOfBounds for a region that is not live."""

    @abstractmethod
    def _begin(self, peer: HostPeer, plan: Plan, keep: list[object]) -> J:
        """Start writing, now or later. `keep`: what has to live until nothing reads the sources any more."""

    def _publish(self, region: Region) -> None:
        """Make a new region reachable for peers. May refuse it by raising."""

    def _withdraw(self, region: Region) -> None:
        """Take a region back: whoever asks for it from now on is refused."""

    # ---- memory ------------------------------------------------------------------------------------------

    def allocate(self, nbytes: int, kind: str = "cpu", device: int = 0) -> Memory:
        """Zeroed, page-aligned memory of this process whose pages are there already; or a GPU's."""
        self._check_open()
        self._check_wish(nbytes, kind)
        if kind == "cuda":
            return driver().allocate(nbytes, device)
        try:
            check_available(nbytes)
            mapping = Mapping(nbytes)
            mapping.advise(MADV_HUGEPAGE)
            mapping.populate()
        except OSError as error:
            raise TransportError(str(error), transport=self.name) from error
        return Memory(mapping.address, nbytes, kind, mapping)

    def _check_wish(self, nbytes: int, kind: str) -> None:
        if kind not in self.capabilities.memory_kinds:
            raise Unsupported(f"cannot allocate {kind} memory", transport=self.name)
        if nbytes <= 0:
            raise BadCall(f"cannot allocate {nbytes} bytes", transport=self.name)

    def register(self, memory: Memory) -> Region:
        self._check_open()
        if memory.kind not in self.capabilities.memory_kinds:
            kinds = ", ".join(sorted(self.capabilities.memory_kinds))
            raise Unsupported(f"cannot register {memory.kind} memory, only {kinds}", transport=self.name)
        if memory.nbytes <= 0 or memory.address <= 0:
            raise BadCall(f"not a piece of memory: {memory}", transport=self.name)
        if len(self._live) >= MAX_REGIONS:
            raise TransportError(
                f"{MAX_REGIONS} regions are registered already",
                hint="Register fewer, larger regions",
                transport=self.name,
            )
        number = next(n for n in itertools.count() if n not in self._live)
        region = Region(number, self._generation + 1, memory)
        self._publish(region)
        self._generation += 1
        self._live[number] = region
        self._revision += 1
        return region

    def retire(self, region: Region) -> None:
        self._check_open()
        live = self._live.get(region.id)
        if live is None or live.generation != region.generation:
            if not 0 < region.generation <= self._generation:
                raise BadCall(f"region {region.id} was never registered here", transport=self.name)
            return  # retired before
        if live.memory != region.memory:
            raise BadCall(f"region {region.id} is another transport's", transport=self.name)
        del self._live[region.id]
        self._revision += 1
        self._withdraw(live)

    def _take_cuda(self) -> None:
        """From the constructor: this instance's engine moves CUDA memory, by a card that reads and writes it."""
        kinds = self.capabilities.memory_kinds | {"cuda"}
        self.capabilities = replace(self.capabilities, memory_kinds=kinds, needs_flush=True)

    def flush(self, region: Region) -> None:
        """Where CUDA memory is taken. What a card has written to host memory needs none."""
        if not self.capabilities.needs_flush:
            super().flush(region)
        self._check_open()
        if region.memory.kind == "cuda":
            driver().flush(region.memory.device)

    # ---- writing -----------------------------------------------------------------------------------------

    def post(self, peer: Any, copies: Sequence[Copy]) -> int:
        self._check_open()
        self._check_peer(peer)
        if not peer.connected:
            raise BadCall("this peer was disconnected", transport=self.name)
        if not copies:
            raise BadCall("a post needs at least one copy", transport=self.name)
        if len(copies) > self.capabilities.max_copies:
            raise Unsupported(
                f"{len(copies)} copies in one post; the most is {self.capabilities.max_copies}",
                transport=self.name,
            )
        if len(self._batches) >= MAX_HANDLES:
            raise TransportError(
                f"{MAX_HANDLES} handles are in use", hint="Release drained handles", transport=self.name
            )
        plan: Plan = []
        keep: list[object] = []
        for copy in copies:  # all of them, before the first byte moves
            source = self._source(copy)
            nbytes, token = self._target(peer, copy.remote)
            if copy.remote_offset < 0 or copy.remote_offset + copy.nbytes > nbytes:
                raise OutOfBounds(
                    f"[{copy.remote_offset}, {copy.remote_offset + copy.nbytes}) lies outside region "
                    f"{copy.remote.id} of the peer, which has {nbytes} bytes",
                    transport=self.name,
                )
            plan.append((token, int(copy.remote_offset), int(source.address + copy.local_offset), int(copy.nbytes)))
            keep.append(source)
        batch = self._begin(peer, plan, keep)
        handle = next(self._handles)
        self._batches[handle] = batch
        return handle

    def _source(self, copy: Copy) -> Memory:
        memory = copy.local
        if isinstance(memory, Region):
            if self._live.get(memory.id) != memory:
                raise OutOfBounds(f"local region {memory.id} is not registered here (any more)", transport=self.name)
            memory = memory.memory
        if memory.kind not in self.capabilities.memory_kinds:
            raise Unsupported(f"cannot read from {memory.kind} memory", transport=self.name)
        if copy.nbytes <= 0 or copy.local_offset < 0 or copy.local_offset + copy.nbytes > memory.nbytes:
            raise OutOfBounds(
                f"{copy.nbytes} bytes at {copy.local_offset} do not lie in local memory of {memory.nbytes} bytes",
                transport=self.name,
            )
        return memory

    def poll(self, handle: int) -> Status:
        return self._batch(handle).status

    def drained(self, handle: int) -> bool:
        return self._batch(handle).drained

    def release(self, handle: int) -> None:
        if not self._batch(handle).drained:
            raise BadCall(f"handle {handle} is not drained", transport=self.name)
        del self._batches[handle]

    def cancel(self, handle: int) -> None:
        self._batch(handle).cancelled = True

    # ---- checks ------------------------------------------------------------------------------------------

    def _batch(self, handle: int) -> J:
        self._check_process()
        batch = self._batches.get(handle)
        if batch is None:
            raise BadCall(f"handle {handle!r} is unknown or released", transport=self.name)
        return batch

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise BadCall(
                f"this {self.name} transport belongs to process {self._pid}, of which this one is a forked copy",
                hint="Open a transport of its own in each process",
                transport=self.name,
            )

    def _check_open(self) -> None:
        self._check_process()
        if self._closed:
            raise BadCall("the transport is closed", transport=self.name)

    def _check_peer(self, peer: Any) -> None:
        if not isinstance(peer, HostPeer) or peer.home is not self._home:
            raise BadCall(f"a {type(peer).__name__} is not a peer of this transport", transport=self.name)


class HostCopyTransport(HostTransport[Batch]):
    """Base of the transports that move bytes with the processor. Not a transport by itself."""

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self._copier = Copier(f"tensorferry-{self.name}-copier")
        # A transport that is dropped without close() must not leave its thread waiting for ever. The thread
        # knows the copier and not the transport, so dropping the transport is noticed.
        weakref.finalize(self, self._copier.stop).atexit = False

    @abstractmethod
    def _start(self, peer: HostPeer, batch: Batch, plan: Plan) -> None:
        """Turn (token, remote offset, source address, bytes) into addresses and submit the batch, now or later."""

    def _begin(self, peer: HostPeer, plan: Plan, keep: list[object]) -> Batch:
        batch = Batch((), keep)
        self._start(peer, batch, plan)
        return batch

    def path(self, peer: Any = None) -> str:
        return "memcpy"

    def on_progress(self, wake: Callable[[], None]) -> None:
        self._check_open()
        self._copier.on_progress(wake)

    # ---- the end -----------------------------------------------------------------------------------------

    def close(self) -> None:
        """Stop within one chunk, fail what is left, release everything.

        A handle can be polled afterwards: DONE, or FAILED for what did not finish; both drained.
        """
        if self._closed or os.getpid() != self._pid:
            # A forked child has neither the threads nor the right to speak for its parent: it lets go of
            # nothing.
            return
        self._closed = True
        drained = False
        try:
            drained = self._close_copier()
        finally:
            self._live.clear()
            self._close(drained)
        if drained:  # the copier has ended: what is not finished by now never began
            for batch in self._batches.values():
                self._copier.finish(batch, Status.FAILED)

    def _close_copier(self) -> bool:
        if self._copier.close(CLOSE_TIMEOUT_S):
            return True
        log.error("%s: a copy did not return within %g s; its memory stays mapped", self.name, CLOSE_TIMEOUT_S)
        for batch in self._batches.values():
            self._copier.give_up_on(batch)
        return False

    @abstractmethod
    def _close(self, drained: bool) -> None:
        """Release what the subclass holds. `drained`: nothing that this transport posted can land any more."""

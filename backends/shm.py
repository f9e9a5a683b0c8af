"""The `shm` transport: between two processes of one host, through shared memory.

The target's memory is a memfd: pages without a name in any file system, so that nothing is left behind
when the process is killed. A writer gets the memfd over the owner's abstract unix socket (the kernel
tells each side the other's user), maps it, and copies. Addresses never travel; a peer's descriptor names
regions, and every copy is checked against them.

Fences. DRAIN: a copy ends by itself. PEER_GONE: a pidfd says that the peer's process has ended, or the
peer told us that it closed with nothing on the way. RETIRE is *not* declared: a writer that has a region
mapped can go on writing to its memory, and the region's Memory is that very memory. What holds instead
is that such writes reach nothing else: once the owner has replaced the region by a newly allocated one
and let go of the old Memory, they land in pages that nobody reads.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import weakref
from dataclasses import dataclass, field
from typing import Annotated, Any

import msgspec

from tensorferry.backends import _process
from tensorferry.backends import _shm_wire as wire
from tensorferry.backends._copier import Batch
from tensorferry.backends._descriptor import decode
from tensorferry.backends._host import this_host
from tensorferry.backends._hostcopy import HostCopyTransport, HostPeer
from tensorferry.backends._mapping import Mapping
from tensorferry.backends._shm_courier import Courier
from tensorferry.backends._shm_link import Link
from tensorferry.core.errors import (
    OutOfBounds,
    TransportError,
    TransportMismatch,
    TransportUnavailable,
    Unsupported,
)
from tensorferry.core.memory import Memory, check_available
from tensorferry.core.transport import (
    Capabilities,
    Fence,
    Options,
    PeerState,
    Probe,
    Readiness,
    Region,
    RemoteRegion,
)


class ShmOptions(Options, frozen=True):
    map_timeout: Annotated[
        float,
        msgspec.Meta(
            gt=0,
            le=3600,
            description="Seconds that a peer has to hand over its memory; then the posts that wait for it fail.",
        ),
    ] = 10.0
    prefault: Annotated[
        bool,
        msgspec.Meta(description="Bring all pages in at allocation and mapping. Without it the first copies are slow."),
    ] = True


class _Slab:
    """A memfd and its mapping here. The file descriptor serves to hand it to peers; the pages live on without it."""

    __slots__ = ("__weakref__", "_close_fd", "fd", "mapping", "nbytes")

    def __init__(self, nbytes: int, prefault: bool) -> None:
        """Raises OSError where there is no memory."""
        check_available(nbytes)
        self.nbytes = nbytes
        self.fd = os.memfd_create("tensorferry", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        # A forked child closes its own copy with its own exit, and must not close a number that it has
        # reused.
        self._close_fd = weakref.finalize(self, _close_in, os.getpid(), self.fd)
        self._close_fd.atexit = False
        os.ftruncate(self.fd, nbytes)
        if prefault:
            # Takes the pages from the kernel, or says at once that there are none; 2.5 times faster than
            # touching them, which the population of the mapping then has not to do (4.8 and 6.7 GB/s
            # against 1.9).
            os.posix_fallocate(self.fd, 0, nbytes)
        # Peers have it mapped: nobody, ourselves included, may change its size under them.
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        self.mapping = Mapping(nbytes, self.fd)
        if prefault:
            self.mapping.populate()

    def close_fd(self) -> None:
        self._close_fd()
        self.fd = -1


def _close_in(pid: int, fd: int) -> None:
    if os.getpid() == pid:
        os.close(fd)


@dataclass(slots=True, eq=False)
class ShmPeer(HostPeer):
    """A shm transport of this host, usually in another process."""

    link: Link = field(kw_only=True)


class ShmTransport(HostCopyTransport):
    """Writes into memory that the peer allocated and shares. See the module's docstring."""

    name = "shm"
    options_type = ShmOptions
    capabilities = Capabilities(
        same_host_only=True,
        registers_sources=False,
        allocates_targets=True,
        cancellable=True,
        notices_dead_peer=True,
        fences=frozenset({Fence.DRAIN, Fence.PEER_GONE}),
        wakes=True,
    )

    @classmethod
    def probe(cls) -> Probe:
        """Makes a memfd and a socket of the kinds that are needed, and looks for pidfd."""
        try:
            host = this_host()
            slab = _Slab(4096, prefault=True)
            slab.close_fd()
            with wire.new_socket() as listener:
                listener.bind(b"\0tensorferry-probe-" + secrets.token_hex(8).encode())
        except (OSError, AttributeError) as error:
            return Probe(
                Readiness.UNAVAILABLE,
                f"shared memory is not to be had: {error}",
                hint="shm needs Linux with memfd, abstract unix sockets and /proc",
            )
        facts = {
            "boot_id": host.boot_id,
            "network_namespace": str(host.network),
            "authentication": "by the kernel: the same user, in this network namespace",
        }
        if not _process.supported():
            return Probe(
                Readiness.DEGRADED,
                "works, but the end of a peer's process cannot be proved",
                hint="pidfd_open is missing: Linux 5.3 or later, and a sandbox that allows it",
                facts=facts,
                path="memcpy",
            )
        return Probe(Readiness.READY, "memfd, abstract unix sockets and pidfd all work", facts=facts, path="memcpy")

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        assert isinstance(self._options, ShmOptions)
        self._prefault = self._options.prefault
        self._patience_s = self._options.map_timeout
        self._instance = secrets.token_bytes(16)
        self._slabs: weakref.WeakSet[_Slab] = weakref.WeakSet()
        self._peers: dict[bytes, ShmPeer] = {}
        try:
            self._host = this_host()
            self._courier = Courier(self._instance, self._copier, self._prefault)
        except OSError as error:
            raise TransportUnavailable(f"shared memory: {error}", transport=self.name) from error
        weakref.finalize(self, self._courier.stop).atexit = False

    # ---- our memory --------------------------------------------------------------------------------------

    def allocate(self, nbytes: int, kind: str = "cpu", device: int = 0) -> Memory:
        """Zeroed, page-aligned, shareable memory. With `prefault` this takes about 0.4 s a GB."""
        self._check_open()
        self._check_wish(nbytes, kind)
        try:
            slab = _Slab(nbytes, self._prefault)
        except OSError as error:
            raise TransportError(
                f"cannot allocate {nbytes} bytes of shared memory: {error}",
                hint="It counts against the memory limit of the container, and each slab is one open file",
                transport=self.name,
            ) from error
        self._slabs.add(slab)
        return Memory(slab.mapping.address, nbytes, kind, slab)

    def _publish(self, region: Region) -> None:
        slab = region.memory.owner
        if (
            not isinstance(slab, _Slab)
            or slab not in self._slabs
            or (region.memory.address, region.memory.nbytes) != (slab.mapping.address, slab.nbytes)
        ):
            raise Unsupported(
                "only memory from this transport's allocate() can be shared with peers",
                hint="Sources need no registration",
                transport=self.name,
            )
        self._courier.share((region.id, region.generation), slab)

    def _withdraw(self, region: Region) -> None:
        self._courier.unshare((region.id, region.generation))

    def describe(self) -> bytes:
        self._check_open()
        return wire.encode(
            wire.Descriptor(
                self.name,
                wire.DESCRIPTOR_VERSION,
                self._instance,
                self._revision,
                self._courier.name,
                self._host,
                os.geteuid(),
                self._pid,
                _process.start_time(self._pid) or 0,
                [(region.id, region.generation, region.memory.nbytes) for region in self._live.values()],
            )
        )

    # ---- peers -------------------------------------------------------------------------------------------

    def connect(self, descriptor: bytes) -> ShmPeer:
        """Returns at once; the peer's memory is fetched and mapped in the background."""
        self._check_open()
        told = decode(descriptor, self.name, wire.DESCRIPTOR_VERSION, wire.Descriptor)
        self._check_reachable(told)
        peer = self._peers.get(told.instance)
        if peer is None:
            watch = _process.watch_claimed(told.pid, told.started) if told.host.shares_pids(self._host) else None
            link = Link(self._courier, told, watch, self._patience_s)
            self._courier.add(link)
            peer = self._peers[told.instance] = ShmPeer(self._home, told.instance, link=link)
        if peer.learn(told.revision, told.regions):
            peer.link.learn(peer.regions)
        return peer

    def _check_reachable(self, told: wire.Descriptor) -> None:
        if told.host.boot_id != self._host.boot_id:
            raise TransportMismatch(
                "the peer runs on another host, and shm works only within one",
                hint="Use a network transport on both sides",
                transport=self.name,
            )
        if told.host.network != self._host.network:
            raise TransportMismatch(
                "the peer is on this host but in another network namespace: its socket is out of reach",
                hint="Share one network namespace (as the containers of a pod do), or use a network transport",
                transport=self.name,
            )
        if told.uid != os.geteuid():
            raise TransportMismatch(
                f"the peer runs as user {told.uid}, this side as user {os.geteuid()}",
                hint="Run both sides as the same user, or use a network transport",
                transport=self.name,
            )

    def disconnect(self, peer: Any) -> None:
        self._check_process()
        self._check_peer(peer)
        if peer.connected:
            peer.connected = False
            self._peers.pop(peer.instance, None)
            self._courier.remove(peer.link)

    def peer_state(self, peer: Any) -> PeerState:
        self._check_process()
        self._check_peer(peer)
        link: Link = peer.link
        if link.closed:
            return PeerState.GONE
        watch = link.watch
        if watch is None:
            return PeerState.UNKNOWN
        return PeerState.GONE if watch.ended() else PeerState.ALIVE

    # ---- writing -----------------------------------------------------------------------------------------

    def _target(self, peer: HostPeer, remote: RemoteRegion) -> tuple[int, wire.Key]:
        key = (remote.id, remote.generation)
        nbytes = peer.regions.get(key)
        if nbytes is None:
            raise OutOfBounds(
                f"the peer has no live region {remote.id} of generation {remote.generation}",
                transport=self.name,
            )
        return nbytes, key

    def _start(self, peer: HostPeer, batch: Batch, plan: list[tuple[Any, int, int, int]]) -> None:
        assert isinstance(peer, ShmPeer)
        if self.peer_state(peer) is PeerState.GONE:  # its pages may outlive it, and nobody will read them
            raise TransportError("the peer has ended", transport=self.name)
        peer.link.submit(batch, plan)

    def cancel(self, handle: int) -> None:
        super().cancel(handle)
        for peer in self._peers.values():  # a post that waits for its peer's memory ends at once
            self._courier.suggest(peer.link.settle)

    def _close(self, drained: bool) -> None:
        self._courier.close(say_closed=drained)
        for slab in self._slabs:
            slab.close_fd()
        self._peers.clear()

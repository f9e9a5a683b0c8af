"""The `nixl` transport: NVIDIA's NIXL over UCX, by RDMA where the host has it, else by copies between the processes of
one host (CMA) and by TCP. Long because it is the whole contract; what it does elsewhere is in `_nixl_*`.

A post becomes requests of at most `submit_bytes`, from one of a few threads of the transport's own (`_nixl_poster`):
between processes of one host the engine copies within the call that posts. A peer is asked whether it answers, by a
byte on a doorstep that it has for this, before anything is written to its regions.

Which way. UCX chooses among what it is given and does not say what it chose. So where an RDMA device is active UCX is
given nothing but RDMA, and "rdma" is known; else a path is "memcpy" to a process of this host whose memory the kernel
lets this one write to, for as long as every request has been over when it was posted, and "tcp" otherwise.

Fences. PEER_GONE: a pidfd says that a peer of this host has ended, and the kernel that UCX has closed every connection
of it (it goes on placing what a dead process has sent). Across hosts there is no proof, and a peer is UNKNOWN for good.
DRAIN is not declared: of a write that was given up bytes lie in the peer's kernel. RETIRE is not: what a peer holds of
a region stays valid whether it is registered or not, over CMA for as long as there is memory at that address, and over
TCP a write to unmapped memory ends this process. So a region stays registered when it is retired, until no peer is left
that was told of it; and the addresses of memory that was allocated here are never used for anything else.

CUDA memory is taken where UCX is given nothing but RDMA and has its CUDA module: then a card reads and writes it, and
`flush` makes visible what was written. Not run on a GPU.

Whoever can connect to UCX's ports can write to any address of this process: they listen on every interface and ask for
no password. Use it in networks that you trust, as you would the engine itself.
"""

from __future__ import annotations

import time
import weakref
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from tensorferry.backends import _nixl_environment as environment
from tensorferry.backends import _nixl_wire as wire
from tensorferry.backends import _process
from tensorferry.backends._addresses import local_addresses
from tensorferry.backends._descriptor import decode
from tensorferry.backends._engine_jobs import Segment
from tensorferry.backends._engine_transport import EnginePeer, EngineTransport
from tensorferry.backends._hostcopy import HostPeer, Plan
from tensorferry.backends._mapping import Mapping
from tensorferry.backends._nixl_choice import choose, copies_refused
from tensorferry.backends._nixl_crew import Crew
from tensorferry.backends._nixl_engine import Agent, Route
from tensorferry.backends._nixl_environment import MEMCPY, RDMA, TCP, Unfit
from tensorferry.backends._nixl_jobs import Job, Target, cut
from tensorferry.backends._nixl_keeping import Sealed, outlive
from tensorferry.backends._nixl_options import NixlOptions
from tensorferry.backends._nixl_poster import Limits
from tensorferry.backends._nixl_sockets import Aftermath
from tensorferry.backends._rdma import rdma_ports
from tensorferry.backends._variables import left_as_found
from tensorferry.core.cuda_driver import carried
from tensorferry.core.errors import ProtocolViolation, TransportError, TransportMismatch, TransportUnavailable
from tensorferry.core.memory import Memory
from tensorferry.core.transport import (
    MAX_DESCRIPTOR_BYTES,
    Capabilities,
    Fence,
    Options,
    Probe,
    Readiness,
    Region,
    Status,
)


@dataclass(slots=True, eq=False)
class NixlPeer(EnginePeer):
    """An agent of another process, or of this one."""

    target: Target = field(kw_only=True)
    way: str = field(kw_only=True)
    """What carries to it, as far as it is known before a byte has moved."""
    aftermath: Aftermath | None = None
    """What it has sent and is still to land, once it has ended."""
    addresses: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)
    """Where each region begins, and the GPU that it lies on (-1: host memory)."""


class NixlTransport(EngineTransport[Job, NixlPeer]):
    """Writes into memory that peers have registered with their agents. See the module's docstring."""

    name = "nixl"
    options_type = NixlOptions
    capabilities = Capabilities(
        preferred_post_bytes=4 << 20,
        registers_sources=True,
        cancellable=True,
        notices_dead_peer=True,
        fences=frozenset({Fence.PEER_GONE}),
        wakes=True,
    )
    sets = environment.SetsHere()

    @classmethod
    def probe(cls) -> Probe:
        """Looks for the engine's files and the RDMA devices, and leaves no variable set. The engine is started only
        where a device is active: nothing else tells whether UCX can use it."""
        try:
            module = environment.module_name()
            environment.binding_file(module)
            environment.refuse_dangers()
            cause, remedy = environment.why_not_rdma()
            environment.refuse_nothing_left(cause, remedy)
            if not cause:
                with left_as_found(environment.SETS):
                    Agent("UCX", RDMA, 1).close()
        except Unfit as unfit:
            return Probe(Readiness.UNAVAILABLE, unfit.reason, unfit.hint, _facts())
        except Exception as error:  # noqa: BLE001 - whatever the engine raises is the answer
            return Probe(Readiness.BROKEN, f"starting NIXL fails: {error!r}", environment.reinstall(), _facts())
        refused = copies_refused()
        facts = {
            **_facts(),
            "ucx_transports": environment.named_ways(refused),
            "cma": f"refused: {refused}" if refused else "permitted",
            "ptrace_scope": environment.ptrace_scope(),
            "listens": "over TCP on all interfaces, for anybody who can connect",
            "authentication": "none: whoever connects can write to any memory of the process",
            **({"ports": ports} if (ports := environment.port_range()) else {}),
            "binding": "UCX_NET_DEVICES=eth0 (say) keeps UCX to that interface",
            **carried(
                *environment.why_not_cuda(module, "UCX", environment.ways("ib" if not cause else "tcp")),
                "UCX takes that way by itself where the kernel and the driver have it",
            ),
        }
        if not cause:
            return Probe(Readiness.READY, "UCX can use an active RDMA device", facts=facts, path=RDMA)
        if MEMCPY in environment.allowed() and not refused:
            works = "works by copies between processes of this host, and over TCP to others"
        else:
            works = "works over TCP"
        return Probe(Readiness.DEGRADED, f"{works}: {cause}", remedy, facts, path=TCP)

    def __init__(self, options: Options) -> None:
        """Starts an agent: 0.1 s, and a few threads. Raises TransportUnavailable."""
        super().__init__(options)
        assert isinstance(self._options, NixlOptions)
        chosen = self._options
        try:
            self._ways, require = choose(chosen)
            found, _ = environment.why_not_cuda(environment.module_name(), chosen.backend, self._ways)
            agent = Agent(chosen.backend, require, chosen.workers, cuda=not found)
        except Unfit as unfit:
            raise TransportUnavailable(unfit.reason, hint=unfit.hint, transport=self.name) from unfit
        if not found:
            self._take_cuda()
        self._agent = agent
        limits = Limits(chosen.window, chosen.contact_timeout, chosen.progress_timeout)
        self._crew = Crew(agent, limits, chosen.workers)
        self._employ(self._crew)
        self._targets: weakref.WeakValueDictionary[tuple[object, ...], Target] = weakref.WeakValueDictionary()
        self._found_at = local_addresses()[: wire.MAX_ADDRESSES]
        self._described: tuple[int, bytes] = (-1, b"")

    # ---- our memory --------------------------------------------------------------------------------------

    def allocate(self, nbytes: int, kind: str = "cpu", device: int = 0) -> Memory:
        """Host memory's addresses are used for nothing else in this process, ever: a peer may copy into them late. (To
        a GPU's memory only a card writes, and not beyond its registration.)"""
        memory = super().allocate(nbytes, kind, device)
        if not isinstance(memory.owner, Mapping):
            return memory
        return Memory(memory.address, nbytes, kind, Sealed(memory.owner))

    def _publish(self, region: Region) -> None:
        known = self._retired.pop(region.memory, None)
        if known is None:  # else the engine has it still
            self._check_engine()
            self._agent.register(region.memory)
        self._live[region.id] = region
        try:
            told = len(self._encode(self._revision + 1))
        except TransportError:  # a call does not come back: the engine has it, and no peer was told
            self._retired[region.memory] = known or set()
            raise
        finally:
            del self._live[region.id]
        if told > MAX_DESCRIPTOR_BYTES:
            self._agent.unregister(region.memory)
            raise TransportError(
                f"the descriptor of {len(self._live) + 1} regions would have {told} bytes",
                hint="Register fewer, larger regions",
                transport=self.name,
            )

    def _unregister(self, memory: Memory) -> bool:
        return not self._crew.stuck() and self._agent.unregister(memory)

    def _check_engine(self) -> None:
        """Raises TransportError where a call that needs all of the engine would wait for ever."""
        if self._crew.stuck():
            raise TransportError("a thread does not come back from the engine", transport=self.name)

    def describe(self) -> bytes:
        self._check_open()
        if self._described[0] != self._revision:
            self._described = (self._revision, self._encode(self._revision))
        return self._described[1]

    def _encode(self, revision: int) -> bytes:
        assert isinstance(self._options, NixlOptions)
        live = self._live.values()
        self._check_engine()
        metadata = self._agent.metadata()
        return wire.encode(
            wire.Descriptor(
                self.name,
                wire.DESCRIPTOR_VERSION,
                self._instance,
                revision,
                self._agent.name,
                self._options.backend,
                sorted(self._ways),
                self._agent.ports,
                self._host,
                self._pid,
                _process.start_time(self._pid) or 0,
                self._agent.doorstep,
                wire.checksum(metadata),
                metadata,
                [region.memory.address for region in live],
                [(region.id, region.generation, region.memory.nbytes) for region in live],
                [_gpu(region.memory) for region in live],
                self._found_at,
            )
        )

    # ---- peers -------------------------------------------------------------------------------------------

    def connect(self, descriptor: bytes) -> NixlPeer:
        """Returns at once; the engine hears of the peer, and asks whether it answers, before the first write to it."""
        self._check_open()
        told = decode(descriptor, self.name, wire.DESCRIPTOR_VERSION, wire.Descriptor)
        if (
            not len(told.addresses) == len(told.regions) == len(told.gpus)
            or wire.checksum(told.metadata) != told.checksum
        ):
            raise ProtocolViolation("a descriptor that contradicts itself", transport=self.name)
        peer = self._peers.get(told.instance)
        if peer is None:
            way = self._way(told)
            # Of another backend than UCX it is not known what it still places when a peer has ended.
            seen = way == RDMA or self._host.shares_network(told.host)
            traceable = told.backend == "UCX" and seen
            who = (told.agent, told.instance, told.pid, told.started)
            target = self._targets.get(who)  # it may have been connected before, and not be forgotten yet
            if target is None:
                target = self._targets[who] = Target(told, self._watch(told))
            peer = NixlPeer(self._home, told.instance, target=target, way=way, traceable=traceable)
            self._peers[told.instance] = peer
        if peer.learn(told.revision, told.regions):
            peer.target.told = told
            keys = ((number, generation) for number, generation, _ in told.regions)
            peer.addresses = dict(zip(keys, zip(told.addresses, told.gpus, strict=True), strict=True))
        return peer

    def _way(self, told: wire.Descriptor) -> str:
        """What will carry to a peer. Raises TransportMismatch where nothing can."""
        assert isinstance(self._options, NixlOptions)
        if told.backend != self._options.backend:
            raise TransportMismatch(
                f"this side uses NIXL's {self._options.backend} backend, the peer {told.backend}",
                hint="Give the option backend the same value on both sides",
                transport=self.name,
            )
        if self._options.backend != "UCX":
            return self._options.backend.lower()
        both = self._ways & set(told.ways)
        if not both:
            raise TransportMismatch(
                f"UCX has {', '.join(sorted(self._ways))} here and {', '.join(told.ways)} at the peer",
                hint='Set require="tcp" on both sides, or give the other side its RDMA device',
                transport=self.name,
            )
        if RDMA in both:  # with others beside it UCX may choose any of them
            return RDMA if both == {RDMA} else TCP
        refused = self._copies_refused(told) if MEMCPY in both else "UCX is not given it"
        if not refused:
            return MEMCPY
        if self._options.require == MEMCPY:
            raise TransportMismatch(
                f"memcpy is required, and the peer's memory cannot be written to: {refused}", transport=self.name
            )
        return TCP

    def _copies_refused(self, told: wire.Descriptor) -> str:
        if not self._host.shares_pids(told.host):
            return "it is not a process of this host and PID namespace"
        return environment.copy_refused(told.pid, told.doorstep)

    def _part(self, peer: NixlPeer) -> None:
        self._crew.forget(peer.target)

    def _settled(self, peer: NixlPeer) -> bool:
        if peer.way == RDMA or self._agent.ended:
            return True
        if peer.aftermath is None:
            peer.aftermath = self._agent.aftermath(peer.target.told.ports)
        return peer.aftermath.settled()

    def path(self, peer: Any = None) -> str:
        """To a peer: see the module's docstring. To nobody in particular: what holds for all of them."""
        if peer is None:
            assert isinstance(self._options, NixlOptions)
            if self._options.backend != "UCX":
                return self._options.backend.lower()
            if self._ways == {RDMA} or self._options.require == MEMCPY:
                return self._options.require or RDMA
            return TCP
        self._check_peer(peer)
        if peer.way == MEMCPY and not peer.target.at_once:
            return TCP
        return str(peer.way)

    # ---- writing -----------------------------------------------------------------------------------------

    def _begin(self, peer: HostPeer, plan: Plan, keep: list[object]) -> Job:
        assert isinstance(peer, NixlPeer)
        routes: dict[Route, list[Segment]] = {}
        for local, ((base, gpu), offset, source, nbytes) in zip(keep, plan, strict=True):
            assert isinstance(local, Memory)
            segment = (local, base, source, base + offset, nbytes)
            routes.setdefault((_gpu(local), gpu), []).append(segment)
        batches = deque(
            (route, batch) for route, segments in routes.items() for batch in cut(segments, self._submit_bytes)
        )
        job = Job(peer.target, batches, keep, time.monotonic())
        self._crew.write(job)
        return job

    @property
    def _submit_bytes(self) -> int:
        assert isinstance(self._options, NixlOptions)
        return self._options.submit_bytes

    def source_free(self, handle: int) -> bool:
        """The engine reads a source no more once each request of it has ended: one that is given up ends with its
        connection, which is cut. Over RDMA it ends when the device has given it up."""
        job = self._batch(handle)
        return job.drained or (job.status is Status.UNKNOWN and job.quiet)

    def _closing(self) -> None:
        outlive(
            [*[region.memory for region in self._live.values()], *self._retired],
            [peer.target for peer in (*self._peers.values(), *self._parted.values()) if peer.way == MEMCPY],
        )


def _facts() -> dict[str, str]:
    """What can be told of an engine that does not run, and may not be there."""
    found = environment.installed()
    return {
        **({"engine": f"{found} {environment.version(found)}"} if found else {}),
        "rdma_devices": ", ".join(f"{name} ({'active' if up else 'down'})" for name, up in rdma_ports().items())
        or "none",
        **environment.said("UCX_TLS", "UCX_NET_DEVICES", "UCX_MODULES"),
    }


def _gpu(memory: Memory) -> int:
    """The number of the GPU that it lies on; -1: none."""
    return memory.device if memory.kind == "cuda" else -1

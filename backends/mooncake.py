"""The `mooncake` transport: the Mooncake Transfer Engine, over RDMA where the host has it, else over TCP.

A post becomes submits of one entry each, at most `submit_bytes` long, `window` of them under way per peer, all from a
thread of the transport's own (`_mooncake_poster`), each polled to its end. A peer is asked whether it is there before
the engine is (`_mooncake_contact`), and over TCP its token is read before anything is written: it is this engine, and
none that has its ports by now.

Fences. PEER_GONE: a pidfd says that a peer of this host has ended, and the kernel's tables that nothing of it is left
on the way to our memory (the engine goes on placing what a dead process has sent). Across hosts there is no proof, and
a peer is UNKNOWN for good. DRAIN is not declared: after a time-out bytes lie in the peer's kernel, for as long as it
is stopped. RETIRE is not: a write whose header the engine has checked goes on into the memory although that is
unregistered meanwhile. So a region stays registered when it is retired, others' writes into it end as they should, and
a late one lands in memory that is still there; it is unregistered when no peer is left that was told of it.

CUDA memory is taken by the engine's build with CUDA over RDMA: a card reads and writes it, and `flush` makes visible
what was written. Not run on a GPU.

Whoever can connect to the engine's ports can read and write all registered memory: they listen on every interface and
ask for no password. Use it in networks that you trust, as you would the engine itself.
"""

from __future__ import annotations

import os
import secrets
import time
from dataclasses import dataclass, field
from typing import Any

from tensorferry.backends import _mooncake_environment as environment
from tensorferry.backends import _mooncake_wire as wire
from tensorferry.backends import _process
from tensorferry.backends._addresses import local_addresses
from tensorferry.backends._descriptor import decode
from tensorferry.backends._engine_transport import EnginePeer, EngineTransport
from tensorferry.backends._hostcopy import HostPeer, Plan
from tensorferry.backends._mapping import Mapping
from tensorferry.backends._mooncake_contact import check_protocols
from tensorferry.backends._mooncake_engine import Engine, load
from tensorferry.backends._mooncake_environment import Unfit
from tensorferry.backends._mooncake_jobs import Job, Target, cut
from tensorferry.backends._mooncake_options import MooncakeOptions
from tensorferry.backends._mooncake_poster import Limits, Poster
from tensorferry.backends._mooncake_sockets import Aftermath
from tensorferry.core.cuda_driver import carried
from tensorferry.core.errors import ConfigError, ProtocolViolation, TransportUnavailable
from tensorferry.core.memory import Memory
from tensorferry.core.transport import Capabilities, Fence, Options, Probe, Readiness, Region, Status


@dataclass(slots=True, eq=False)
class MooncakePeer(EnginePeer):
    """An engine of another process, or of this one."""

    target: Target = field(kw_only=True)
    aftermath: Aftermath | None = None


class MooncakeTransport(EngineTransport[Job, MooncakePeer]):
    """Writes into memory that peers have registered with their engines. See the module's docstring."""

    name = "mooncake"
    options_type = MooncakeOptions
    capabilities = Capabilities(
        preferred_post_bytes=4 << 20,
        registers_sources=True,
        cancellable=True,
        notices_dead_peer=True,
        fences=frozenset({Fence.PEER_GONE}),
        wakes=True,
    )
    sets = environment.SETS

    @classmethod
    def probe(cls) -> Probe:
        """Looks at the RDMA devices and the engine's libraries; starts no engine and leaves no variable set.

        Nothing of the engine is imported: it may not be chosen, and the process may use Mooncake for something else.
        The CUDA build is, all the same: nothing else tells what it lacks.
        """
        try:
            cause, remedy = environment.why_not_rdma()
            environment.refuse_dangers()
            environment.check_installed()
            if environment.is_cpu_build():
                environment.check_libraries()
            else:
                with environment.prepared_for_now():
                    load()
        except Unfit as unfit:
            return Probe(Readiness.UNAVAILABLE, unfit.reason, unfit.hint, _facts())
        except Exception as error:  # noqa: BLE001 - whatever an engine's import raises is the answer
            why = f"importing the Mooncake engine fails: {error!r}"
            return Probe(Readiness.BROKEN, why, environment.INSTALL, _facts())
        facts = _facts() | {"address": _own_address("auto"), **environment.EXPOSURE, "ports": environment.port_range()}
        facts |= carried(*environment.why_not_cuda("tcp" if cause else "rdma"), environment.DMA_BUF)
        if cause:
            works = "works over TCP"
            if facts["address"] in ("127.0.0.1", "::1") and local_addresses():
                family, other = ("IPv6", "unset") if facts["address"] == "::1" else ("IPv4", "set")
                works = f"works over TCP, within this host alone, which has no address of {family} for others"
                remedy = f"For other hosts {other} MC_USE_IPV6. {remedy}"
            return Probe(Readiness.DEGRADED, f"{works}: {cause}", remedy, facts, path="tcp")
        return Probe(Readiness.READY, "an active RDMA device is there", facts=facts, path="rdma")

    def __init__(self, options: Options) -> None:
        """Starts an engine: milliseconds, and two threads. Raises TransportUnavailable, ConfigError."""
        super().__init__(options)
        assert isinstance(self._options, MooncakeOptions)
        chosen = self._options
        if chosen.protocol:
            raise ConfigError(
                f"the Mooncake engine ignores the protocol that it is given ({chosen.protocol!r})",
                hint='It uses RDMA where it can. Set require="rdma" to insist on that, or MC_FORCE_TCP=1 for TCP',
                transport=self.name,
            )
        try:
            environment.refuse_dangers()
            self._refuse_in_vain(chosen)
            progress_s, transfer_s = environment.prepare(chosen.progress_timeout, chosen.transfer_timeout)
            self._address = _own_address(chosen.host)
            self._engine = Engine(self._address, chosen.device)
        except Unfit as unfit:
            raise TransportUnavailable(unfit.reason, hint=unfit.hint, transport=self.name) from unfit
        self._token, self._doorstep = secrets.token_bytes(16), 0
        if self._engine.protocol == "tcp":
            self._show_token()
        if not environment.why_not_cuda(self._engine.protocol)[0]:
            self._take_cuda()
        self._poster = Poster(
            self._engine, Limits(chosen.window, chosen.contact_timeout, transfer_s, environment.lanes())
        )
        self._employ(self._poster)
        self._submit_bytes = chosen.submit_bytes
        self._ends_reading = progress_s < transfer_s and self._engine.protocol == "tcp"
        try:
            self._check_path(chosen)
        except TransportUnavailable:
            self.close()
            raise

    def _show_token(self) -> None:
        """Where peers read it, in a page that peers may write to like any other that is registered."""
        page = Mapping(len(self._token))
        memory = Memory(page.address, len(self._token), "cpu", page)
        memory.view()[:] = self._token
        self._engine.register(memory)
        self._doorstep = memory.address

    def _refuse_in_vain(self, chosen: MooncakeOptions) -> None:
        """Before an engine is started: what is asked for cannot be had here."""
        if chosen.require or chosen.device:
            environment.check_installed()
            cause, remedy = environment.why_not_rdma(chosen.device)
            if cause:
                what = f'require="{chosen.require}"' if chosen.require else f"device={chosen.device!r}"
                raise Unfit(f"{what} cannot be had: {cause}, and the engine would use TCP", remedy)

    def _check_path(self, chosen: MooncakeOptions) -> None:
        """The engine's own word: what it has installed. Anything but "rdma" there fails what insists on RDMA."""
        if (chosen.require or chosen.device) and self._engine.protocol != "rdma":
            raise TransportUnavailable(
                f"the engine runs over {self._engine.protocol}, although an RDMA device is active "
                f"({', '.join(environment.rdma_ports())})",
                hint="`ibv_devinfo` has to list the device: its user-space driver is in Debian's ibverbs-providers",
                transport=self.name,
            )

    # ---- our memory --------------------------------------------------------------------------------------

    def _publish(self, region: Region) -> None:
        if self._retired.pop(region.memory, None) is not None:
            return  # the engine has it still
        self._engine.register(region.memory)

    def _unregister(self, memory: Memory) -> bool:
        self._engine.unregister(memory)
        return True

    def describe(self) -> bytes:
        self._check_open()
        live = self._live.values()
        return wire.encode(
            wire.Descriptor(
                self.name,
                wire.DESCRIPTOR_VERSION,
                self._instance,
                self._revision,
                self._address,
                self._engine.port,
                self._engine.data_port,
                self._engine.protocol,
                self._host,
                self._pid,
                _process.start_time(self._pid) or 0,
                self._doorstep,
                self._token,
                [region.memory.address for region in live],
                [(region.id, region.generation, region.memory.nbytes) for region in live],
            )
        )

    # ---- peers -------------------------------------------------------------------------------------------

    def connect(self, descriptor: bytes) -> MooncakePeer:
        """Returns at once; the peer is asked whether it answers before the first write to it."""
        self._check_open()
        told = decode(descriptor, self.name, wire.DESCRIPTOR_VERSION, wire.Descriptor)
        if len(told.addresses) != len(told.regions):
            raise ProtocolViolation("a descriptor whose regions have no addresses", transport=self.name)
        check_protocols(self._engine.protocol, told.protocol)
        peer = self._peers.get(told.instance)
        if peer is None:
            traceable = told.protocol != "tcp" or self._host.shares_network(told.host)
            target = Target(told, self._watch(told))
            peer = MooncakePeer(self._home, told.instance, target=target, traceable=traceable)
            self._peers[told.instance] = peer
        if peer.learn(told.revision, told.regions):
            keys = ((number, generation) for number, generation, _ in told.regions)
            peer.addresses = dict(zip(keys, told.addresses, strict=True))
        return peer

    def _settled(self, peer: MooncakePeer) -> bool:
        if self._engine.protocol != "tcp" or self._poster.engine_ended:
            return True  # and not because `close` was called: it may have left the engine as it is
        if peer.aftermath is None:
            peer.aftermath = Aftermath(self._engine.data_port)
        return peer.aftermath.settled()

    def _closing(self) -> None:
        for job in self._batches.values():
            self._poster.give_up_on(job)

    def path(self, peer: Any = None) -> str:
        """What the engine has installed, by its own word. Two engines that differ are refused at `connect`.

        That is the evidence there is, and it holds after a transfer as before. An engine installs one way when it is
        initialized, RDMA or TCP, and that is where it falls back without a word; it takes each write by the way that
        the target's segment names, and refuses one that it has not installed (MultiTransport::selectTransport). Of
        the bytes themselves it tells nothing: its metrics (MC_TE_METRIC) count all ways together.
        """
        if peer is not None:
            self._check_peer(peer)
        return self._engine.protocol

    # ---- writing -----------------------------------------------------------------------------------------

    def _begin(self, peer: HostPeer, plan: Plan, keep: list[object]) -> Job:
        assert isinstance(peer, MooncakePeer)
        segments = [
            (local, base, source, base + offset, nbytes)
            for local, (base, offset, source, nbytes) in zip(keep, plan, strict=True)
        ]
        job = Job(peer.target, cut(segments, self._submit_bytes), keep, time.monotonic())
        self._poster.write(job)
        return job

    def source_free(self, handle: int) -> bool:
        """Over TCP the engine reads a source no more once each submit of it has failed or was given up: a stopped peer
        ends a submit by the progress time-out, which closes its connection. (With a progress time-out that is not below
        the transfer time-out the connection outlives the submit.) Over RDMA only the peer's end is known to do."""
        job = self._batch(handle)
        return job.drained or (self._ends_reading and job.status is Status.UNKNOWN and job.quiet)


def _facts() -> dict[str, str]:
    """What can be told of an engine that does not run, and may not be there."""
    version = environment.installed_version()
    ports = environment.rdma_ports()
    unsound = environment.why_unsound()
    return {
        **({"engine": version} if version else {}),
        "rdma_devices": ", ".join(f"{name} ({'active' if up else 'down'})" for name, up in ports.items()) or "none",
        **{name: os.environ[name] for name in environment.CHOOSES if name in os.environ},
        **({"time_outs": unsound} if unsound else {}),
    }


def _own_address(host: str) -> str:
    """The address that goes into our descriptor. Raises Unfit for one that the engine cannot use."""
    ipv6 = bool(os.environ.get("MC_USE_IPV6"))
    if host != "auto":
        if ":" in host and not ipv6:
            raise Unfit(f"host={host}: the engine listens on IPv4", "Give an IPv4 address, or set MC_USE_IPV6=1")
        return host
    usable = [address for address in local_addresses() if (":" in address) == ipv6]
    return usable[0] if usable else ("::1" if ipv6 else "127.0.0.1")

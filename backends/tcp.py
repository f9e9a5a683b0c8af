"""The `tcp` transport: between hosts where no engine is installed, over plain sockets.

Long because every verb of the contract stands here, with the options and what a descriptor's address means.

Bytes go from the caller's memory to the kernel and from the kernel into the registered region: no other copy. The
owner of a region places what arrives in it (`_tcp_harbor`), so it is the owner who checks each write, and a write is
DONE when the owner has said that its last byte is in place (`_tcp_link`). A few threads (`_tcp_lane`) serve all
connections; with two connections to a peer both sides use two cores (benchmarks/tcp_rates.py).

Fences. DRAIN: a write whose connection broke is UNKNOWN, and drained once the owner has welcomed a later connection of
the same link, or is proved gone. RETIRE: after `retire` nothing is placed in the region any more, whatever was on its
way; memory that is registered twice is fenced when both are retired. PEER_GONE: a pidfd says that the process of a
peer on this host has ended, or the peer told us that it closed with nothing on the way; and in both cases every
connection of that peer has been ended here first, for what it had sent could still wait in our sockets. The end of a
connection, a reset or silence are no proof.

Nothing on the wire is encrypted. The descriptor holds a random token, which every connection has to present: use the
transport in networks where nobody else can listen.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import re
import secrets
import socket
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any

import msgspec

from tensorferry.backends import _hostcopy, _process
from tensorferry.backends import _tcp_wire as wire
from tensorferry.backends._addresses import local_addresses
from tensorferry.backends._descriptor import decode
from tensorferry.backends._host import this_host
from tensorferry.backends._hostcopy import HostPeer, HostTransport, Plan
from tensorferry.backends._tcp_harbor import BACKLOG, Harbor
from tensorferry.backends._tcp_lane import Lane
from tensorferry.backends._tcp_link import PIECE_BYTES, Limits, Link, Part, Piece, Post, Route
from tensorferry.backends._waking import wake_owner
from tensorferry.core.errors import (
    ConfigError,
    OutOfBounds,
    ProtocolViolation,
    TransportError,
    TransportMismatch,
    TransportUnavailable,
)
from tensorferry.core.transport import (
    Capabilities,
    Fence,
    Options,
    PeerState,
    Probe,
    Readiness,
    Region,
    RemoteRegion,
    Status,
)

log = logging.getLogger("tensorferry.backends.tcp")

CONNECTIONS = 2
"""By benchmarks/tcp_rates.py on 2 cores, loopback: against one plain connection 0.99, 1.01 and 0.94 times its rate with
1, 2 and 4 of ours at 16 MiB, 1.31, 1.41 and 1.42 at 128 MiB, and 0.63, 0.71 and 0.48 at 1 MiB; ZMQ 0.45 to 0.86."""

SPLIT_BYTES = 1 << 20
"""A post of so many bytes goes over all connections of its peer; a smaller one over the least busy."""

LOOPBACK = ("127.0.0.1", "::1")


class TcpOptions(Options, frozen=True):
    host: Annotated[
        str,
        msgspec.Meta(
            description="IP address to listen on and to tell peers. auto: listen on all interfaces, and tell peers the "
            "addresses of those that are up, best first."
        ),
    ] = "auto"
    port: Annotated[
        int | str,
        msgspec.Meta(description='Port to listen on; 0: any free one; "15000-15100": the first free one of these.'),
    ] = 0
    connections: Annotated[
        int,
        msgspec.Meta(ge=1, le=16, description="Connections to each peer, and threads that serve all of them."),
    ] = CONNECTIONS
    connect_timeout: Annotated[
        float,
        msgspec.Meta(
            gt=0,
            le=600,
            description="Seconds that each address of a peer has to answer. If none does, the posts that wait fail.",
        ),
    ] = 5.0
    io_timeout: Annotated[
        float,
        msgspec.Meta(
            gt=0,
            le=3600,
            description="Seconds without progress after which the outcome of a write is unknown and its connection is "
            "closed.",
        ),
    ] = 10.0


@dataclass(slots=True, eq=False)
class TcpPeer(HostPeer):
    """A tcp transport, usually on another host."""

    route: Route = field(kw_only=True)
    links: list[Link] = field(kw_only=True)
    barring: bool = False
    barred: bool = False
    """Nothing of it lands here any more."""

    def bar_done(self) -> None:
        self.barred = True


class _Bell:
    """The function given to `on_progress`, if any. Known to the lanes, which do not know the transport."""

    def __init__(self) -> None:
        self.wake: Callable[[], None] | None = None

    def ring(self) -> None:
        wake_owner(self.wake, log)


class TcpTransport(HostTransport[Post]):
    """Writes into the registered memory of peers that any network reaches. See the module's docstring."""

    name = "tcp"
    options_type = TcpOptions
    capabilities = Capabilities(
        registers_sources=False,
        cancellable=True,
        notices_dead_peer=True,
        fences=frozenset({Fence.DRAIN, Fence.RETIRE, Fence.PEER_GONE}),
        wakes=True,
    )

    @classmethod
    def probe(cls) -> Probe:
        """Listens for a moment, and looks which addresses there are."""
        try:
            this_host()
            _listen("auto", [0]).close()
        except (OSError, AttributeError) as error:
            return Probe(
                Readiness.UNAVAILABLE,
                f"no socket to listen on: {error}",
                hint="tcp needs Linux with /proc, and a network namespace with at least a loopback interface",
            )
        addresses = local_addresses()
        facts = {
            "addresses": ", ".join(addresses) or "loopback only",
            "connections": str(CONNECTIONS),
            "authentication": "a random token of 128 bits, which peers learn over the control channel",
            "binding": "the option host: one address instead of all; the option port: a port or a range",
        }
        if not addresses:
            return Probe(
                Readiness.DEGRADED,
                "works within this host only: no interface but loopback is up",
                hint="Bring a network interface up, or use shm",
                facts=facts,
                path="tcp",
            )
        return Probe(Readiness.READY, "sockets work", facts=facts, path="tcp")

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        assert isinstance(self._options, TcpOptions)
        self._limits = Limits(self._options.connect_timeout, self._options.io_timeout)
        self._instance = secrets.token_bytes(16)
        self._peers: dict[bytes, TcpPeer] = {}
        self._links: list[Link] = []
        self._link_number = 0
        self._bell = _Bell()
        host, ports = _host(self._options.host), _ports(self._options.port)
        lanes: list[Lane] = []
        try:
            self._host = this_host()
            listener = _listen(host, ports)
            try:
                for index in range(self._options.connections):
                    lanes.append(Lane(index))  # noqa: PERF401 - those that were made have to be stopped if one fails
            except OSError:
                listener.close()
                raise
        except OSError as error:
            _stop(lanes)
            raise TransportUnavailable(
                f"cannot listen on {host}, port {self._options.port}: {error}", transport=self.name
            ) from error
        self._lanes = lanes
        self._port = int(listener.getsockname()[1])
        self._listens = (host, listener.family)
        self._harbor = Harbor(self._instance, secrets.token_bytes(16), lanes, listener)
        # A transport that is dropped without close() must not leave its threads waiting for ever. They do not know the
        # transport, so dropping it is noticed.
        weakref.finalize(self, _stop, lanes).atexit = False

    # ---- our memory --------------------------------------------------------------------------------------

    def _publish(self, region: Region) -> None:
        self._harbor.publish((region.id, region.generation), region.memory)

    def _withdraw(self, region: Region) -> None:
        """The fence: waits for the chunk that is being placed, which takes well under a millisecond."""
        if not self._harbor.withdraw((region.id, region.generation), _hostcopy.CLOSE_TIMEOUT_S):
            raise TransportError(
                f"a chunk was being placed for {_hostcopy.CLOSE_TIMEOUT_S:g} s; the region is not fenced",
                transport=self.name,
                memory_reusable=False,
            )

    def describe(self) -> bytes:
        self._check_open()
        return msgspec.msgpack.encode(
            wire.Descriptor(
                self.name,
                wire.DESCRIPTOR_VERSION,
                self._instance,
                self._revision,
                self._harbor.token,
                self._host,
                self._pid,
                _process.start_time(self._pid) or 0,
                _own_addresses(*self._listens),  # as they are now: the network may have come up since
                self._port,
                [(region.id, region.generation, region.memory.nbytes) for region in self._live.values()],
            )
        )

    # ---- peers -------------------------------------------------------------------------------------------

    def connect(self, descriptor: bytes) -> TcpPeer:
        """Returns at once; dials in the background. Posts wait for the connection."""
        self._check_open()
        told = decode(descriptor, self.name, wire.DESCRIPTOR_VERSION, wire.Descriptor)
        peer = self._peers.get(told.instance)
        if peer is None:
            watch = _process.watch_living(told.pid, told.started) if told.host.shares_pids(self._host) else None
            route = Route(told, self._way_to(told), watch, self._instance, self._limits)
            peer = TcpPeer(self._home, told.instance, route=route, links=self._new_links(route))
            self._peers[told.instance] = peer
        peer.learn(told.revision, told.regions)
        return peer

    def _way_to(self, told: wire.Descriptor) -> list[str]:
        """The peer's addresses, those first that are likeliest to be it."""
        try:
            near = [address for address in told.addresses if ipaddress.ip_address(address).is_loopback]
        except ValueError as error:
            raise ProtocolViolation(f"not an IP address: {error}", transport=self.name) from error
        far = [address for address in told.addresses if address not in near]
        if told.host.shares_network(self._host):
            return near + far
        if not far:
            raise TransportMismatch(
                "the peer listens on loopback only, and is not on this host or in another network namespace",
                hint="Set the tcp option host of the peer to auto, or to an address that this host reaches",
                transport=self.name,
            )
        return far

    def _new_links(self, route: Route) -> list[Link]:
        links = []
        for index in range(len(self._lanes)):
            lane = self._lanes[self._link_number % len(self._lanes)]
            links.append(Link(lane, route, self._link_number, keep_up=index == 0))
            self._link_number += 1
        self._links = [link for link in self._links if not link.forgotten] + links
        for link in links[:1]:  # the others connect with their first post
            self._tell(link, link.begin)
        return links

    def _tell(self, link: Link, command: Callable[[], None]) -> None:
        if not link.lane.suggest(command):
            raise TransportError("a thread of the tcp transport has ended", transport=self.name)

    def disconnect(self, peer: Any) -> None:
        self._check_process()
        self._check_peer(peer)
        if peer.connected:
            peer.connected = False
            self._peers.pop(peer.instance, None)
            for link in peer.links:
                link.lane.suggest(link.let_go)

    def peer_state(self, peer: Any) -> PeerState:
        """GONE: its process has ended or it told us that it closed, and nothing that it sent is still to land here."""
        self._check_process()
        self._check_peer(peer)
        route: Route = peer.route
        if route.over():
            if not peer.barring:
                peer.barring = True
                self._harbor.bar(peer.instance, peer.bar_done)
            return PeerState.GONE if peer.barred else PeerState.UNKNOWN
        if route.watch is not None or peer.links[0].up:
            return PeerState.ALIVE
        return PeerState.UNKNOWN

    def path(self, peer: Any = None) -> str:
        return "tcp"

    # ---- writing -----------------------------------------------------------------------------------------

    def _target(self, peer: HostPeer, remote: RemoteRegion) -> tuple[int, tuple[int, int]]:
        assert isinstance(peer, TcpPeer)
        if cause := peer.route.over():
            raise TransportError(cause, transport=self.name)
        key = (remote.id, remote.generation)
        nbytes = peer.regions.get(key)
        if nbytes is None:
            raise OutOfBounds(
                f"the peer has no live region {remote.id} of generation {remote.generation}",
                transport=self.name,
            )
        return nbytes, key

    def _begin(self, peer: HostPeer, plan: Plan, keep: list[object]) -> Post:
        assert isinstance(peer, TcpPeer)
        total = sum(nbytes for *_, nbytes in plan)
        if total < SPLIT_BYTES or len(peer.links) == 1:
            shares = [_pieces(plan, total)[0]]
            links = [min(peer.links, key=lambda link: link.load)]
        else:
            shares = _pieces(plan, -(-total // len(peer.links)))
            links = sorted(peer.links, key=lambda link: link.load)
        post = Post(peer.route, len(shares), keep, self._bell.ring)
        for link, share in zip(links, shares, strict=False):
            part = Part(post, share)
            link.given += part.nbytes
            if not link.lane.suggest(partial(link.submit, part), link.fail):
                post.part_ended(placed=False)
        return post

    def drained(self, handle: int) -> bool:
        post = self._batch(handle)
        # While the lanes run they find this out themselves; afterwards there is nobody else to ask.
        if self._closed and not post.drained:
            route = post.route
            return route is not None and post.status is not Status.PENDING and bool(route.over())
        return post.drained

    def source_free(self, handle: int) -> bool:
        return self._batch(handle).source_free or self.drained(handle)

    def cancel(self, handle: int) -> None:
        """A part that has not begun never will; of one that has, no further frame begins."""
        super().cancel(handle)
        for peer in self._peers.values():
            for link in peer.links:
                link.lane.suggest(link.sweep)

    def on_progress(self, wake: Callable[[], None]) -> None:
        self._check_open()
        self._bell.wake = wake

    # ---- the end -----------------------------------------------------------------------------------------

    def close(self) -> None:
        """Fence all regions, wait for the answers to what is on its way, tell the peers, release everything.

        A peer that takes nothing is waited for one second. Handles can be polled afterwards: DONE, FAILED for what
        did not begin or was refused, UNKNOWN for what was not answered.
        """
        if self._closed or os.getpid() != self._pid:
            # A forked child has neither the threads nor the right to speak for its parent.
            return
        self._closed = True
        deadline = time.monotonic() + _hostcopy.CLOSE_TIMEOUT_S
        fenced = True
        for region in self._live.values():
            fenced &= self._harbor.withdraw((region.id, region.generation), max(0.0, deadline - time.monotonic()))
        self._live.clear()
        for link in self._links:
            link.winding = True
        farewell = partial(_farewell, self._harbor, list(self._links), fenced)
        for lane in self._lanes:
            lane.suggest(partial(_wind_down, lane, [link for link in self._links if link.lane is lane], farewell))
        ended = [lane.join(max(0.0, deadline - time.monotonic())) for lane in self._lanes]
        self._bell.wake = None
        if not all(ended):
            log.error("tcp: a thread did not end within %g s", _hostcopy.CLOSE_TIMEOUT_S)
            for post in self._batches.values():
                post.give_up()
        self._peers.clear()
        self._links.clear()


def _wind_down(lane: Lane, links: Sequence[Link], farewell: Callable[[Lane], bool]) -> None:
    for link in links:
        link.wind_down()
    lane.farewell = farewell


def _farewell(harbor: Harbor, links: Sequence[Link], fenced: bool, lane: Lane) -> bool:
    """May this lane end? What is on its way is waited for; then everybody who writes to us is told, if it is true."""
    if any(link.busy for link in links):
        return False
    return harbor.leave(lane, say_closed=fenced and all(link.drained for link in links))


def _stop(lanes: Sequence[Lane]) -> None:
    for lane in lanes:
        lane.stop()


def _pieces(plan: Plan, share: int) -> list[list[Piece]]:
    """The copies in frames, dealt into shares of `share` bytes: none is empty."""
    shares: list[list[Piece]] = [[]]
    room = share
    for (region, generation), offset, source, nbytes in plan:
        done = 0
        while done < nbytes:
            if not room:
                shares.append([])
                room = share
            length = min(nbytes - done, room, PIECE_BYTES)
            shares[-1].append((region, generation, offset + done, source + done, length))
            done += length
            room -= length
    return shares


def _host(host: str) -> str:
    """Raises ConfigError for what is no address."""
    if host == "auto":
        return host
    try:
        address = ipaddress.ip_address(host)
    except ValueError as error:
        raise ConfigError(f"the tcp option host is {host!r}: {error}", hint="Give auto or an IP address") from error
    return "auto" if address.is_unspecified else str(address)


def _ports(port: int | str) -> Sequence[int]:
    """Raises ConfigError for what is neither a port nor a range of ports."""
    match = re.fullmatch(r"([0-9]{1,5})(?:-([0-9]{1,5}))?", str(port))
    if match is not None:
        low, high = int(match[1]), int(match[2] or match[1])
        if low <= high <= 65535 and (low or not high):
            return range(low, high + 1)
    raise ConfigError(f"the tcp option port is {port!r}", hint='Give a port, 0 for any, or a range as "15000-15100"')


def _listen(host: str, ports: Sequence[int]) -> socket.socket:
    """A listener on the first port that is free. Raises OSError where none is."""
    problem: OSError | None = None
    for port in ports:
        try:
            return _bind(host, port)
        except OSError as error:
            problem = error
    raise problem or OSError("no port to try")


def _bind(host: str, port: int) -> socket.socket:
    if host != "auto":
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=BACKLOG)
        except OSError as error:  # IPv6 is there and switched off, or the port is taken
            log.debug("tcp: cannot listen on both families: %s", error)
    return socket.create_server(("", port), backlog=BACKLOG)


def _own_addresses(host: str, family: int) -> list[str]:
    if host != "auto":
        return [host]
    both = [*local_addresses()[: wire.MAX_ADDRESSES - len(LOOPBACK)], *LOOPBACK]
    return [address for address in both if family == socket.AF_INET6 or ":" not in address]

"""The control channel: frames over ZMQ, and nothing else. One thread owns it (the endpoint's I/O thread).

A *route* names where a message goes: an address that we connected to (tcp://host:port), or the identity of somebody who
connected to us. A peer that cannot be reached costs nothing: messages to it queue up to a bound and are then dropped,
because every message is said again as long as it is true. Frames that do not decode are counted by reason and dropped;
they never reach a machine and never end the thread.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections import Counter, deque
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import zmq

from tensorferry.core.errors import ConfigError, Overloaded
from tensorferry.core.messages import Message
from tensorferry.core.names import Lead, Names, lead
from tensorferry.core.timing import Troubles
from tensorferry.core.wire import MAX_FRAME_BYTES, BadFrame, decode, encode

log = logging.getLogger("tensorferry.control")

QUEUE_FRAMES = 10_000
"""Frames queued for one peer before new ones are dropped."""

RECEIVED_FRAMES = 512
"""Frames taken in from one peer before the next has to wait in its own queue: a frame can be 1 MiB long."""

MOST_ROUTES = 1 << 16
"""Sockets of one context; libzmq's own default is 1023. The number of open files bounds it before that."""

FILES_OF_ZMQ = 16
"""Open files that have to be free for a context: it takes 9 for its threads and a socket that listens."""

FLUSH_MS = 500
"""How long `close` lets queued frames leave."""

MOST_FRAMES_A_TURN = 256
"""Frames taken from one socket before others, timers and writes have their turn."""

FIRST_PAUSE_MS, LONGEST_PAUSE_MS = 50, 1000
"""Between two tries to connect: the first pause, and what doubling ends at, unless `patience` is short."""

_TCP = re.compile(r"tcp://.+:([0-9]+)")


def _check_port(address: str, lowest: int) -> None:
    """ZMQ takes any number for a port and uses its last 16 bits: tcp://127.0.0.1:99999 would mean port 34463."""
    port = _TCP.fullmatch(address)
    if port is not None and not lowest <= int(port[1]) <= 65535:
        raise ConfigError(f"{address!r}: ports are {lowest} to 65535")


def speaks_for(route: str, identity: bytes) -> bool:
    """Was this route to us opened by somebody who calls himself `identity`?"""
    return bytes.fromhex(route).partition(b"/")[0] == identity


def _started_context() -> zmq.Context[zmq.Socket[bytes]]:
    """A context with its threads running. Where they get no file, libzmq ends the process (abort): so it is seen first
    that there are some, and they begin here and not with the first sender, when those may be gone.

    Raises Overloaded.
    """
    held: list[int] = []
    try:
        for _ in range(FILES_OF_ZMQ):
            held.append(os.eventfd(0, os.EFD_CLOEXEC))  # noqa: PERF401 - those before one that fails are closed, too
    except OSError as problem:
        raise _no_files(problem) from problem
    finally:
        for fd in held:
            os.close(fd)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        context.set(zmq.MAX_SOCKETS, min(MOST_ROUTES, context.get(zmq.SOCKET_LIMIT)))
        context.socket(zmq.PAIR).close(0)
    except zmq.ZMQError as problem:
        context.destroy(0)
        raise _no_files(problem) from problem
    return context


def _no_files(problem: OSError | zmq.ZMQError) -> Overloaded:
    return Overloaded(
        f"no files for another control channel: {problem.strerror}",
        hint=f"Raise the limit of open files (ulimit -n): an endpoint begins with {FILES_OF_ZMQ} free ones",
    )


class _Bell:
    """A file that ends a wait, open as long as anybody holds it: its number is nobody else's while it is rung.

    No lock: a signal's handler may close the endpoint in the very thread that is ringing, and waits until all is over.
    """

    fd = -1

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


def _dial(socket: zmq.Socket[bytes], numeric: str) -> None:
    """Connect to an address with no name in it: ZMQ would look that up where all peers' messages wait for it."""
    socket.setsockopt(zmq.IPV6, int("[" in numeric))  # only then: a host may have no IPv6, not even for mapped IPv4
    socket.connect(numeric)


@dataclass(slots=True)
class _Route:
    """To an address that we connected to. `lead`: where its host's name leads, if it has one.
    `unsent`: frames for a host that is still looked up."""

    socket: zmq.Socket[bytes]
    lead: Lead | None
    unsent: deque[bytes] = field(default_factory=deque)


class Control:
    """`bind`: the address to listen on, or empty. `identity`: what we call ourselves to those we connect to, followed
    there by "/" and the number of the route. `patience`: seconds within which somebody who comes back at an address has
    to be found, a few tries among them.

    Raises ConfigError for an address that cannot be bound, Overloaded where the process has hardly a file left.
    """

    def __init__(self, identity: bytes, bind: str = "", patience: float = 8.0) -> None:
        self.identity = identity
        self._opened = count(1)
        self._patience = patience
        self._longest_pause_ms = max(FIRST_PAUSE_MS, min(LONGEST_PAUSE_MS, int(patience * 1000 / 8)))
        self.dropped: Counter[str] = Counter()
        self._context = _started_context()
        self._poller = zmq.Poller()
        self._routes: dict[str, _Route] = {}
        self._names = Names(self.wake)
        self._troubles = Troubles()
        self._router: zmq.Socket[bytes] | None = None
        self._bell: _Bell | None = _Bell()
        self._poller.register(self._bell.fd, zmq.POLLIN)
        self.address = ""
        if bind:
            try:
                self._listen(bind)
            except zmq.ZMQError as problem:
                self.close()
                raise ConfigError(
                    f"cannot bind {bind!r}: {problem.strerror}", hint="Give tcp://HOST:PORT, port 0 for any free one"
                ) from problem
            except BaseException:
                self.close()
                raise

    def _listen(self, bind: str) -> None:
        _check_port(bind, 0)
        self._router = self._socket(zmq.ROUTER)
        self._router.setsockopt(zmq.IPV6, int("[" in bind))
        self._router.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._router.bind(bind)
        self._poller.register(self._router, zmq.POLLIN)
        self.address = self._router.getsockopt_string(zmq.LAST_ENDPOINT)

    def _socket(self, kind: int) -> zmq.Socket[bytes]:
        socket = self._context.socket(kind)
        socket.setsockopt(zmq.LINGER, FLUSH_MS)
        socket.setsockopt(zmq.SNDHWM, QUEUE_FRAMES)
        socket.setsockopt(zmq.RCVHWM, RECEIVED_FRAMES)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        socket.setsockopt(zmq.RECONNECT_IVL, FIRST_PAUSE_MS)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, self._longest_pause_ms)
        return socket

    def connect(self, address: str) -> None:
        """Open a route to `address`; nothing waits for it to answer, nor for its host's name to be looked up. Raises
        ConfigError for what is no address, Overloaded where there is no socket for it."""
        if address in self._routes:
            return
        _check_port(address, 1)
        try:
            socket = self._socket(zmq.DEALER)
        except zmq.ZMQError as problem:
            raise Overloaded(
                f"no socket for another sender: {problem.strerror}", peer=address,
                hint="Raise the limit of open files (ulimit -n), or wait: addresses that nothing is wanted from are "
                "let go after a while",
            ) from problem  # fmt: skip
        # A number for each: two addresses can be one listener's (a name and an IP, two IPs of 0.0.0.0), where the later
        # of two routes under one identity would take the earlier one's answers.
        socket.setsockopt(zmq.ROUTING_ID, b"%b/%d" % (self.identity, next(self._opened)))
        route = _Route(socket, lead(address, self._patience))
        if route.lead is not None:
            self._names.ask(route.lead.name)
        else:
            try:
                _dial(socket, address)
            except zmq.ZMQError as problem:
                socket.close(0)
                raise ConfigError(
                    f"{address!r} is no address to connect to: {problem.strerror}", hint="Give tcp://HOST:PORT"
                ) from problem
        self._routes[address] = route
        self._poller.register(socket, zmq.POLLIN)

    def disconnect(self, address: str) -> None:
        """Close the route to `address`, once what is queued has left. Nothing happens where there is none."""
        route = self._routes.pop(address, None)
        if route is not None:
            self._poller.unregister(route.socket)
            route.socket.close(FLUSH_MS)

    def trouble(self, address: str) -> str:
        """Why the host of a route has no address just now; empty where it has one, or is still looked up."""
        route = self._routes.get(address)
        return route.lead.trouble if route is not None and route.lead is not None else ""

    def _follow_names(self) -> None:
        """What was looked up: routes are opened, or led to where their hosts have moved."""
        for name, ips, trouble in self._names.answers():
            now = time.monotonic()
            if trouble and (more := self._troubles.worth_telling(name, now)) is not None:
                log.warning("host %r is not found: %s%s", name, trouble, more)
            for address, route in self._routes.items():
                if route.lead is not None and route.lead.name == name:
                    before = route.lead.numeric if route.lead.ip else ""
                    if route.lead.found(ips, trouble, now):
                        self._lead(address, route, route.lead, before)

    def _lead(self, address: str, route: _Route, lead: Lead, before: str) -> None:
        try:
            if before:
                log.info("%s is silent at %s; next: %s", address, before, lead.numeric)
                route.socket.disconnect(before)
            _dial(route.socket, lead.numeric)
        except zmq.ZMQError as problem:
            log.warning("%s cannot be connected to as %s: %s", address, lead.numeric, problem.strerror)
            lead.ip = ""  # a new chance with the next look
            return
        while route.unsent:
            self._queue(route.socket, route.unsent.popleft())

    @property
    def routes(self) -> tuple[str, ...]:
        """The addresses that were connected to."""
        return tuple(self._routes)

    def send(self, route: str, message: Message) -> None:
        """Queue a message. What cannot be queued is dropped and counted: it will be said again."""
        try:
            frame = encode(message)
        except (ValueError, TypeError, OverflowError):  # too long, not of the wire's types, beyond 64 bits
            self.dropped["unencodable"] += 1
            log.exception("a message that cannot be encoded was dropped")
            return
        known = self._routes.get(route)
        if known is not None:
            self._say(known, frame)
        elif self._router is not None:
            try:
                self._queue(self._router, bytes.fromhex(route), frame)
            except ValueError:
                self.dropped["no route"] += 1
        else:
            self.dropped["no route"] += 1

    def _say(self, route: _Route, frame: bytes) -> None:
        if route.lead is not None and route.lead.said(time.monotonic()):
            self._names.ask(route.lead.name)
        if route.lead is None or route.lead.ip:
            self._queue(route.socket, frame)
        elif len(route.unsent) < QUEUE_FRAMES:
            route.unsent.append(frame)
        else:
            self.dropped["queue full"] += 1

    def _queue(self, socket: zmq.Socket[bytes], *parts: bytes) -> None:
        try:
            socket.send_multipart(parts, zmq.NOBLOCK)
        except zmq.Again:
            self.dropped["queue full"] += 1
        except zmq.ZMQError as problem:
            self.dropped["unroutable"] += 1
            log.debug("a message was dropped: %s", problem)

    def receive(self, timeout: float) -> list[tuple[str, Message]]:
        """Wait up to `timeout` seconds for frames or a wake; returns what decodes, with the route that answers it. A
        timeout of less than 1 ms is waited out, whatever comes."""
        ready = self._wait(timeout)
        if self._bell is not None and ready.pop(self._bell.fd, 0):
            with suppress(BlockingIOError):
                os.eventfd_read(self._bell.fd)
        self._follow_names()
        received: list[tuple[str, Message]] = []
        for address, route in self._routes.items():
            if route.socket in ready:
                already = len(received)
                self._drain(route.socket, address, received)
                if route.lead is not None and len(received) > already:
                    route.lead.heard()
        if self._router is not None and self._router in ready:
            self._drain(self._router, "", received)
        return received

    def _wait(self, timeout: float) -> dict[Any, int]:
        """What can be read. ZMQ waits for whole milliseconds: less is slept, and what comes meanwhile is found then."""
        if 0 < timeout < 0.001:
            if ready := dict(self._poller.poll(0)):
                return ready
            time.sleep(timeout)
            timeout = 0
        return dict(self._poller.poll(max(0, int(timeout * 1000 + 0.999))))

    def _drain(self, socket: zmq.Socket[bytes], address: str, received: list[tuple[str, Message]]) -> None:
        for _ in range(MOST_FRAMES_A_TURN):
            try:
                parts = socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            route = address
            if not address:
                route, parts = parts[0].hex(), parts[1:]
            if len(parts) != 1:
                self.dropped["parts"] += 1
                continue
            try:
                received.append((route, decode(parts[0])))
            except BadFrame as problem:
                self.dropped[problem.reason] += 1
                if sum(self.dropped.values()) == 1:  # once: whoever sends garbage must not fill a log
                    log.warning("a frame from %s was dropped (%s); later ones are only counted", route, problem)

    def wake(self) -> None:
        """Make `receive` return. The one method that any thread may call."""
        bell = self._bell
        if bell is not None:
            os.eventfd_write(bell.fd, 1)

    def close(self) -> None:
        """Let queued frames leave for FLUSH_MS at most. Idempotent."""
        if self._bell is None:
            return
        self._bell = None
        for route in self._routes.values():
            route.socket.close(FLUSH_MS)
        if self._router is not None:
            self._router.close(FLUSH_MS)
        self._routes.clear()
        self._router = None
        self._context.destroy(FLUSH_MS)  # which also closes a socket that an error left: term would wait for it

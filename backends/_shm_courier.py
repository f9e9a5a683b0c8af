"""The thread of a shm transport that hands its own memory to peers and fetches theirs, over abstract unix sockets.

Whoever connects must be our own user (the kernel says who it is), must name our instance (which only our
descriptor tells) and is answered without waiting for it. Bad packets end the connection that they came
on, and nothing else.
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import math
import os
import secrets
import selectors
import socket
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from typing import Protocol

import msgspec

from tensorferry.backends import _shm_wire as wire
from tensorferry.backends._copier import Copier
from tensorferry.backends._mapping import Mapping
from tensorferry.backends._shm_link import Link
from tensorferry.core.errors import TransportError

log = logging.getLogger("tensorferry.backends.shm")

BACKLOG = 64
MAX_GUESTS = 256
"""Most connections to one transport: two per peer would do, and each costs a file descriptor."""

GREETING_TIMEOUT_S = 5.0
"""A connection that has not asked a valid question by then is closed."""

ACCEPT_PAUSE_S = 0.2
"""How long no connection is accepted after accept has failed (out of file descriptors, say)."""

FILL_BYTES = 16 << 20
"""Pages are brought into a mapping in pieces of this size, about 3 ms each, between which packets are answered."""

STOP_TIMEOUT_S = 5.0


class Slab(Protocol):
    """Memory that can be handed to a peer."""

    @property
    def fd(self) -> int: ...

    @property
    def nbytes(self) -> int: ...


@dataclass(slots=True, eq=False)
class _Guest:
    connection: socket.socket
    deadline: float


class Courier:
    """Serves at `name` (an abstract socket, without the leading NUL) until `close`."""

    def __init__(self, instance: bytes, copier: Copier, prefault: bool) -> None:
        """Raises OSError where there is no socket to be had."""
        self.copier = copier
        self.name = b"tensorferry-" + secrets.token_hex(16).encode()
        self._instance = instance
        self._prefault = prefault
        self._pid = os.getpid()
        self._uid = os.geteuid()
        self._slabs: dict[wire.Key, Slab] = {}
        self._slabs_lock = threading.Lock()
        self._commands: SimpleQueue[Callable[[], None]] = SimpleQueue()
        # Reentrant: the end of a forgotten transport may be noticed (by the garbage collector) in the
        # middle of it.
        self._lock = threading.RLock()
        # Held while files are opened and closed, and taken before a fork: see the end of this file.
        self.fork_lock = threading.RLock()
        self._ended = False
        self._stopping = False
        self._say_closed = False
        self._links: set[Link] = set()
        self._guests: set[_Guest] = set()
        self._filling: deque[tuple[Mapping, int]] = deque()
        self._accept_at = math.inf
        with contextlib.ExitStack() as undo:
            self._listener = undo.enter_context(wire.new_socket())
            self._listener.bind(b"\0" + self.name)
            self._listener.listen(BACKLOG)
            self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            undo.callback(os.close, self._bell)
            self._selector = selectors.DefaultSelector()
            undo.pop_all()
        self._selector.register(self._bell, selectors.EVENT_READ, (self._answer_bell, _log_only))
        self._selector.register(self._listener, selectors.EVENT_READ, (self._accept, _log_only))
        self._thread = threading.Thread(target=self._run, name="tensorferry-shm-courier", daemon=True)
        _couriers.add(self)
        self._thread.start()

    # ---- any thread --------------------------------------------------------------------------------------

    def call(self, command: Callable[[], None]) -> None:
        """Run `command` on the courier's thread. Raises TransportError once that thread has ended."""
        if not self.suggest(command):
            raise TransportError("the shm transport's courier has ended", transport="shm")

    def suggest(self, command: Callable[[], None]) -> bool:
        """Run `command` on the courier's thread. False: that thread has ended, and will not."""
        with self._lock:
            if self._ended:
                return False
            self._commands.put(command)
            os.eventfd_write(self._bell, 1)
            return True

    @property
    def ended(self) -> bool:
        return self._ended

    def share(self, key: wire.Key, slab: Slab) -> None:
        """Hand this slab to every peer that asks for it, until `unshare`."""
        with self._slabs_lock:
            self._slabs[key] = slab

    def unshare(self, key: wire.Key) -> None:
        with self._slabs_lock:
            self._slabs.pop(key, None)

    def add(self, link: Link) -> None:
        self.call(partial(self._links.add, link))

    def remove(self, link: Link) -> None:
        def remove() -> None:
            self._links.discard(link)
            link.end("the peer was disconnected")
            link.watch = None  # its file goes now, and not when the garbage collector comes

        self.suggest(remove)

    def stop(self) -> None:
        """Ask the thread to end."""
        if os.getpid() != self._pid:  # a forked child drops us; the lock may have no owner there
            return
        with self._lock:
            self._stopping = True
            if not self._ended:
                os.eventfd_write(self._bell, 1)

    def close(self, say_closed: bool) -> None:
        """End the thread and every connection. `say_closed`: tell all who are connected that nothing
        that this instance posted can land any more, which must be true."""
        self._say_closed = say_closed
        self.stop()
        self._thread.join(STOP_TIMEOUT_S)
        if self._thread.is_alive():
            log.error("the courier of a shm transport did not end within %g s", STOP_TIMEOUT_S)
        with self._slabs_lock:
            self._slabs.clear()

    # ---- for links, on the courier's thread --------------------------------------------------------------

    def listen_to(self, connection: socket.socket, read: Callable[[], None], end: Callable[[str], None]) -> None:
        self._selector.register(connection, selectors.EVENT_READ, (read, end))

    def forget(self, connection: socket.socket) -> None:
        with contextlib.suppress(KeyError):  # it was never registered: epoll had no room
            self._selector.unregister(connection)
        connection.close()

    def fill(self, mapping: Mapping) -> None:
        """Bring the pages of a fresh mapping in, bit by bit, so that copies do not pay for them."""
        if self._prefault:
            self._filling.append((mapping, 0))

    # ---- the thread --------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._turn()
        except Exception:
            log.exception("the courier of a shm transport failed")
        finally:
            with self.fork_lock:
                self._end()

    def _turn(self) -> None:
        now = time.monotonic()
        timers = [link.next_time() for link in self._links] + [guest.deadline for guest in self._guests]
        first = min(timers, default=math.inf)
        first = min(first, self._accept_at)
        wait = 0.0 if self._filling else max(0.0, first - now)
        ready = self._selector.select(None if wait == math.inf else wait)
        with self.fork_lock:
            self._handle([key.data for key, _ in ready])
        if self._filling:
            self._fill_some()

    def _handle(self, ready: list[tuple[Callable[[], None], Callable[[str], None]]]) -> None:
        for handle, fail in ready:
            _guard(handle, fail)
        now = time.monotonic()
        for link in [link for link in self._links if link.next_time() <= now]:
            _guard(partial(link.step, now), link.end)
        for guest in [guest for guest in self._guests if guest.deadline <= now]:
            self._dismiss(guest)
        if self._accept_at <= now:
            self._accept_at = math.inf
            self._selector.register(self._listener, selectors.EVENT_READ, (self._accept, _log_only))

    def _answer_bell(self) -> None:
        try:
            os.eventfd_read(self._bell)
        except BlockingIOError:
            return
        self._obey()

    def _obey(self) -> None:
        while True:
            try:
                command = self._commands.get_nowait()
            except Empty:
                return
            _guard(command, _log_only)

    def _fill_some(self) -> None:
        mapping, start = self._filling.popleft()
        nbytes = min(FILL_BYTES, mapping.nbytes - start)
        try:
            mapping.populate(start, nbytes)
        except OSError as error:
            log.warning("%s", error)
            return
        if start + nbytes < mapping.nbytes:
            self._filling.append((mapping, start + nbytes))

    def _accept(self) -> None:
        for _ in range(BACKLOG):
            try:
                connection, _address = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                # Out of file descriptors, say: the listener would stay readable and the loop would spin.
                log.warning("cannot accept a peer, trying again in %g s: %s", ACCEPT_PAUSE_S, error)
                self._selector.unregister(self._listener)
                self._accept_at = time.monotonic() + ACCEPT_PAUSE_S
                return
            connection.setblocking(False)
            uid = wire.peer_uid(connection)
            if uid != self._uid or len(self._guests) >= MAX_GUESTS:
                log.warning("refused a connection of user %d (%d are open)", uid, len(self._guests))
                connection.close()
                continue
            guest = _Guest(connection, time.monotonic() + GREETING_TIMEOUT_S)
            self._guests.add(guest)
            self._selector.register(
                connection,
                selectors.EVENT_READ,
                (partial(self._serve, guest), lambda _, g=guest: self._dismiss(g)),
            )

    def _serve(self, guest: _Guest) -> None:
        """One packet from somebody who connected to us. Whatever is wrong with it ends the connection."""
        try:
            data, fds = wire.receive(guest.connection)
            for fd in fds:  # nobody has to send us any
                os.close(fd)
            ask = wire.decode_ask(data) if data and not fds else None
            if ask is None or ask.version != wire.SOCKET_VERSION:
                self._dismiss(guest)
            elif not hmac.compare_digest(ask.instance, self._instance):
                log.warning("refused a connection that asks for another instance")
                self._dismiss(guest)
            else:
                guest.deadline = math.inf
                self._answer(guest.connection, ask)
        except BlockingIOError:
            # Nothing to read, or a guest that does not read its answers: the next packet or its end will
            # tell.
            return
        except (OSError, ValueError, msgspec.MsgspecError) as error:
            log.debug("ended a connection: %s", error)
            self._dismiss(guest)

    def _answer(self, connection: socket.socket, ask: wire.Ask) -> None:
        connection.send(wire.encode(wire.Welcome(self._instance)), socket.MSG_NOSIGNAL)
        for key in ask.regions:
            # Locked: the slab's fd must not be closed, and its number given out again, under us.
            with self._slabs_lock:
                slab = self._slabs.get(key)
                if slab is not None:
                    packet = wire.encode(wire.Give(key, slab.nbytes))
                    socket.send_fds(connection, [packet], [slab.fd], socket.MSG_NOSIGNAL)
                    continue
            connection.send(wire.encode(wire.Refuse(key)), socket.MSG_NOSIGNAL)

    def _dismiss(self, guest: _Guest) -> None:
        if guest in self._guests:
            self._guests.discard(guest)
            self.forget(guest.connection)

    def _end(self) -> None:
        """The thread's last act, however it came to its end."""
        with self._lock:
            self._ended = True  # from here on nobody rings, so the bell's number may be given out again
        self._obey()
        for link in self._links:
            _guard(partial(link.end, "the transport is closed"), _log_only)
        for guest in self._guests:
            if self._say_closed and guest.deadline == math.inf:
                try:
                    guest.connection.send(wire.encode(wire.Closed(self._instance)), socket.MSG_NOSIGNAL)
                except OSError as error:  # it is a courtesy: without it the peer waits for our process to end
                    log.debug("cannot tell a peer of the end: %s", error)
        self.drop_files()
        for link in self._links:
            link.watch = None
        self._links.clear()
        self._guests.clear()
        self._filling.clear()

    def drop_files(self) -> None:
        """Close every file. Also called in a forked child, where they are of no use and would keep our
        name alive after our end; no lock there: who held it at the fork does not exist any more."""
        self._ended = True
        self._selector.close()
        self._listener.close()
        for guest in list(self._guests):
            guest.connection.close()
        for link in list(self._links):
            link.drop_files()
        os.close(self._bell)


def _log_only(cause: str) -> None:
    log.error("shm courier: %s", cause)


def _guard(handle: Callable[[], None], fail: Callable[[str], None]) -> None:
    """One connection's failure is not the others'."""
    try:
        handle()
    except Exception as error:
        log.exception("a connection of the shm courier failed")
        fail(f"internal error: {error!r}")


_couriers: weakref.WeakSet[Courier] = weakref.WeakSet()


_forking = threading.RLock()
_held: list[Courier] = []


def _before_fork() -> None:
    _forking.acquire()
    # Between accept and the note of it, say, a connection is known to nobody: a child would keep it open for ever.
    _held[:] = _couriers
    for courier in _held:
        courier.fork_lock.acquire()


def _after_fork() -> None:
    for courier in _held:
        courier.fork_lock.release()
    _held.clear()
    _forking.release()


def _after_fork_in_child() -> None:
    for courier in _held:
        if not courier.ended:
            courier.drop_files()
        _couriers.discard(courier)
    _after_fork()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)

"""A thread of a tcp transport and the connections that it serves.

A transport has a few lanes; a connection belongs to one of them for its life, on both sides to the one that its link
number says. So everything about one connection is done by one thread, and two connections of a pair move bytes on two
cores: sending and receiving release the interpreter lock. Nothing here blocks: sockets are non-blocking, and the
thread waits for all of them at once.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import selectors
import socket
import threading
import time
import weakref
from collections.abc import Callable
from functools import partial
from queue import Empty, SimpleQueue
from typing import Protocol

log = logging.getLogger("tensorferry.backends.tcp")

READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE

FAREWELL_S = 0.5
"""How long the other ends of our connections have to read our last word before we hang up."""

FAREWELL_TURN_S = 0.02
"""How often a lane that is to end looks whether it may: what it waits for also happens on other lanes."""


class Served(Protocol):
    """One connection, or one that waits to be made."""

    def on_event(self, mask: int) -> None: ...

    def step(self, now: float) -> None:
        """What time brings."""

    def next_time(self) -> float:
        """When `step` is next of use."""

    def fail(self, cause: str) -> None:
        """`on_event` or `step` raised."""


class Lane:
    def __init__(self, index: int) -> None:
        """Raises OSError where there are no file descriptors left."""
        self.index = index
        # Held while files are opened and closed, and taken before a fork: see the end of this file. Reentrant:
        # the end of a forgotten transport may be noticed (by the garbage collector) in the middle of anything.
        self.fork_lock = threading.RLock()
        self.sockets: set[socket.socket] = set()
        self.farewell: Callable[[Lane], bool] | None = None
        """Once set: asked at each turn whether the lane may end. Its last act before the thread does."""
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._commands: SimpleQueue[tuple[Callable[[], None], Callable[[str], None]]] = SimpleQueue()
        self._ended = False
        self._stopping = False
        self._timed: set[Served] = set()
        self._next_step = math.inf
        with contextlib.ExitStack() as undo:
            self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            undo.callback(os.close, self._bell)
            self._selector = selectors.DefaultSelector()
            undo.pop_all()
        self._selector.register(self._bell, READ, None)
        self._thread = threading.Thread(target=self._run, name=f"tensorferry-tcp-{index}", daemon=True)
        _lanes.add(self)
        self._thread.start()

    # ---- any thread --------------------------------------------------------------------------------------

    def suggest(self, command: Callable[[], None], fail: Callable[[str], None] | None = None) -> bool:
        """Run `command` on this lane's thread, and `fail` if it raises. False: that thread has ended, and will not."""
        with self._lock:
            if self._ended:
                return False
            self._commands.put((command, fail or _log_only))
            os.eventfd_write(self._bell, 1)
            return True

    def stop(self) -> None:
        """End at once: every connection is closed, without a word."""
        if os.getpid() != self._pid:  # a forked child drops us; the lock may have no owner there
            return
        with self._lock:
            self._stopping = True
            if not self._ended:
                os.eventfd_write(self._bell, 1)

    def join(self, timeout_s: float) -> bool:
        if self._thread is not threading.current_thread():
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    @property
    def ended(self) -> bool:
        return self._ended

    # ---- this lane's thread ------------------------------------------------------------------------------

    def serve(self, connection: socket.socket, served: Served, events: int) -> None:
        self.sockets.add(connection)
        self._selector.register(connection, events, served)

    def listen_for(self, connection: socket.socket, served: Served, events: int) -> None:
        self._selector.modify(connection, events, served)

    def leave(self, connection: socket.socket) -> None:
        """Serve it no more; it stays open."""
        with contextlib.suppress(KeyError, ValueError):  # not registered (epoll had no room), or closed by others
            self._selector.unregister(connection)
        self.sockets.discard(connection)

    def hang_up(self, connection: socket.socket) -> None:
        self.leave(connection)
        connection.close()

    def time(self, served: Served) -> None:
        """Call its `step` when it is due, until `untime`; again when its next time has become earlier."""
        self._timed.add(served)
        self._next_step = min(self._next_step, served.next_time())

    def untime(self, served: Served) -> None:
        self._timed.discard(served)

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._turn()
                if self.farewell is not None:
                    with self.fork_lock:
                        if self.farewell(self):
                            break
        except Exception:
            log.exception("a thread of a tcp transport failed")
        finally:
            with self.fork_lock:
                self._end()

    def _turn(self) -> None:
        wait = self._next_step - time.monotonic()
        if self.farewell is not None:
            wait = min(wait, FAREWELL_TURN_S)
        ready = self._selector.select(None if wait == math.inf else max(0.0, wait))
        with self.fork_lock:
            for key, mask in ready:
                served = key.data
                if served is None:
                    self._answer_bell()
                elif key.fileobj in self.sockets:  # else it was closed by what came before it in this turn
                    _guard(partial(served.on_event, mask), served.fail)
            now = time.monotonic()
            if now >= self._next_step:
                for served in [served for served in self._timed if served.next_time() <= now]:
                    _guard(partial(served.step, now), served.fail)
                self._next_step = min((served.next_time() for served in self._timed), default=math.inf)

    def _answer_bell(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._bell)
        self._obey()

    def _obey(self) -> None:
        while True:
            try:
                command, fail = self._commands.get_nowait()
            except Empty:
                return
            _guard(command, fail)

    def _end(self) -> None:
        with self._lock:
            self._ended = True  # from here on nobody rings, so the bell's number may be given out again
        self._obey()
        for served in list(self._timed):
            _guard(partial(served.fail, "the transport is closed"), _log_only)
        self._timed.clear()
        self.farewell = None  # it knows the links, and they their watches: files that go with the last who knows them
        self.drop_files()

    def drop_files(self) -> None:
        """Close every file. Also called in a forked child, where they are of no use and would keep our port and
        our connections open after our end; no lock there: who held it at the fork does not exist any more."""
        self._ended = True
        self._selector.close()
        for connection in list(self.sockets):
            connection.close()
        self.sockets.clear()
        os.close(self._bell)


def _log_only(cause: str) -> None:
    log.error("tcp: %s", cause)


def _guard(handle: Callable[[], None], fail: Callable[[str], None]) -> None:
    """One connection's failure is not the others'."""
    try:
        handle()
    except Exception as error:
        log.exception("a connection of a tcp transport failed")
        fail(f"internal error: {error!r}")


_lanes: weakref.WeakSet[Lane] = weakref.WeakSet()
_forking = threading.RLock()
_held: list[Lane] = []


def _before_fork() -> None:
    _forking.acquire()
    # Between accept and the note of it, say, a connection is known to nobody: a child would keep it open for ever.
    _held[:] = _lanes
    for lane in _held:
        lane.fork_lock.acquire()


def _after_fork() -> None:
    for lane in _held:
        lane.fork_lock.release()
    _held.clear()
    _forking.release()


def _after_fork_in_child() -> None:
    for lane in _held:
        if not lane.ended:
            lane.drop_files()
        _lanes.discard(lane)
    _after_fork()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)

"""Proof that a process has ended: a pidfd, polled without blocking.

A pidfd becomes readable when the last thread of the process has ended, so nothing of that process can
write any more. The end of a connection proves less: a process can lose or close a socket while a thread
of it goes on copying, and a forked child can keep the socket open although the process has ended.
"""

from __future__ import annotations

import os
import select
import socket
import threading
import weakref

SO_PEERPIDFD = 77
"""From <asm-generic/socket.h>, since Linux 6.5; Python has no name for it yet."""


class ProcessWatch:
    """Watches one process. Without a file descriptor it stands for a process that had ended before the
    watch began."""

    __slots__ = ("__weakref__", "_ended", "_lock", "_poll")

    def __init__(self, pidfd: int | None) -> None:
        self._ended = pidfd is None
        self._poll = select.poll()
        self._lock = threading.Lock()
        if pidfd is not None:
            self._poll.register(pidfd, select.POLLIN)
            weakref.finalize(self, os.close, pidfd).atexit = False

    def ended(self) -> bool:
        """True: every thread of the process has ended. Never blocks; never True again False."""
        with self._lock:  # a poll object refuses a second thread while one is in it
            if not self._ended:
                # POLLIN alone counts: POLLNVAL would mean that the descriptor was closed, which proves nothing.
                self._ended = any(event & select.POLLIN for _, event in self._poll.poll(0))
            return self._ended


def start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since boot: with the pid it names one process. None: it
    cannot be read."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None


def watch_claimed(pid: int, started: int) -> ProcessWatch | None:
    """A watch on the process that had `pid` and start time `started` in our pid namespace. None: no
    proof possible.

    The peer itself said so. What a lie could gain it is that we believe it dead: it could then write to
    its own grants, which only a process of our own user can do at all.
    """
    if not 0 < pid < 1 << 30 or started <= 0:  # also where the peer could not read its own start time
        return None
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return ProcessWatch(None)
    except OSError:  # the kernel has no pidfd, or a sandbox forbids it
        return None
    watch = ProcessWatch(pidfd)
    now = start_time(pid)
    if now is None:  # unreadable, or it ended just now; the pidfd tells the second
        return watch if watch.ended() else None
    # Another start time: the pid was given out again, which needs the end of the process that had it.
    return watch if now == started else ProcessWatch(None)


def watch_living(pid: int, started: int) -> ProcessWatch | None:
    """As `watch_claimed`, of a process that is seen here alive. None also where it is not: that it is not there proves
    nothing where it may be another machine's that can reach us all the same. Two machines that were cloned from one
    snapshot have the same boot id and the same namespace numbers, so where it runs cannot be told.
    """
    watch = watch_claimed(pid, started)
    return None if watch is None or watch.ended() else watch


def watch_connected(connection: socket.socket) -> ProcessWatch | None:
    """A watch on the process at the other end of a unix connection, as the kernel knows it; pid
    namespaces do not matter. None: the kernel cannot say."""
    try:
        return ProcessWatch(connection.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD))
    except OSError:
        return None


def supported() -> bool:
    """Can this kernel prove that a process has ended?"""
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (OSError, AttributeError):
        return False
    return True

"""The TCP sockets of this process, those of engines included: an engine tells nothing of its connections, and they are
the process's own. And the kernel's table of all TCP connections of the network namespace.

What cannot be looked at is an OSError, and never an empty answer: that nothing is there may be a proof to who asks.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_NO_SUCH_FAMILY = (errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT)  # IPv6 may be left out of a kernel


@contextmanager
def own_sockets() -> Iterator[Iterator[socket.socket]]:
    """This process's TCP sockets, each as a duplicate that is closed after its turn. Raises OSError in the middle where
    no file descriptor is left for it."""

    def each() -> Iterator[socket.socket]:
        for name in os.listdir("/proc/self/fd"):
            duplicate = _duplicate(name)
            if duplicate is None:
                continue
            try:
                yield duplicate
            finally:
                duplicate.close()

    yield each()


def _duplicate(name: str) -> socket.socket | None:
    """None: it is no TCP socket, or was closed meanwhile, and something else may have its number by now."""
    try:
        if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
            return None
    except OSError:
        return None
    for family in (socket.AF_INET, socket.AF_INET6):
        # Python makes a descriptor that it is given non-blocking where `socket.setdefaulttimeout` was called, and so it
        # would be for its owner. A socket of our own is what that happens to; the duplicate takes its place after.
        try:
            duplicate = socket.socket(family, socket.SOCK_STREAM)
        except OSError as error:
            if error.errno not in _NO_SUCH_FAMILY:
                raise
            continue
        try:
            os.dup2(int(name), duplicate.fileno(), inheritable=False)
            kind = [duplicate.getsockopt(socket.SOL_SOCKET, what) for what in (socket.SO_DOMAIN, socket.SO_TYPE)]
        except OSError:
            kind = []
        if kind == [family, socket.SOCK_STREAM]:
            return duplicate
        duplicate.close()
    return None


def connections() -> list[list[str]]:
    """The rows of /proc/net/tcp and tcp6, in columns: number, local end, remote end, state, queues, and more. Raises
    OSError."""
    rows = []
    for table in ("tcp", "tcp6"):
        try:
            text = Path(f"/proc/net/{table}").read_text(encoding="ascii")
        except FileNotFoundError:
            if table == "tcp":
                raise
            continue  # this kernel is without IPv6
        rows += [line.split() for line in text.splitlines()[1:]]
    return rows

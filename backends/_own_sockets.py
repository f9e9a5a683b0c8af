"""The TCP sockets of this process, those of engines included: an engine tells nothing of its connections, and they are
the process's own."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def own_sockets() -> Iterator[Iterator[socket.socket]]:
    """This process's TCP sockets, each as a duplicate that is closed after its turn."""

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
        except OSError:
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

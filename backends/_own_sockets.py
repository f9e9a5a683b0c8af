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
                if duplicate.type == socket.SOCK_STREAM and duplicate.family in (socket.AF_INET, socket.AF_INET6):
                    yield duplicate
            finally:
                duplicate.close()

    yield each()


def _duplicate(name: str) -> socket.socket | None:
    """None: it is no socket, or was closed meanwhile, and something else may have its number by now."""
    try:
        if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
            return None
        number = os.dup(int(name))
    except OSError:
        return None
    try:
        return socket.socket(fileno=number)
    except OSError:
        os.close(number)
        return None

"""What the kernel knows of the engine's sockets, and four things that the engine has no call for.

The engine blocks in its sockets with long time-outs: its destructor for up to a second in `accept` with the GIL held,
a first contact for up to 60 s in `recv` with the lock that all submits need. The sockets are this process's own, so it
can shorten the one and cut the other. And after a peer's death the kernel's tables say whether bytes of it are still
on their way to our memory.
"""

from __future__ import annotations

import ctypes
import socket
import struct
import time
from contextlib import suppress

from tensorferry.backends._own_sockets import connections, own_sockets

ACCEPT_S = 0.002

_TIMEVAL = struct.Struct("ll")
_SO_ATTACH_FILTER = 26  # asm-generic/socket.h
_DROP_ALL = struct.pack("HBBI", 0x06, 0, 0, 0)  # struct sock_filter: BPF_RET | BPF_K, 0 bytes
_PROGRAM = struct.Struct("HP")  # struct sock_fprog
_LISTEN, _TIME_WAIT = 0x0A, 0x06


def hasten_listener(port: int) -> bool:
    """Let the thread that accepts connections on `port` look up every 2 ms from now on. True: it was found.

    The time-out of an accept that waits already does not change: a connection of no content ends that one.
    """
    with suppress(OSError), own_sockets() as sockets:
        for one in sockets:
            with suppress(OSError):
                if one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) and one.getsockname()[1] == port:
                    interval = _TIMEVAL.pack(0, int(ACCEPT_S * 1e6))
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, interval)
                    host = "::1" if one.family == socket.AF_INET6 else "127.0.0.1"
                    socket.create_connection((host, port), timeout=0.2).close()
                    return True
    return False


def stop_listening(port: int, patience_s: float) -> bool:
    """Let no connection to `port` come any more, and wait up to `patience_s` seconds for the end of those that came.
    False: not in time.

    By a filter that drops what arrives, not by a shutdown: after that each accept fails at once, and the engine's
    thread writes a line about it, again and again.
    """
    code = ctypes.create_string_buffer(_DROP_ALL)
    program = _PROGRAM.pack(1, ctypes.addressof(code))
    until = time.monotonic() + patience_s
    quiet = 0
    while True:
        taken, seen = 0, False
        with suppress(OSError), own_sockets() as sockets:
            for one in sockets:
                with suppress(OSError):
                    if one.getsockname()[1] != port:
                        continue
                    if one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                        one.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)
                    elif one.getpeername():
                        taken += 1
            seen = True
        quiet = quiet + 1 if seen and not taken else 0
        if quiet > 2 or time.monotonic() > until:  # looked at more than once: one may have waited to be accepted
            return quiet > 0
        time.sleep(ACCEPT_S)


def cut_connections(host: str, port: int) -> int:
    """End this process's connections to `host`:`port`, whoever waits in them; how many there were."""
    try:
        addresses = {info[4][0] for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    except OSError:
        return 0
    count = 0
    with suppress(OSError), own_sockets() as sockets:
        for one in sockets:
            with suppress(OSError):
                name = one.getpeername()
                if name[1] == port and name[0].removeprefix("::ffff:") in addresses:
                    one.shutdown(socket.SHUT_RDWR)
                    count += 1
    return count


End = tuple[str, str]
"""(local, remote) of a connection, as the kernel writes them."""


def _connections() -> dict[End, tuple[int, int, int]]:
    """Every TCP connection of this network namespace: (state, bytes not acknowledged, bytes not read)."""
    found: dict[End, tuple[int, int, int]] = {}
    for _, local, remote, state, queues, *_ in connections():
        sent, _, unread = queues.partition(":")
        found[_plain(local), _plain(remote)] = (int(state, 16), int(sent, 16), int(unread, 16))
    return found


_MAPPED = "0000000000000000FFFF0000"


def _plain(end: str) -> str:
    """An IPv4 address reads the same in both tables."""
    return end.removeprefix(_MAPPED)


class Aftermath:
    """Bytes that a dead process of this network namespace has sent to our port and that are not in memory yet.

    They lie in the kernel, and the engine goes on placing them after the process has ended. A connection of ours holds
    none once both its ends have been seen empty: what the dead one sent through it has then been copied, and whatever
    comes later is another's. Connections made after the death are nobody's concern.
    """

    def __init__(self, port: int) -> None:
        self._port = f":{port:04X}"
        self._waiting: set[End] | None = None

    def settled(self) -> bool:
        """True: every byte of the dead one that can land has landed. Never True again False. What cannot be looked at,
        for want of a file descriptor above all, is not proved."""
        try:
            return self._look()
        except OSError:
            return False

    def _look(self) -> bool:
        before = _connections()
        ours = {end for end, (state, _, _) in before.items()
                if end[0].endswith(self._port) and state not in (_LISTEN, _TIME_WAIT)}  # fmt: skip
        self._waiting = ours if self._waiting is None else self._waiting & ours
        if self._waiting:
            # What has left the sender's queue is in ours: so the senders' queues are read first, and ours after.
            after = _connections()
            self._waiting = {
                end for end in self._waiting
                if before.get((end[1], end[0]), (0, 0, 0))[1] or after.get(end, (0, 0, 0))[2]
            }  # fmt: skip
        return not self._waiting

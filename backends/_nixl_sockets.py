"""What the kernel knows of UCX's TCP sockets: how to end a connection that nothing ends, and when a dead peer's bytes
have all been placed.

UCX has no time-out of its own: a write to a process that is stopped stays under way for as long as that is stopped, and
its source is read for as long. Releasing the request does not end that, nor does forgetting the peer; the end of the
connection does, and the sockets are this process's own. After a peer's death UCX goes on placing what the kernel holds
of it, and closes its socket when it has read the end.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

import ifaddr

from tensorferry.backends._own_sockets import connections, own_sockets

_ESTABLISHED = 0x01


def listening_ports() -> set[int]:
    """The ports on which this process accepts connections."""
    ports = set()
    with own_sockets() as sockets:
        for one in sockets:
            with suppress(OSError):
                if one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                    ports.add(int(one.getsockname()[1]))
    return ports


def event_sets() -> set[int]:
    """This process's epoll descriptors. UCX has one for each interface of a worker, with its connections in it."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}") == "anon_inode:[eventpoll]":
                found.add(int(name))
    return found


def cut_connections(ports: Collection[int], sets: Collection[int]) -> None:
    """End the connections to those ports of a peer which are in these epoll descriptors, and no others: another agent
    of this process may have connections to the same peer."""
    own = _inodes(sets)
    if not own or not ports:
        return
    with suppress(OSError), own_sockets() as sockets:
        for one in sockets:
            with suppress(OSError):
                if os.fstat(one.fileno()).st_ino in own and one.getpeername()[1] in ports:
                    one.shutdown(socket.SHUT_RDWR)


def _inodes(sets: Collection[int]) -> set[int]:
    """Of all that these epoll descriptors watch."""
    found: set[int] = set()
    for number in sets:
        with suppress(OSError):
            told = Path(f"/proc/self/fdinfo/{number}").read_text(encoding="ascii")
            found.update(int(inode, 16) for inode in re.findall(r"^tfd:.* ino:([0-9a-f]+)", told, re.MULTILINE))
    return found


class Aftermath:
    """Bytes that a dead process of this network namespace has sent to us by TCP and that are not in memory yet.

    A connection whose other end lives is nobody's concern. Every other one of ours is waited for until UCX has closed
    it, which it does after it has placed what came.
    """

    def __init__(self, own: Collection[int], theirs: Collection[int]) -> None:
        self._own = frozenset(own)
        self._theirs = frozenset(theirs)

    def settled(self) -> bool:
        """True: every byte of the dead one that can land has landed. What cannot be looked at, for want of a file
        descriptor above all, is not proved."""
        try:
            return self._look()
        except OSError:
            return False

    def _look(self) -> bool:
        # Our sockets first: one that is made after this is not the dead one's.
        ours, here = [], _own_addresses()
        with own_sockets() as sockets:
            for one in sockets:
                with suppress(OSError):
                    if one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                        continue
                    local = int(one.getsockname()[1])
                    try:
                        address, remote = one.getpeername()[:2]
                        if address.removeprefix("::ffff:") not in here:
                            continue  # a peer on another host
                    except OSError:  # the other end has gone, and what it sent may lie here unread
                        remote = 0
                    if local in self._own or remote in self._theirs:
                        ours.append((local, remote))
        living = _established()
        return all((remote, local) in living for local, remote in ours)


def _own_addresses() -> set[str]:
    found = {ip.ip if isinstance(ip.ip, str) else ip.ip[0] for adapter in ifaddr.get_adapters() for ip in adapter.ips}
    return {str(address) for address in found} | {"127.0.0.1", "::1"}


def _established() -> set[tuple[int, int]]:
    """(local port, remote port) of every connection of this network namespace that neither end has closed."""
    return {
        (int(local.rpartition(":")[2], 16), int(remote.rpartition(":")[2], 16))
        for _, local, remote, state, *_ in connections()
        if int(state, 16) == _ESTABLISHED
    }

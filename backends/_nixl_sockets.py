"""What the kernel knows of UCX's TCP sockets: how to end a connection that nothing ends, and when a dead peer's bytes
have all been placed.

UCX has no time-out of its own: a write to a process that is stopped stays under way for as long as that is stopped, and
its source is read for as long. Releasing the request does not end that, nor does forgetting the peer; the end of the
connection does, and the sockets are this process's own. After a peer's death UCX goes on placing what the kernel holds
of it, and closes its socket when it has read the end.
"""

from __future__ import annotations

import fcntl
import os
import re
import socket
import struct
import sys
import termios
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ifaddr

from tensorferry.backends._own_sockets import connections, own_sockets

PLACING_S = 0.5
"""For a thread of UCX that has read the last bytes of a connection to put them where they belong: a buffer of 8 KiB,
which is a microsecond and as long as the thread waits for a processor."""

LOOK_S = 0.1
"""The most of it that passes between two looks: the process may have been stopped there."""

_ESTABLISHED = 0x01
_BYTES_ACKED = 120  # offset of tcpi_bytes_acked in struct tcp_info, since Linux 4.1
_BYTES_RECEIVED = 128  # offset of tcpi_bytes_received in struct tcp_info, since Linux 4.1


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


def cut_connections(ports: Collection[int], addresses: Collection[str], sets: Collection[int]) -> None:
    """End the connections to those ports of a peer at these addresses which are in these epoll descriptors, and no
    others: another agent of this process may have connections to the same peer, and other hosts have the same ports."""
    own = _inodes(sets)
    if not own or not ports:
        return
    with suppress(OSError), own_sockets() as sockets:
        for one in sockets:
            with suppress(OSError):
                end = _name(one.getpeername)
                if os.fstat(one.fileno()).st_ino in own and end and end[0] in addresses and end[1] in ports:
                    one.shutdown(socket.SHUT_RDWR)


class Stalled:
    """Connections to a peer that it has dialled itself: UCX sends by them, too, and which of those that were accepted
    from the peer's host they are nothing says. They are those on which nothing goes on."""

    def __init__(self, addresses: Collection[str], sets: Collection[int]) -> None:
        self._addresses = addresses
        self._sets = sets
        self._seen: dict[int, tuple[int, float]] = {}

    def cut(self, now: float, seconds: float) -> None:
        """End those of which for so many seconds of the times at which this was called, although bytes wait for it,
        none was acknowledged."""
        own, seen = _inodes(self._sets), self._seen
        self._seen = {}
        with suppress(OSError), own_sockets() as sockets:
            for one in sockets:
                with suppress(OSError):
                    inode, end = os.fstat(one.fileno()).st_ino, _name(one.getpeername)
                    if inode not in own or end is None or end[0] not in self._addresses or not _waiting(one):
                        continue
                    acknowledged = _tcp_info(one, _BYTES_ACKED)
                    before, since = seen.get(inode, (acknowledged, now))
                    if before != acknowledged:
                        since = now
                    if now - since >= seconds:
                        one.shutdown(socket.SHUT_RDWR)
                    else:
                        self._seen[inode] = acknowledged, since


def _waiting(one: socket.socket) -> int:
    """Bytes that are to be sent or were not acknowledged. Raises OSError."""
    return int(struct.unpack("i", fcntl.ioctl(one, termios.TIOCOUTQ, bytes(4)))[0])


def _tcp_info(one: socket.socket, offset: int) -> int:
    """A number of 64 bits in the kernel's struct tcp_info; 0 where the kernel has none there. Raises OSError."""
    information = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, offset + 8)
    return int(struct.unpack_from("=Q", information, offset)[0]) if len(information) == offset + 8 else 0


def _inodes(sets: Collection[int]) -> set[int]:
    """Of all that these epoll descriptors watch."""
    found: set[int] = set()
    for number in sets:
        with suppress(OSError):
            told = Path(f"/proc/self/fdinfo/{number}").read_text(encoding="ascii")
            found.update(int(inode, 16) for inode in re.findall(r"^tfd:.* ino:([0-9a-f]+)", told, re.MULTILINE))
    return found


def leave_to_parent(sets: Collection[int]) -> None:
    """In a forked child: let go of the sockets in these epoll descriptors, UCX's listening ones among them. As long as
    the child has them no peer hears of the parent's end. Their numbers stay taken: UCX, which does not run in the
    child, knows them."""
    with suppress(OSError):  # what cannot be looked at stays open
        own = _inodes(sets)
        nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        for name in os.listdir("/proc/self/fd"):
            with suppress(OSError):
                number = int(name)
                if os.fstat(number).st_ino in own and os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                    os.dup2(nothing, number, inheritable=False)
        os.close(nothing)


@dataclass(slots=True)
class _Flow:
    """What comes to us by one connection."""

    due: int
    """How many bytes UCX has to have read from it altogether; more may follow, and is another's."""
    read: bool = False
    """It was seen that it has."""
    since: float = 0.0
    """For how many seconds of this process's life that is so."""


class Aftermath:
    """Bytes that a dead process of this network namespace has sent to us by TCP and that are not in memory yet.

    Which of the connections that we accepted was the dead one's nothing says, so each one that was there is looked at.
    That its other end is still open proves no living peer: a child that the dead one forked keeps it open. So it counts
    until UCX has closed it, or has read all that lay in it, at either end, when this was first asked: whoever is alive
    may go on writing. Connections made later are nobody's concern.

    What the second rests on. UCX does not store: what it reads of a write goes to where it belongs, either by the read
    itself (`uct_tcp_ep_progress_put_rx`), or by a copy from the buffer that it has read into, before it reads again or
    waits (`uct_tcp_ep_handle_put_req`). So once all is read at most one buffer is still to be placed, by a thread that
    is between two calls, and it is given `PLACING_S` for it, over several looks. A connection that UCX has closed needs
    no such time: it does that when it reads the end, later.
    """

    def __init__(self, own: Collection[int], theirs: Collection[int], sets: Collection[int] = ()) -> None:
        """The ports that we accept connections on and the dead one did; our agent's epoll descriptors."""
        self._own = frozenset(own)
        self._theirs = frozenset(theirs)
        self._sets = frozenset(sets)
        self._waiting: dict[int, _Flow] | None = None  # by the socket's inode
        self._looked = time.monotonic()

    def settled(self) -> bool:
        """True: every byte of the dead one that can land has landed. Never True again False. What cannot be looked at,
        for want of a file descriptor above all, is not proved."""
        try:
            return self._look()
        except OSError:
            return False

    def _look(self) -> bool:
        # What has left the sender's queue is in ours: so the senders' queues are read first, and ours after.
        unsent, now = _unsent(), time.monotonic()
        passed, self._looked = min(now - self._looked, LOOK_S), now
        here, watched = own_addresses(), _inodes(self._sets)
        there, first = {}, self._waiting is None
        before = self._waiting or {}
        with own_sockets() as sockets:
            for one in sockets:
                inode = os.fstat(one.fileno()).st_ino
                if inode not in before and not (first and self._concerns(one, inode, here, watched)):
                    continue
                queue = unsent.get((_name(one.getpeername), _name(one.getsockname)))
                got, unread = _received(one)
                flow = before.get(inode) or _Flow(got + (queue or 0))
                if queue is None:  # the other end has gone, and UCX closes ours when it has read all
                    flow.read, flow.since = False, 0.0
                elif flow.read:
                    flow.since += passed
                else:
                    flow.read = got - unread >= flow.due or queue == unread == 0
                if not flow.read or flow.since < PLACING_S:
                    there[inode] = flow
        self._waiting = there
        return not there

    def _concerns(self, one: socket.socket, inode: int, here: set[str], watched: set[int]) -> bool:
        if one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            return False
        local = int(one.getsockname()[1])
        end = _name(one.getpeername)
        if end is None:  # the other end has gone, and what it sent may lie here unread
            return local in self._own or inode in watched
        return end[0] in here and (local in self._own or end[1] in self._theirs)


End = tuple[str, int]


def _name(asked: Callable[[], Any]) -> End | None:
    """(address, port); None: there is none any more."""
    try:
        address, port = asked()[:2]
    except OSError:
        return None
    return address.partition("%")[0].removeprefix("::ffff:"), int(port)


def _received(one: socket.socket) -> tuple[int, int]:
    """(bytes that have come altogether, those of them that nobody has read): in this order, so that their difference is
    never more than what has been read. Raises OSError."""
    got = _tcp_info(one, _BYTES_RECEIVED)
    unread = struct.unpack("i", fcntl.ioctl(one, termios.FIONREAD, bytes(4)))[0]
    return got, unread


def _unsent() -> dict[tuple[End | None, End | None], int]:
    """(local end, remote end) of every connection of this network namespace that neither end has closed, and the bytes
    that its local end has to send or that were not acknowledged. Raises OSError."""
    return {
        (_end(local), _end(remote)): int(queues.partition(":")[0], 16)
        for _, local, remote, state, queues, *_ in connections()
        if int(state, 16) == _ESTABLISHED
    }


def _end(text: str) -> End:
    """As the kernel's table has it: an address in words of the machine's own byte order."""
    words, _, port = text.rpartition(":")
    raw = b"".join(int(words[n : n + 8], 16).to_bytes(4, sys.byteorder) for n in range(0, len(words), 8))
    address = socket.inet_ntop(socket.AF_INET if len(raw) == 4 else socket.AF_INET6, raw)
    return address.removeprefix("::ffff:"), int(port, 16)


def own_addresses() -> set[str]:
    """Of this network namespace, loopback's too."""
    found = {ip.ip if isinstance(ip.ip, str) else ip.ip[0] for adapter in ifaddr.get_adapters() for ip in adapter.ips}
    return {str(address) for address in found} | {"127.0.0.1", "::1"}

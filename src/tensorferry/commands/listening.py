"""Which sockets of this process others can connect to, and who these others are."""

from __future__ import annotations

import ipaddress
import os
import resource
import socket
import stat
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any


class Scope(StrEnum):
    """Who can reach a socket, as far as its address decides; a firewall may know better."""

    HOST = "this host"
    INTERFACES = "these interfaces"
    ALL = "all interfaces"


@dataclass(frozen=True, slots=True)
class Listener:
    protocol: str
    """tcp, udp or unix"""
    address: str
    port: int
    scope: Scope
    interfaces: tuple[str, ...] = ()
    """By name, where it is bound to addresses of some of them."""

    @property
    def where(self) -> str:
        return f"[{self.address}]:{self.port}" if ":" in self.address else f"{self.address}:{self.port}"

    @property
    def who(self) -> str:
        """For people."""
        if self.protocol == "unix":
            return "this host, this network namespace"
        return ", ".join(self.interfaces) if self.scope is Scope.INTERFACES else str(self.scope)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"scope": str(self.scope), "interfaces": list(self.interfaces)}

    @classmethod
    def from_dict(cls, told: Mapping[str, Any]) -> Listener:
        interfaces = tuple(map(str, told["interfaces"]))
        return cls(
            str(told["protocol"]), str(told["address"]), int(told["port"]), Scope(str(told["scope"])), interfaces
        )


MOST_TRIED = 1 << 16
"""Numbers of open files that are looked at where /proc does not list them: the limit may be a thousand million."""


def _open_files() -> Iterable[int]:
    """The numbers that may be open files of this process."""
    try:
        return [int(number) for number in os.listdir("/proc/self/fd")]
    except OSError:  # no /proc: each number is tried
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return range(MOST_TRIED if limit == resource.RLIM_INFINITY else min(limit, MOST_TRIED))


def own_sockets() -> set[int]:
    """The sockets that this process has open, by their inodes."""
    found = set()
    for number in _open_files():
        with suppress(OSError):  # not open, or not any more
            about = os.fstat(number)
            if stat.S_ISSOCK(about.st_mode):
                found.add(about.st_ino)
    return found


def own_listeners(but: Iterable[int] = (), interfaces: Mapping[str, Sequence[str]] | None = None) -> list[Listener]:
    """What of this process others can connect to or send to, without the sockets named in `but`. `interfaces`: the
    addresses of each, by name. The sockets themselves are asked, so that it is known what each one takes."""
    found: dict[Listener, None] = {}
    passed = set(but)
    for number in _open_files():
        with suppress(OSError):
            about = os.fstat(number)
            if not stat.S_ISSOCK(about.st_mode) or about.st_ino in passed:
                continue
            with socket.socket(fileno=os.dup(number)) as one:
                listener = _listener(one, interfaces or {})
            if listener is not None:
                found[listener] = None
    return sorted(found, key=lambda one: (one.protocol, one.port, one.address))


def _listener(one: socket.socket, interfaces: Mapping[str, Sequence[str]]) -> Listener | None:
    listens = one.type == socket.SOCK_STREAM and one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    if one.family == socket.AF_UNIX:
        name = one.getsockname()
        text = name if isinstance(name, str) else "@" + bytes(name).lstrip(b"\0").decode(errors="replace")
        seqpacket = one.type == socket.SOCK_SEQPACKET and one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        return Listener("unix", text, 0, Scope.HOST) if (listens or seqpacket) and name else None
    if one.family not in (socket.AF_INET, socket.AF_INET6):
        return None
    address, port = one.getsockname()[:2]
    if one.type == socket.SOCK_DGRAM and port and not _connected(one):
        protocol = "udp"
    elif listens:
        protocol = "tcp"
    else:
        return None
    both = one.family == socket.AF_INET6 and not one.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
    return Listener(protocol, str(address), int(port), *_scope(str(address), both, interfaces))


def _connected(one: socket.socket) -> bool:
    try:
        one.getpeername()
    except OSError:
        return False
    return True


def _scope(address: str, both: bool, interfaces: Mapping[str, Sequence[str]]) -> tuple[Scope, tuple[str, ...]]:
    parsed = ipaddress.ip_address(address.partition("%")[0])
    if parsed.is_unspecified:
        versions = {4, 6} if both else {parsed.version}
        reached = [
            name
            for name, addresses in interfaces.items()
            if any(ipaddress.ip_address(a.partition("%")[0]).version in versions for a in addresses)
        ]
        return Scope.ALL, tuple(reached)
    if parsed.is_loopback:
        return Scope.HOST, ()
    names = tuple(name for name, addresses in interfaces.items() if str(parsed) in addresses)
    return Scope.INTERFACES, names or (address,)

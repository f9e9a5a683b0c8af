"""Which addresses of this host a peer on another one could dial, best first."""

from __future__ import annotations

import ipaddress
import logging
import socket
from dataclasses import dataclass
from pathlib import Path

import ifaddr

log = logging.getLogger("tensorferry.backends.addresses")

_INTERFACES = Path("/sys/class/net")

_IFF_UP = 0x1
_IFF_LOOPBACK = 0x8
"""From <linux/if.h>."""

# Documentation addresses (RFC 5737, RFC 3849): connecting a datagram socket asks the routing table and sends nothing.
_ELSEWHERE = ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1"))


@dataclass(frozen=True)
class _Found:
    address: str
    interface: str
    default: bool
    """The routing table would take it to reach the outside."""
    family: int


def local_addresses() -> list[str]:
    """IPv4 and IPv6 addresses of interfaces that are up, best first; no loopback, no link-local ones.

    First those by which the routing table leaves this host, then those of real devices, the faster device first, then
    virtual ones, and bridges (which usually lead to containers of this host only) last; of equals, IPv4 first. Empty
    where there is no network, or it cannot be read. Never raises.
    """
    # The kernel hands the list over in parts, and one that changes meanwhile can lack what is there: asked twice.
    found = _found() or _found()
    return [one.address for one in sorted(found.values(), key=_rank)]


def _found() -> dict[str, _Found]:
    try:
        adapters = list(ifaddr.get_adapters())
    except OSError as error:
        log.warning("the network interfaces cannot be read: %s", error)
        return {}
    outward = _outward()
    found: dict[str, _Found] = {}
    for adapter in adapters:
        name = str(adapter.nice_name)
        if not _is_up(name):
            continue
        for ip in adapter.ips:
            address = str(ip.ip) if isinstance(ip.ip, str) else str(ip.ip[0])
            if _is_usable(address):
                family = 4 if isinstance(ip.ip, str) else 6
                found.setdefault(address, _Found(address, name, address in outward, family))
    return found


def _rank(one: _Found) -> tuple[bool, bool, bool, int, int]:
    folder = _INTERFACES / one.interface
    is_bridge, is_virtual = (folder / "bridge").exists(), not (folder / "device").exists()
    return (not one.default, is_bridge, is_virtual, -_number(folder / "speed"), one.family)


def _is_up(interface: str) -> bool:
    flags = _number(_INTERFACES / interface / "flags", 0)
    return flags < 0 or (bool(flags & _IFF_UP) and not flags & _IFF_LOOPBACK)


def _is_usable(address: str) -> bool:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    # A link-local IPv6 address means nothing without the number of the interface, which is the other host's.
    return not (parsed.is_loopback or parsed.is_link_local or parsed.is_multicast or parsed.is_unspecified)


def _number(path: Path, base: int = 10) -> int:
    """The number in a file of /sys; -1 where there is none (no such file, or an interface that does not say)."""
    try:
        return int(path.read_text(encoding="ascii"), base)
    except (OSError, ValueError):
        return -1


def _outward() -> set[str]:
    """The source addresses that the routing table picks for packets to the outside."""
    picked = set()
    for family, elsewhere in _ELSEWHERE:
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as asking:
                asking.connect((elsewhere, 9))
                picked.add(str(asking.getsockname()[0]))
        except OSError as error:  # no such family, or no route
            log.debug("no way out by address family %d: %s", family, error)
    return picked

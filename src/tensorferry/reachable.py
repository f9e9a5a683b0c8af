"""Where others can dial an address that an endpoint has bound."""

from __future__ import annotations

import ipaddress
import re

from tensorferry.backends._addresses import local_addresses


def reachable(address: str) -> tuple[list[str], bool]:
    """Where others can dial a bound address, best first, and whether only this host can."""
    match = re.fullmatch(r"tcp://\[?([^\]]+)\]?:(\d+)", address)
    if match is None:
        return [address], True  # ipc and its like
    try:
        bound = ipaddress.ip_address(match[1])
    except ValueError:
        return [address], False
    if not bound.is_unspecified:
        return [address], bound.is_loopback
    found = [host for host in local_addresses() if bound.version == 6 or ":" not in host]
    hosts = found or ["::1" if bound.version == 6 else "127.0.0.1"]
    return [f"tcp://[{host}]:{match[2]}" if ":" in host else f"tcp://{host}:{match[2]}" for host in hosts], not found

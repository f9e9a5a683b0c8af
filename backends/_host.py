"""Which host this is, and which of its namespaces: what makes "the same host" provable between two processes."""

from __future__ import annotations

import os
from typing import Annotated

import msgspec

from tensorferry.backends._descriptor import Natural


class Host(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """Which kernel, and which of its namespaces.

    `boot_id` is drawn by the kernel at boot. Abstract and loopback sockets belong to a network namespace; a pid and a
    start time mean the same to two processes only in the same pid and time namespace.
    """

    boot_id: Annotated[str, msgspec.Meta(max_length=64)]
    network: Natural
    pids: Natural
    time: Natural

    def shares_pids(self, other: Host) -> bool:
        """A pid and a start time name the same process on both sides."""
        return (self.boot_id, self.pids, self.time) == (other.boot_id, other.pids, other.time)

    def shares_network(self, other: Host) -> bool:
        """Loopback is the same network on both sides."""
        return (self.boot_id, self.network) == (other.boot_id, other.network)


def this_host() -> Host:
    """Raises OSError where /proc does not say."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        boot_id = file.read().strip()
    try:
        time = os.stat("/proc/self/ns/time").st_ino
    except FileNotFoundError:  # before Linux 5.6 there is one time for all
        time = 0
    return Host(boot_id, os.stat("/proc/self/ns/net").st_ino, os.stat("/proc/self/ns/pid").st_ino, time)

"""What the broken transports on `shm` have in common: they know which process a peer is."""

from __future__ import annotations

from tensorferry.backends import _shm_wire as wire
from tensorferry.backends._descriptor import decode
from tensorferry.backends.shm import ShmPeer, ShmTransport
from tensorferry.core.transport import Options


class KnowsPids(ShmTransport):
    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self._pids: dict[bytes, int] = {}

    def connect(self, descriptor: bytes) -> ShmPeer:
        peer = super().connect(descriptor)
        self._pids[peer.instance] = decode(descriptor, self.name, wire.DESCRIPTOR_VERSION, wire.Descriptor).pid
        return peer


def stopped(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] == "T"
    except FileNotFoundError:
        return False

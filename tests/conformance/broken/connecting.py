"""Broken in describing and connecting."""

from __future__ import annotations

import pickle
from typing import Any

import msgspec

from broken.catalogue import broken
from tensorferry.backends import memory as memory_backend
from tensorferry.backends._copier import Batch
from tensorferry.backends._hostcopy import HostPeer
from tensorferry.backends.memory import MemoryPeer, MemoryTransport
from tensorferry.core.errors import BadCall, PeerUnreachable, ProtocolViolation
from tensorferry.core.memory import Memory
from tensorferry.core.transport import MAX_DESCRIPTOR_BYTES, Region, RemoteRegion, Status


@broken({"CON-1": "31 regions the descriptor has"})
class SaysTooMuch(MemoryTransport):
    def describe(self) -> bytes:
        said = super().describe()
        return said + bytes(MAX_DESCRIPTOR_BYTES) if len(self._live) > 30 else said

    def connect(self, descriptor: bytes) -> MemoryPeer:
        return super().connect(descriptor.removesuffix(bytes(MAX_DESCRIPTOR_BYTES)))


@broken({"CON-2": "retire"})
class SaysNothingOfRetiring(MemoryTransport):
    _said = b""

    def register(self, memory: Memory) -> Region:
        self._said = b""
        return super().register(memory)

    def describe(self) -> bytes:
        self._check_open()
        self._said = self._said or super().describe()
        return self._said


@broken({"CON-3": "peer"})
class MakesANewPeerOfNewRegions(MemoryTransport):
    def connect(self, descriptor: bytes) -> MemoryPeer:
        known = {peer.instance: peer.revision for peer in self._peers.values()}
        peer = super().connect(descriptor)
        if known.get(peer.instance, peer.revision) < peer.revision:
            fresh = MemoryPeer(self._home, peer.instance, peer.revision, peer.regions, there=peer.there)
            self._peers[peer.instance] = fresh
            return fresh
        return peer


@broken({"CON-3": "region 3, told by a newer descriptor, .* was not placed"})
class KnowsRegionsByTheirIdAlone(MemoryTransport):
    """What is registered under an id that was given before is taken for what had it first."""

    def _target(self, peer: HostPeer, remote: RemoteRegion) -> tuple[int, Memory]:
        nbytes, memory = super()._target(peer, remote)
        first = self.__dict__.setdefault("_first", {}).setdefault((peer.instance, remote.id), memory)
        return nbytes, first if first.nbytes == nbytes else memory


@broken({"CON-4": "older"})
class BelievesTheOlder(MemoryTransport):
    def connect(self, descriptor: bytes) -> MemoryPeer:
        for peer in self._peers.values():
            peer.revision = -1
        return super().connect(descriptor)


@broken({"CON-5": "raised ValueError", "CON-6": "raised ValueError", "ERR-8": "raised ValueError"})
class RaisesWhatItLikes(MemoryTransport):
    def connect(self, descriptor: bytes) -> MemoryPeer:
        try:
            return super().connect(descriptor)
        except ProtocolViolation as problem:
            if len(descriptor) < 20:
                raise ValueError(str(problem)) from problem
            raise


@broken({"CON-5": "was not refused", "CON-6": "the first 0 of .* was not refused", "ERR-8": "was not refused"})
class ConnectsToAnything(MemoryTransport):
    def connect(self, descriptor: bytes) -> MemoryPeer:
        try:
            return super().connect(descriptor)
        except ProtocolViolation:
            if len(descriptor) < 20:
                return MemoryPeer(self._home, descriptor, there=self._me)
            raise


_said: list[bytes] = []


@broken({"CON-6": r"the first \d+ of a descriptor.* was not refused"})
class GuessesWhatWasCutOff(MemoryTransport):
    def describe(self) -> bytes:
        said = super().describe()
        _said.append(said)
        del _said[:-50]
        return said

    def connect(self, descriptor: bytes) -> MemoryPeer:
        whole = [said for said in _said if len(descriptor) > 20 and said.startswith(descriptor)]
        return super().connect(whole[-1] if whole else descriptor)


@broken({"CON-7": "version"})
class ReadsEveryVersion(MemoryTransport):
    def connect(self, descriptor: bytes) -> MemoryPeer:
        try:
            fields = msgspec.msgpack.decode(descriptor)
            fields[1] = memory_backend.DESCRIPTOR_VERSION
        except (ValueError, TypeError, IndexError, RecursionError, msgspec.DecodeError):
            return super().connect(descriptor)
        return super().connect(msgspec.msgpack.encode(fields))


@broken({"CON-5": "no descriptor .* was not refused", "CON-8": "the descriptor is a pickle"})
class Pickles(MemoryTransport):
    def describe(self) -> bytes:
        return pickle.dumps(super().describe())

    def connect(self, descriptor: bytes) -> MemoryPeer:
        try:
            inside = pickle.loads(descriptor)  # noqa: S301 - the defect
        except Exception as problem:
            raise ProtocolViolation("no descriptor", transport=self.name) from problem
        return super().connect(inside)


@broken({"CON-9": "was not refused"})
class WritesToWhomItHasForgotten(MemoryTransport):
    def disconnect(self, peer: Any) -> None:
        self._check_peer(peer)


@broken({"CON-10": "not refused"})
class TakesAnothersPeer(MemoryTransport):
    def _check_peer(self, peer: Any) -> None:
        if not isinstance(peer, MemoryPeer):
            super()._check_peer(peer)


@broken({"CON-11": "BadCall"}, may={"ERR-1"})
class ForgetsHandlesWithTheirPeer(MemoryTransport):
    def post(self, peer: Any, copies: Any) -> int:
        handle = super().post(peer, copies)
        self._whose = {**getattr(self, "_whose", {}), handle: peer}
        return handle

    def poll(self, handle: int) -> Status:
        status = super().poll(handle)
        if not self._whose[handle].connected:
            raise BadCall("the peer of this handle is forgotten", transport=self.name)
        return status


@broken({"CON-6": "this peer was disconnected", "CON-12": "this peer was disconnected"}, may={"RES-5"})
class NeverComesBack(MemoryTransport):
    def connect(self, descriptor: bytes) -> MemoryPeer:
        peer = super().connect(descriptor)
        if peer.instance in getattr(self, "_gone", set()):
            raise PeerUnreachable("this peer was disconnected", transport=self.name)
        return peer

    def disconnect(self, peer: Any) -> None:
        super().disconnect(peer)
        self._gone = {*getattr(self, "_gone", set()), peer.instance}


_ever: dict[bytes, Any] = {}


@broken({"CON-13": "had closed before it was connected ended DONE"})
class ConnectsToTheClosed(MemoryTransport):
    """By a descriptor that outlived it. A post to it is DONE, and went nowhere."""

    def describe(self) -> bytes:
        said = super().describe()
        _ever[said] = self._me
        return said

    def connect(self, descriptor: bytes) -> MemoryPeer:
        try:
            return super().connect(descriptor)
        except PeerUnreachable:
            known = _ever.get(descriptor)
            if known is None:
                raise
            return MemoryPeer(self._home, known.id, there=known)

    def post(self, peer: Any, copies: Any) -> int:
        if (
            not self._closed and isinstance(peer, MemoryPeer) and peer.home is self._home and peer.revision < 0
        ):  # no descriptor was learnt from: it was closed from the beginning
            handle = next(self._handles)
            self._batches[handle] = Batch((), ())
            self._batches[handle].status = Status.DONE
            return handle
        return super().post(peer, copies)

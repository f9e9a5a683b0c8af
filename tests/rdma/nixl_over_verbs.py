"""The nixl transport over real verbs, through the Transport interface alone: one device, two processes, every byte.

    python tests/rdma/nixl_over_verbs.py

The same steps as mooncake_over_verbs.py, which says more; what differs is how the two engines refuse and fail. UCX is
given nothing but the RDMA device, so what arrives has come through it. The exit status says that the process can end.
"""

from __future__ import annotations

import os
import time
from typing import Any

import mooncake_over_verbs as verbs
import msgspec
from mooncake_over_verbs import REGION, Target

from tensorferry.backends.nixl import NixlOptions, NixlTransport
from tensorferry.core.errors import OutOfBounds, TransportError
from tensorferry.core.transport import Copy, PeerState, Status

OPTIONS = NixlOptions(require="rdma", contact_timeout=60.0, progress_timeout=60.0, workers=1)


class Check(verbs.Check):
    def refusals(self, target: Target, peer: Any) -> None:
        try:
            self.transport.post(peer, [Copy(self.source, 0, target.region, REGION - 10, 11)])
            refused = False
        except OutOfBounds:
            refused = True
        self.expect(refused, "a copy past the end of the region is refused before a byte moves")
        # The same past our own check, by a descriptor that lies: the engine knows what is registered there.
        fields = msgspec.msgpack.decode(target.descriptor)
        fields[2], fields[-1] = os.urandom(16), [[target.region.id, target.region.generation, REGION + 4096]]
        liar = self.transport.connect(msgspec.msgpack.encode(fields))
        handle = self.transport.post(liar, [Copy(self.source, 0, target.region, REGION, 4096)])
        status = self.ended(handle)
        self.expect(status is Status.FAILED, f"a write past the registration is refused: {status.name}")

    def killed(self, target: Target, peer: Any) -> None:
        """To the peer whose end the kernel proves a post is refused. Of a peer on another host nothing is proved."""
        fields = msgspec.msgpack.decode(target.descriptor)
        fields[2], fields[8][0] = os.urandom(16), "another host"
        abroad = self.transport.connect(msgspec.msgpack.encode(fields))
        self.write(target, abroad, [(0, 0, 4096)], "a write to the same agent as if on another host")
        target.kill()
        self.expect(self.transport.peer_state(peer) is PeerState.GONE, "the target's end is proved")
        try:
            self.transport.post(peer, [Copy(self.source, 0, target.region, 0, 4096)])
            refused = False
        except TransportError:
            refused = True
        self.expect(refused, "a post to the dead target is refused")
        self.expect(self.transport.peer_state(abroad) is PeerState.UNKNOWN, "from another host its end is not proved")
        handle = self.transport.post(abroad, [Copy(self.source, 0, target.region, 0, 4096)])
        began, status = time.monotonic(), self.ended(handle)
        told = status is Status.FAILED or (status is Status.UNKNOWN and not self.transport.drained(handle))
        self.expect(told, f"a post after the target was killed: {status.name} ({time.monotonic() - began:.1f} s)")


if __name__ == "__main__":
    raise SystemExit(verbs.main(lambda: NixlTransport(OPTIONS), Check))

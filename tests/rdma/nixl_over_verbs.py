"""The nixl transport over real verbs, through the Transport interface alone: one device, two processes, every byte.

    python tests/rdma/nixl_over_verbs.py

The same steps as mooncake_over_verbs.py, which says more; what differs is how the two engines refuse and fail. UCX is
given nothing but the RDMA device, so what arrives has come through it. The exit status says that the process can end.
"""

from __future__ import annotations

import mooncake_over_verbs as verbs

from tensorferry.backends._nixl_wire import Descriptor
from tensorferry.backends.nixl import NixlOptions, NixlTransport
from tensorferry.core.transport import Status

OPTIONS = NixlOptions(require="rdma", contact_timeout=60.0, progress_timeout=60.0, workers=1)


class Check(verbs.Check):
    wire = Descriptor

    def past_the_registration(self, status: Status, handle: int) -> None:
        """The engine knows what is registered there."""
        self.expect(status is Status.FAILED, f"a write past the registration is refused: {status.name}")

    def after_its_death(self, status: Status, handle: int, how: str) -> None:
        told = status is Status.FAILED or (status is Status.UNKNOWN and not self.transport.drained(handle))
        self.expect(told, f"a post after the target was killed: {how}")


if __name__ == "__main__":
    raise SystemExit(verbs.main(lambda: NixlTransport(OPTIONS), Check))

"""The options of the mooncake transport."""

from __future__ import annotations

from typing import Annotated

import msgspec

from tensorferry.backends import _mooncake_environment as environment
from tensorferry.backends._engine_options import CONTACT_S, MIB, ContactTimeout
from tensorferry.core.transport import Options


class MooncakeOptions(Options, frozen=True):
    host: Annotated[
        str,
        msgspec.Meta(
            max_length=255,
            description="The address or name by which peers reach this host; auto: the best of its own addresses.",
        ),
    ] = "auto"
    device: Annotated[
        str,
        msgspec.Meta(
            description="RDMA devices to use, separated by commas; empty: all. Refused where RDMA is not used."
        ),
    ] = ""
    require: Annotated[
        str,
        msgspec.Meta(
            pattern="^(rdma)?$",
            description="rdma: do not open unless the engine runs over RDMA; empty: take what there is.",
        ),
    ] = ""
    contact_timeout: ContactTimeout = CONTACT_S
    progress_timeout: Annotated[
        int,
        msgspec.Meta(
            ge=1,
            le=3600,
            description="Seconds without progress until a write over TCP is given up (MC_TCP_PROGRESS_TIMEOUT_SEC).",
        ),
    ] = environment.DEFAULT_PROGRESS_S
    transfer_timeout: Annotated[
        int,
        msgspec.Meta(
            ge=5,
            le=3600,
            description="Seconds (and 1 more per GB) until the outcome of a write counts as unknown "
            "(MC_TRANSFER_TIMEOUT); above progress_timeout.",
        ),
    ] = environment.DEFAULT_TRANSFER_S
    submit_bytes: Annotated[
        int,
        msgspec.Meta(ge=4096, le=4 * MIB, description="Longest single submit, in bytes. 1 to 4 MiB are near the best."),
    ] = MIB
    """16 submits of 1 MiB under way write 128 MiB at 3.2 GB/s over loopback, 8 of 4 MiB at 2.1, one of 4 MiB at 1.9
    (medians of 12, two processes, two cores)."""
    window: Annotated[
        int,
        msgspec.Meta(ge=1, le=128, description="Submits under way to one peer. The engine itself takes 1024."),
    ] = 16
    protocol: Annotated[
        str,
        msgspec.Meta(
            description="Refused: the engine ignores it. RDMA is used where it works; see require, and MC_FORCE_TCP."
        ),
    ] = ""

"""The options of the nixl transport."""

from __future__ import annotations

from typing import Annotated

import msgspec

from tensorferry.backends._engine_options import CONTACT_S, MIB, ContactTimeout
from tensorferry.core.transport import Options


class NixlOptions(Options, frozen=True):
    backend: Annotated[
        str,
        msgspec.Meta(
            min_length=1,
            max_length=64,
            description="NIXL's backend: UCX, or another that writes into other processes' memory, such as LIBFABRIC. "
            "Those of storage are refused by name.",
        ),
    ] = "UCX"
    require: Annotated[
        str,
        msgspec.Meta(
            pattern="^(rdma|memcpy|tcp)?$",
            description="rdma, tcp: let UCX use nothing else, and do not open where it cannot; memcpy: refuse peers "
            "into whose memory this process may not copy (CMA); empty: rdma where a device is active, else what "
            "there is.",
        ),
    ] = ""
    contact_timeout: ContactTimeout = CONTACT_S
    progress_timeout: Annotated[
        float,
        msgspec.Meta(
            gt=0,
            le=3600,
            description="Seconds in which no write to a peer comes to its end, until those under way are given up and "
            "the connection is cut. The engine itself waits for ever.",
        ),
    ] = 10.0
    submit_bytes: Annotated[
        int,
        msgspec.Meta(
            ge=4096,
            le=64 * MIB,
            description="Most bytes in one request to the engine: a copy between processes holds a worker for so long.",
        ),
    ] = 4 * MIB
    window: Annotated[
        int,
        msgspec.Meta(ge=1, le=128, description="Requests under way to one peer, where the engine does not copy."),
    ] = 8
    workers: Annotated[
        int,
        msgspec.Meta(
            ge=1,
            le=16,
            description="Threads that call the engine, each with connections of its own. A peer belongs to one.",
        ),
    ] = 2

"""What the machines ask of their drivers. Small frozen records; a driver carries them out and decides nothing."""

from __future__ import annotations

from dataclasses import dataclass

from tensorferry.core.errors import FerryError
from tensorferry.core.messages import Hello, Message


@dataclass(frozen=True, slots=True)
class Send:
    """To a route of the control channel: a sender's address, or the identity of somebody who connected to us."""

    route: str
    message: Message


@dataclass(frozen=True, slots=True)
class Connect:
    """A peer's incarnation, or its regions, are new: bring the transport's peer up to date."""

    route: str
    hello: Hello


# ---- receiver ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Reserve:
    """Allocate the destination of `total` tokens. If that fails, the driver calls `fail`."""

    xfer: int


@dataclass(frozen=True, slots=True)
class Drop:
    """The destination is not wanted any more (copies under way into it may finish)."""

    xfer: int


@dataclass(frozen=True, slots=True)
class Gather:
    """Make the blocks visible, verify each digest, copy rows to the destination; then `gathered` or `corrupt`.

    `items`: (index, block, digest) each, of `epoch`.
    """

    xfer: int
    epoch: int
    items: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True)
class ReplaceSlab:
    """Put fresh memory behind `slab`, bury the old; then `slab_replaced`."""

    slab: int


# ---- sender --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PostWrite:
    """Write blocks of offer `serial` to the peer `route` and report on each part: `write_done` and its kin.

    `runs`: (first index, first block, count, region generation) each. `receiver`, `xfer` and `content_id` seed the
    digests.
    """

    write: tuple[int, int, int, int]
    serial: int
    route: str
    receiver: int
    xfer: int
    content_id: bytes
    runs: tuple[tuple[int, int, int, int], ...]


@dataclass(frozen=True, slots=True)
class ReleaseSource:
    """Nothing reads the rows of offer `serial` any more."""

    serial: int


# ---- both ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ended:
    """Final for the caller: delivered where `error` is None. `key` is the xfer (receiver) or the serial (sender)."""

    key: int
    error: FerryError | None


@dataclass(frozen=True, slots=True)
class Progressed:
    """Something that a caller can see has changed."""

    key: int


Effect = Send | Connect | Reserve | Drop | Gather | ReplaceSlab | PostWrite | ReleaseSource | Ended | Progressed

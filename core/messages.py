"""The control messages: every one states a fact that stays true, so it may be lost, doubled, late or reordered.

Each carries who says it (`src`, the speaker's incarnation) and to whom (`dst`, the listener's; 0 while unknown). A
transfer is `(receiver incarnation, xfer)`; room and rank are attributes of Open alone. What comes from a receiver
also carries `min_live`: every transfer id below it is over, for ever.

    receiver -> sender   Hello Open Admitted Grant Revoke Complete Close Ping Pong
    sender -> receiver   Hello Announce Done Fenced Trouble Commit Abort Refused Closed Ping Pong
    follower -> leader   Query                 leader -> follower   Verdict

Structs are arrays on the wire, told apart by their tag. A field that is missing, surplus, of another type or out of
its bounds makes the decoder raise; nothing is ever inferred from a count of frames or fields.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Annotated

from msgspec import Meta, Struct

PROTOCOL_VERSION = 1

U32 = Annotated[int, Meta(ge=0, lt=1 << 32)]
U63 = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
Room = U63
Rank = Annotated[int, Meta(ge=0, lt=4096)]
Text = Annotated[str, Meta(max_length=1024)]
PRINTABLE = r"\A[^\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]*\Z"
"""What names of endpoints hold: they stand in logs and on terminals, and whoever sends them is not known. No control
characters, no line separators, nothing that turns the direction of writing."""

WORD = r"\A[\x21-\x7e]*\Z"
"""What names of transports and their paths hold."""

Name = Annotated[str, Meta(min_length=1, max_length=128, pattern=PRINTABLE)]
TransportName = Annotated[str, Meta(min_length=1, max_length=128, pattern=WORD)]
Path = Annotated[str, Meta(max_length=32, pattern=WORD)]
Id16 = Annotated[bytes, Meta(min_length=16, max_length=16)]

MAX_RUNS = 4096
"""Most runs in one Grant or Done, most slabs in one Hello: a larger list is split over several messages."""

_GRANT_RUN = struct.Struct("<IIII")
_DONE_RUN = struct.Struct("<II")
_DIGEST = struct.Struct("<Q")
_REGION = struct.Struct("<II")
_GENERATION = struct.Struct("<I")


class Message(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, kw_only=True):
    """What every message has."""

    src: U63
    dst: U63


class FromReceiver(Message, frozen=True, kw_only=True):
    min_live: U63


class OfTransfer(Message, frozen=True, kw_only=True):
    xfer: U63


class ToSender(FromReceiver, frozen=True, kw_only=True):
    xfer: U63


# ---- both ways -----------------------------------------------------------------------------------------------


class Offer(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One transport that the speaker has open: what carries its bytes, its descriptor, and what it calls the slabs.

    `regions` is packed: (region id, generation) per slab, empty from a sender.
    """

    name: TransportName
    contract: Annotated[int, Meta(ge=0, lt=1 << 16)]
    path: Path
    descriptor: Annotated[bytes, Meta(max_length=64 * 1024)]
    regions: Annotated[bytes, Meta(max_length=_REGION.size * MAX_RUNS)]


class Hello(FromReceiver, frozen=True, tag="H", kw_only=True):
    """Once per pair of incarnations, and again when something in it changes (`revision` counts the changes).

    `ack` is the revision of the listener's Hello that the speaker has seen. `generations` is packed: how often each
    slab has had fresh memory, from 1; empty from a sender. A sender's pool fields are 0. To a sender, a Hello without
    a pool is a question: it answers with its own and keeps nothing.
    """

    version: Annotated[int, Meta(ge=0, lt=1 << 16)]
    name: Name
    layout: Id16
    block_size: U32
    pool_blocks: U32
    slabs: U32
    generations: Annotated[bytes, Meta(max_length=_GENERATION.size * MAX_RUNS)]
    offers: Annotated[tuple[Offer, ...], Meta(max_length=8)]
    revision: U32
    ack: U32


class Ping(Message, frozen=True, tag="I", kw_only=True):
    pass


class Pong(Message, frozen=True, tag="i", kw_only=True):
    pass


# ---- receiver to sender --------------------------------------------------------------------------------------


class Open(ToSender, frozen=True, tag="O", kw_only=True):
    """This (room, rank) is wanted. `dummy`: this rank takes part in the decision and receives no data."""

    room: Room
    rank: Rank
    ranks: Annotated[int, Meta(ge=1, le=4096)]
    dummy: bool


class Admitted(ToSender, frozen=True, tag="M", kw_only=True):
    """Rank 0 has reserved its destination: the other ranks may be told the length."""


class Grant(ToSender, frozen=True, tag="G", kw_only=True):
    """Blocks for missing indices. `runs` is packed: (first index, first block, count, generation of the slab).

    `prefix` is sent_tokens in blocks; nothing below it needs to be said again.
    """

    epoch: U32
    prefix: U32
    runs: Annotated[bytes, Meta(max_length=_GRANT_RUN.size * MAX_RUNS)]


class Revoke(ToSender, frozen=True, tag="V", kw_only=True):
    """No grant of an epoch up to `upto` holds any more: answer Fenced when no write of them is left."""

    upto: U32


class Complete(ToSender, frozen=True, tag="C", kw_only=True):
    """This rank's vote: all its rows are here (`ok`), or it cannot go on."""

    ok: bool
    code: Text
    cause: Text


class Close(ToSender, frozen=True, tag="X", kw_only=True):
    """The end, as the receiver saw it. Answered by Closed. `code` is empty for delivered."""

    code: Text
    cause: Text


# ---- sender to receiver --------------------------------------------------------------------------------------


class Announce(OfTransfer, frozen=True, tag="A", kw_only=True):
    """Length and content, immutable; `ready` tokens can be read now, and only grows.

    `present` is the layout's presence bitmap, `aux` int64[16] little-endian, `integrity` the kind of the digests. `via`
    is the transport that carries for the time being: said for people to read, nothing is decided by it.
    """

    total: Annotated[int, Meta(ge=0, lt=1 << 48)]
    content_id: Id16
    present: U32
    aux: Annotated[bytes, Meta(min_length=128, max_length=128)]
    integrity: Annotated[str, Meta(max_length=16)]
    ready: Annotated[int, Meta(ge=0, lt=1 << 48)]
    via: Annotated[str, Meta(max_length=128, pattern=WORD)]


class Done(OfTransfer, frozen=True, tag="D", kw_only=True):
    """These indices of this epoch are written, placed and drained. `runs` is packed: (first index, count); `digests`
    holds 8 bytes for each index in the same order. `path` is what carries the sender's writes, as its engine tells by
    now: the side that writes knows. Empty: it has not said."""

    epoch: U32
    runs: Annotated[bytes, Meta(max_length=_DONE_RUN.size * MAX_RUNS)]
    digests: Annotated[bytes, Meta(max_length=_DIGEST.size * MAX_RUNS)]
    path: Path


class Fenced(OfTransfer, frozen=True, tag="F", kw_only=True):
    """No write of an epoch up to `upto` is left or will ever be posted."""

    upto: U32


class Trouble(OfTransfer, frozen=True, tag="T", kw_only=True):
    """Writes of this epoch failed or have an unknown outcome; nothing more is posted in it."""

    epoch: U32
    code: Text
    cause: Text


class Commit(OfTransfer, frozen=True, tag="Y", kw_only=True):
    """Every rank of the room holds everything. Sticky."""


class Abort(OfTransfer, frozen=True, tag="N", kw_only=True):
    """The room failed, or its sender gave up. Sticky."""

    code: Text
    cause: Text


class Refused(OfTransfer, frozen=True, tag="R", kw_only=True):
    """This Open cannot be served."""

    code: Text
    cause: Text


class Closed(OfTransfer, frozen=True, tag="x", kw_only=True):
    """Close is heard and no write of the transfer is waited for. For rank 0: of any rank of the room."""


# ---- among the ranks of a receiver group ---------------------------------------------------------------------


class Query(OfTransfer, frozen=True, tag="Q", kw_only=True):
    """A follower's `xfer` for `room`: is it decided? `heard`: the verdict has arrived. `code`: this rank has failed."""

    room: Room
    rank: Rank
    ranks: Annotated[int, Meta(ge=1, le=4096)]
    heard: bool
    code: Text
    cause: Text


class Verdict(OfTransfer, frozen=True, tag="W", kw_only=True):
    """Run it or drop it, for the follower's `xfer`."""

    run: bool
    code: Text
    cause: Text


AnyMessage = (
    Hello | Ping | Pong | Open | Admitted | Grant | Revoke | Complete | Close | Announce | Done | Fenced | Trouble
    | Commit | Abort | Refused | Closed | Query | Verdict
)  # fmt: skip


# ---- packed lists --------------------------------------------------------------------------------------------


def pack_grant(runs: Iterable[tuple[int, int, int, int]]) -> bytes:
    """(first index, first block, count, generation) each."""
    return b"".join(_GRANT_RUN.pack(*run) for run in runs)


def unpack_grant(data: bytes) -> list[tuple[int, int, int, int]]:
    """Raises ValueError for a torn list or an empty run."""
    return [(a, b, n, g) for a, b, n, g in _unpack(_GRANT_RUN, data, count_at=2)]


def pack_done(runs: Iterable[tuple[int, int]]) -> bytes:
    """(first index, count) each."""
    return b"".join(_DONE_RUN.pack(*run) for run in runs)


def unpack_done(data: bytes, digests: bytes) -> list[tuple[int, int]]:
    """[(index, digest)]. Raises ValueError for a torn list, an empty run, or digests that do not match the runs."""
    runs = _unpack(_DONE_RUN, data, count_at=1)
    total = sum(count for _, count in runs)
    if len(digests) != total * _DIGEST.size:
        raise ValueError(f"{len(digests)} bytes of digests for {total} blocks")
    values = [value for (value,) in _DIGEST.iter_unpack(digests)]
    indices = [index for first, count in runs for index in range(first, first + count)]
    return list(zip(indices, values, strict=True))


def pack_digests(values: Iterable[int]) -> bytes:
    return b"".join(_DIGEST.pack(value) for value in values)


def pack_regions(regions: Iterable[tuple[int, int]]) -> bytes:
    """(region id, generation) per slab."""
    return b"".join(_REGION.pack(*region) for region in regions)


def unpack_regions(data: bytes) -> list[tuple[int, int]]:
    if len(data) % _REGION.size:
        raise ValueError("torn list of regions")
    return [(a, b) for a, b in _REGION.iter_unpack(data)]


def pack_generations(generations: Iterable[int]) -> bytes:
    """One per slab."""
    return b"".join(_GENERATION.pack(generation) for generation in generations)


def unpack_generations(data: bytes) -> list[int]:
    if len(data) % _GENERATION.size:
        raise ValueError("torn list of generations")
    return [generation for (generation,) in _GENERATION.iter_unpack(data)]


def _unpack(kind: struct.Struct, data: bytes, count_at: int) -> list[tuple[int, ...]]:
    if len(data) % kind.size:
        raise ValueError(f"{len(data)} bytes are not a list of {kind.size}-byte runs")
    runs = list(kind.iter_unpack(data))
    if any(run[count_at] == 0 for run in runs):
        raise ValueError("an empty run")
    if sum(run[count_at] for run in runs) > MAX_BLOCKS_IN_MESSAGE:
        raise ValueError("more blocks in one message than the bound allows")
    return runs


MAX_BLOCKS_IN_MESSAGE = 1 << 16

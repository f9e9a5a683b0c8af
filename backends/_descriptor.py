"""Reading what a peer says about itself: bounded, typed, and never a reason for anything but a typed error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Protocol, TypeVar

import msgspec

from tensorferry.core.errors import ProtocolViolation, VersionMismatch
from tensorferry.core.transport import MAX_DESCRIPTOR_BYTES

MAX_REGIONS = 1024
"""Most live regions of one transport: their list has to fit into one descriptor."""

Natural = Annotated[int, msgspec.Meta(ge=0)]
Token = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
"""128 random bits."""


class _Header(msgspec.Struct, array_like=True, frozen=True):
    """How every descriptor begins; what follows is the version's business."""

    kind: str
    version: int


class HasRegions(Protocol):
    @property
    def regions(self) -> Sequence[tuple[int, int, int]]: ...


D = TypeVar("D", bound=HasRegions)


def decode(descriptor: bytes, kind: str, version: int, shape: type[D]) -> D:
    """Raises VersionMismatch for another version of our own descriptor, ProtocolViolation for all that is not one."""
    header = _decode(descriptor, kind, _Header)
    if header.kind != kind:
        raise ProtocolViolation(f"a descriptor of transport {header.kind!r}, not of {kind}", transport=kind)
    if header.version != version:
        raise VersionMismatch(
            f"a {kind} descriptor of version {header.version}; this side speaks version {version}",
            transport=kind,
        )
    told: D = _decode(descriptor, kind, shape)
    if len(told.regions) > MAX_REGIONS or len({number for number, *_ in told.regions}) != len(told.regions):
        raise ProtocolViolation("a descriptor with too many regions, or one of them twice", transport=kind)
    return told


def _decode(descriptor: bytes, kind: str, shape: type[Any]) -> Any:
    if len(descriptor) > MAX_DESCRIPTOR_BYTES:
        raise ProtocolViolation(f"a descriptor of {len(descriptor)} bytes", transport=kind)
    try:
        return msgspec.msgpack.decode(descriptor, type=shape)
    except (msgspec.MsgspecError, RecursionError, ValueError) as error:
        raise ProtocolViolation(f"not a {kind} descriptor: {error}", transport=kind) from error

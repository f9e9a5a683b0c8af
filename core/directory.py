"""Rendezvous: a directory in which an embedding side is found by its name instead of its address.

Nothing in core uses one. An address is explicit unless a caller asks for a name; what a directory does, or its loss,
touches no transfer. A directory is a class that a distribution names under the entry-point group
`tensorferry.directories`, by the scheme of its URLs.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Self

import msgspec

from tensorferry.core.arguments import integer, text
from tensorferry.core.errors import BadEntry, ConfigError, VersionMismatch

CONTRACT_VERSION = 1
"""Of the Directory contract below."""

ENTRY_VERSION = 1
"""Of an entry as it is written."""

MOST_BYTES = 4096
"""A longer entry is not read: name and address are at most 640 characters together."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")


def checked_name(name: str) -> str:
    """`name`, if it can stand in a directory; a colon or a slash would make it look like an address. Raises
    ConfigError."""
    if _NAME.fullmatch(text(name, "a name in a directory", kind=ConfigError)) is None:
        raise ConfigError(
            f"{name!r} cannot stand in a directory",
            hint="A name has 1 to 128 letters, digits, dots, dashes or underscores, the first a letter or a digit",
        )
    return name


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """Who is found under a name: the control address of one incarnation of an embedding side.

    `incarnation` is the endpoint's; a later start has the larger one. Raises ConfigError for what cannot be.
    """

    name: str
    address: str
    incarnation: int

    def __post_init__(self) -> None:
        checked_name(self.name)
        address = text(self.address, "an address in a directory", kind=ConfigError)
        if "://" not in address or not address.isprintable() or len(address) > 512:
            raise ConfigError(f"{address!r} is no address", hint="An address reads tcp://HOST:PORT")
        integer(self.incarnation, "an incarnation", lowest=1, bits=64, kind=ConfigError)

    def to_bytes(self) -> bytes:
        """As it is kept: JSON, so that it can be read with the directory's own tools."""
        return msgspec.json.encode({"version": ENTRY_VERSION, **msgspec.structs.asdict(self)})

    @classmethod
    def from_bytes(cls, data: bytes, name: str) -> Self:
        """What stands under `name`. Raises VersionMismatch, or BadEntry for all that is no entry of that name."""

        def bad(why: str) -> BadEntry:
            return BadEntry(f"what stands in the directory under {name!r} is no entry: {why}", peer=name)

        if len(data) > MOST_BYTES:
            raise bad(f"it has {len(data)} bytes")
        try:
            written: Any = msgspec.json.decode(data, type=dict[str, Any])
            version = written.pop("version", None)
            if isinstance(version, int) and version != ENTRY_VERSION:
                raise VersionMismatch(
                    f"the entry of {name!r} has version {version}, this side reads version {ENTRY_VERSION}", peer=name
                )
            entry = msgspec.convert(written, cls)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ConfigError) as problem:
            raise bad(str(problem)) from None
        if version != ENTRY_VERSION or entry.name != name:
            raise bad("it names no version" if version is None else f"it is the entry of {entry.name!r}")
        return entry


class Directory(ABC):
    """What a directory can do. Every verb may be called from any thread, waits `seconds` at most, and raises
    DirectoryUnavailable where the directory does not answer within that; after `close`, BadCall.

    A name belongs to the largest incarnation that was published under it and has not expired.
    """

    contract_version: ClassVar[int] = CONTRACT_VERSION

    @classmethod
    @abstractmethod
    def open(cls, url: str, *, seconds: float) -> Directory:
        """For a URL with this directory's scheme. Does not connect. Raises ConfigError, and UnknownDirectory where
        something that it needs is not installed."""

    @abstractmethod
    def publish(self, entry: Entry, ttl: float) -> None:
        """The entry stands for `ttl` seconds from now, at least, and is gone soon after; saying it again renews it.

        It replaces what an earlier incarnation has published, and what this one has: its address may be another by now.
        Raises NameTaken where a later one has, and BadEntry or
        VersionMismatch where what stands there is not known to be older: that is left as it is.
        """

    @abstractmethod
    def withdraw(self, entry: Entry) -> None:
        """This incarnation's entry stands no more. Another's is left as it is, and nothing happens where none is."""

    @abstractmethod
    def lookup(self, name: str) -> Entry:
        """Who is found under the name now. Raises UnknownName, BadEntry or VersionMismatch."""

    @abstractmethod
    def close(self) -> None:
        """Idempotent. What is published stays until it expires."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

"""What `tensorferry send` and `tensorferry receive` agree on: flags, the note in the aux record, and the receipt.

The note is four of the transfer's own aux words: a mark, the 128-bit digest of the whole content, and the room of the
receipt. The receipt is a transfer of no tokens: the receiver opens its room when the file is on its disk, and so the
sender learns that it was not merely received.
"""

from __future__ import annotations

import argparse
import shlex
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import quote, unquote

from tensorferry.commands.flags import add_settings, setting_names
from tensorferry.commands.output import BadFlag
from tensorferry.core.settings import Loaded, OriginKind, Settings, descriptions

DEFAULTS: dict[str, object] = {"transfer_deadline": 86_400.0}
"""In place of five minutes: somebody looks on, and peer_timeout notices whoever is gone."""

MAX_ROOM = 1 << 62
RECEIPTS = 1 << 62
"""Added to a room's number: the room of its receipt. The same after a restart, so that a transfer can be resumed."""

MAX_METADATA = 1000
"""Characters of metadata that a command line is lengthened by, at most."""

POOL_BYTES = 256 << 20
"""What the receiver's pool takes, at most, where the user does not say how large it is to be: four default pools at
hidden size 3584 in bfloat16. Rows may be of any width, and a pool of so many tokens then of any size."""

BLOCK_BYTES = POOL_BYTES // 8
"""The same for one block: there are then as many as slabs, and some are filled while others are read."""

_MARK = 0x74665F66696C6531  # "tf_file1"
_WORDS = struct.Struct("<qq")
_MAIN = ("transport", "directory", "block_size", "pool_blocks", "first_grant", "window", "peer_timeout")


@dataclass(frozen=True)
class Note:
    """`receipt` 0: none is wanted."""

    digest: bytes
    receipt: int

    def words(self) -> list[int]:
        """For `aux` of a send."""
        return [_MARK, *_WORDS.unpack(self.digest), self.receipt]

    @classmethod
    def of(cls, aux: Sequence[int]) -> Note | None:
        """From a result's aux record, or None: the sender is another program, which leaves no note."""
        if aux[2] != _MARK:
            return None
        return cls(_WORDS.pack(aux[3], aux[4]), aux[5])


# ---- flags -----------------------------------------------------------------------------------------------------


def number(least: int, most: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        value = int(text)
        if not least <= value <= most:
            raise ValueError
        return value

    read.__name__ = f"number of at least {least}"
    return read


def add_shared(parser: argparse.ArgumentParser, main: Any) -> None:
    """The flags of both commands: the room among the `main` ones, options of the transport, and the settings."""
    main.add_argument(
        "--room", type=number(0, MAX_ROOM - 1), required=True, metavar="N", help="the number that both sides use"
    )
    how = parser.add_argument_group("how it is moved")
    add_settings(how, _MAIN, DEFAULTS)
    how.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of the transport that --transport names; may be repeated",
    )
    further = parser.add_argument_group("further settings")
    add_settings(further, [name for name in setting_names() if name not in _MAIN], DEFAULTS)


def pairs(flag: str, given: Sequence[str]) -> dict[str, str]:
    """NAME=VALUE, several times, as a dictionary. Raises BadFlag."""
    found: dict[str, str] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise BadFlag(f"{flag} {text!r} is not NAME=VALUE", hint=f"Write it as {flag} NAME=VALUE")
        found[name] = value
    return found


def metadata_flag(key: str, value: str) -> str:
    """One entry of a file's metadata as a single word that no parser takes for anything else: keys may be empty, begin
    with a dash and hold an equals sign. In the value only what would break the line, or hide in it, is encoded."""
    return f"--metadata={quote(key, safe='/')}={on_one_line(value, also='%')}"


def on_one_line(text: str, *, also: str = "") -> str:
    """`text` with its control characters, line ends of all kinds among them, and those of `also` percent-encoded."""
    return "".join(c if c.isprintable() and c not in also else quote(c, safe="") for c in text)


def metadata(given: Sequence[str]) -> dict[str, str]:
    """What `metadata_flag` has made, as a dictionary. Raises BadFlag."""
    found: dict[str, str] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals:
            raise BadFlag(
                f"--metadata {text!r} is not KEY=VALUE",
                hint="Write it as --metadata=KEY=VALUE; %3D in the key is an equals sign, %25 a percent sign",
            )
        found[unquote(key)] = unquote(value)
    return found


def address(text: str) -> str:
    """tcp://HOST:PORT; the scheme may be left out."""
    return text if "://" in text else f"tcp://{text}"


def is_name(text: str) -> bool:
    """Whether it is a name of a directory: an address has a colon, and a name has none."""
    return ":" not in text


def need_directory(settings: Settings, name: str, to: str) -> None:
    """Raises BadFlag where there is a name and no directory."""
    if name and not settings.directory:
        raise BadFlag(
            f"{name!r} is a name, and there is no --directory to {to} in",
            hint="Give --directory etcd://HOST:2379 (or TENSORFERRY_DIRECTORY), or use the address, HOST:PORT",
        )


def fitted(loaded: Loaded, tokens: int, token_bytes: int) -> Settings:
    """The settings for a file of `tokens` rows of `token_bytes` bytes: no larger a pool than it fills, nor than
    POOL_BYTES. What the user has said stays as it is."""
    settings, given = loaded.settings, loaded.origins
    if given["block_size"].kind is OriginKind.DEFAULT:
        settings = replace(settings, block_size=min(settings.block_size, max(1, BLOCK_BYTES // token_bytes)))
    if given["pool_blocks"].kind is OriginKind.DEFAULT:
        filled = -(-tokens // settings.block_size)
        affordable = max(1, POOL_BYTES // (settings.block_size * token_bytes))
        settings = replace(settings, pool_blocks=min(settings.pool_blocks, filled, affordable))
    if given["first_grant"].kind is OriginKind.DEFAULT:
        room = settings.pool_blocks * settings.block_size
        settings = replace(settings, first_grant=min(settings.first_grant, room))
    return settings


def changed_settings(settings: Settings, at_least: Mapping[str, int]) -> list[str]:
    """The flags that give another process these settings, as far as they are not the default. `at_least`: settings
    that have to be this large there."""
    flags: list[str] = []
    for about in descriptions():
        value = getattr(settings, about.name)
        if about.name in at_least:
            value = max(value, at_least[about.name])
        if value != DEFAULTS.get(about.name, about.default):
            shown = f"{value:.12g}" if isinstance(value, float) else str(value)
            flags += [about.flag, shown]
    return flags


def command_line(parts: Sequence[str]) -> str:
    """One line for a shell to run."""
    return shlex.join(parts)

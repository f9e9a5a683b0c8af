"""Every setting: its default, where the number comes from, its names in the environment, and how a value is read.

Long because each setting stands here with its meaning and the reason for its default.

`Settings` below is the one documented place of each default; docs/settings.md is the same table for readers, and a test
keeps the two in step. A value is looked up in this order, and the first hit wins:

    argument of the call > command line > TENSORFERRY_<NAME> > an earlier deployment's name > TOML file > default

The TOML file is `tensorferry.toml` in the working directory, or the one that TENSORFERRY_CONFIG names (/dev/null for
none); its keys are the setting names, at the top level. Unknown names are errors that suggest the nearest known one.
Values may be written as numbers or as text everywhere: "4GiB", "512MB", "90s", "5min". No torch.
"""

from __future__ import annotations

import os
import stat
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any

from tensorferry.core import setting_values as values
from tensorferry.core.errors import ConfigError, UnknownOption

ENV_PREFIX = "TENSORFERRY_"
FILE_NAME = "tensorferry.toml"
CONFIG_VARIABLE = "TENSORFERRY_CONFIG"

MAX_FILE_BYTES = 1 << 20
"""A settings file with every setting has a few kilobytes."""

NOT_SETTINGS = {
    CONFIG_VARIABLE: f"path of the settings file, instead of {FILE_NAME} in the working directory: a "
    "regular file of at most 1 MiB, or /dev/null for none"
}
"""TENSORFERRY_* variables that are known and are not settings, with what they are for."""

# ---- the settings ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Description:
    """What the documentation, the command line's help and the loader know about one setting."""

    name: str
    default: Any
    unit: str
    meaning: str
    source: str
    """Where the default's number comes from."""
    read: Callable[[object], Any]
    aliases: tuple[str, ...]
    """Environment names that earlier deployments used."""

    @property
    def environment(self) -> str:
        return ENV_PREFIX + self.name.upper()

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")


def _setting(
    default: Any,
    read: Callable[[object], Any],
    meaning: str,
    *,
    source: str,
    unit: str = "",
    aliases: tuple[str, ...] = (),
) -> Any:
    about = {"unit": unit, "meaning": meaning, "source": source, "read": read, "aliases": aliases}
    return field(default=default, metadata=about)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All settings of one endpoint, read and checked. Raises ConfigError for a value that cannot be.

    `Settings(...)` and `dataclasses.replace` look at nothing but their arguments; `Settings.load` also looks at the
    command line, the environment and the TOML file, and says where each value came from.
    """

    transport: str = _setting(
        "auto",
        values.plain_name,
        "The transport that moves the bytes, by its name in the entry-point group `tensorferry.transports`. `auto`: "
        "every one that is ready here is opened, and each pair of endpoints takes the best that both have, then the "
        "next. A name is never replaced by another transport.",
        source="Two processes that know nothing of each other but an address find the best way between them.",
    )
    require: str = _setting(
        "",
        values.one_of("", "rdma"),
        "What the bytes must travel by. `rdma`: a transport that cannot prove that it goes over RDMA is not used, and "
        "where none can, opening the endpoint or meeting the peer fails. Empty: whatever is best.",
        source="Mooncake falls back to TCP without saying so; who pays for a fabric wants to know.",
    )
    directory: str = _setting(
        "",
        values.url,
        "The directory in which an embedding side is found by its name, such as `etcd://HOST:2379`. Empty: there are "
        "explicit addresses only.",
        source="An address that is known needs no service to find it.",
    )
    first_grant: int = _setting(
        8192,
        values.count(1),
        "Room that the language side gives a transfer before it knows the length. Rounded up to whole blocks and "
        "clamped to the pool.",
        unit="tokens",
        source="The earlier deployments' default.",
        aliases=("SGLANG_EMBEDDING_DEFAULT_ALLOCATE_BUFFER_SIZE",),
    )
    block_size: int = _setting(
        128,
        values.count(1),
        "Tokens in one block, the unit of allocation. Both sides must use the same.",
        unit="tokens",
        source="The earlier deployments' default: 0.9 MB a block at hidden size 3584 in bfloat16.",
        aliases=("SGLANG_MULTIMODAL_BLOCK_SIZE",),
    )
    pool_blocks: int = _setting(
        64,
        values.count(1, 1 << 16),
        "Blocks in the pool, which is registered with the transport once and never grows.",
        unit="blocks",
        source="The earlier deployments' default: 64 blocks of 128 tokens hold just one first grant.",
        aliases=("SGLANG_EMBEDDING_CACHE_BUFFER_SIZE",),
    )
    pool_device: str = _setting(
        "cpu",
        values.place,
        "Where the language side's pool lies: `cpu`, or `cuda` (`cuda:1`) for memory of a GPU, which takes an engine "
        "that writes there (docs/cuda.md).",
        source="Every transport can write to host memory.",
    )
    destination_device: str = _setting(
        "cpu",
        values.place,
        "Where the language side's results lie: `cpu`, `cuda` (the device that is current when the endpoint is made), "
        "`cuda:N`. Rows are copied there on a stream of their own, from a pool of either kind.",
        source="What a caller without a GPU expects.",
    )
    first_grant_mode: str = _setting(
        "optimistic",
        values.one_of("optimistic", "announced"),
        "`optimistic` lends blocks before the length is known, which saves a round trip; `announced` waits for the "
        "length and grants no more than it needs.",
        source="What the earlier deployments did.",
    )
    window: str | int = _setting(
        "auto",
        values.window,
        "When the next blocks are granted. `rounds`: when the last grant is wholly gathered, up to twice its size. "
        "`auto`: refilled as blocks come free, sized for the link. A number: the same with that many blocks.",
        unit="blocks",
        source="Refilling hides the pause between rounds; `tensorferry demo` uses `rounds`, to show them.",
    )
    destination_budget: int = _setting(
        4 << 30,
        values.byte_count,
        "Memory for results that are still arriving, the host's or a GPU's. A transfer reserves its share when its "
        "length is known and gives it back at its end; one that could never fit fails with `too_large`.",
        unit="bytes",
        source="Eleven transfers of 50,000 tokens at hidden size 3584 in bfloat16 (359 MB each).",
    )
    slabs: int = _setting(
        8,
        values.count(1, 512),
        "Pieces that the pool is registered in, at most one a block. A piece whose writes cannot be proved ended is "
        "replaced on its own while the others go on.",
        source="Replacing one then costs an eighth of the pool.",
    )
    staging_bytes: int = _setting(
        64 << 20,
        values.byte_count,
        "Registered memory through which the embedding side sends rows that the transport cannot read in place.",
        unit="bytes",
        source="One default pool at hidden size 3584 in bfloat16 (58.9 MB), rounded up.",
    )
    integrity: str = _setting(
        "auto",
        values.one_of("auto", "full", "sampled", "off"),
        "What is hashed of each block before its rows count as arrived. `auto`: `full`, and `sampled` where `send` is "
        "given rows in GPU memory.",
        source="xxh3 reads 29 GB/s on one core, well above a 100 Gb/s link; sampling costs a fifth of that.",
    )
    transfer_deadline: float = _setting(
        300.0,
        values.seconds,
        "Longest time from the start of a transfer to its end; then it fails with `deadline`.",
        unit="seconds",
        source="Chosen: a queue of large requests gets through, and a caller hears of a hang within minutes.",
    )
    announce_deadline: float = _setting(
        60.0,
        values.seconds,
        "Longest wait for the embedding side to say how long the result is; then the transfer fails with `deadline`.",
        unit="seconds",
        source="Chosen: a fifth of the transfer's deadline, for the encoder's own queue.",
    )
    heartbeat: float = _setting(
        1.0,
        values.seconds,
        "A side that has been silent this long shows that it lives.",
        unit="seconds",
        source="Chosen: ten chances to be heard within peer_timeout.",
    )
    peer_timeout: float = _setting(
        10.0,
        values.seconds,
        "A peer that has been silent this long counts as lost. Must be longer than heartbeat.",
        unit="seconds",
        source="Chosen: ten heartbeats. Liveness is shown by a thread of its own, so a busy event loop is not silent.",
    )
    quarantine_quota: float = _setting(
        2.0,
        values.positive,
        "Memory that a lost peer may still write to and that is held back for it, as a multiple of the pool; beyond "
        "it the peer is refused with `overloaded`.",
        unit="x pool",
        source="Chosen: a peer may be lost twice over before its memory is proved quiet.",
    )
    max_bumps: int = _setting(
        16,
        values.count(0),
        "Fresh starts (a lost write, a wrong digest, a restarted peer) that one transfer may make before it fails.",
        source="Chosen: seventeen tries in all; a transfer that needs more has a fault that trying does not mend.",
    )
    max_rooms: int = _setting(
        4096,
        values.count(1),
        "Live rooms on one endpoint; the next is refused with `overloaded`.",
        unit="rooms",
        source="Chosen: an order of magnitude above the requests that one serving process runs at once.",
    )
    on_exhausted: str = _setting(
        "wait",
        values.one_of("wait", "fail"),
        "Whether a transfer that finds no free block or no destination waits in line until its deadline, or fails at "
        "once with `pool_timeout`.",
        source="Waiting is safe: whoever holds a block gives it back without needing another.",
    )

    def __post_init__(self) -> None:
        for about in descriptions():
            object.__setattr__(self, about.name, _read(about, getattr(self, about.name)))
        _check_relations(self)

    @classmethod
    def load(
        cls,
        arguments: Mapping[str, object] | None = None,
        command_line: Mapping[str, object] | None = None,
        *,
        environ: Mapping[str, str] | None = None,
        file: str | os.PathLike[str] | None = None,
        defaults: Mapping[str, object] | None = None,
    ) -> Loaded:
        """Look every setting up and say where each came from. None as a value means "not given here".

        `environ` is os.environ by default; `file` replaces the search for the TOML file (os.devnull: no file);
        `defaults` are a command's own, in place of the ones above. Raises UnknownOption for an unknown name and
        ConfigError for a bad value; both name the place that it stands in.
        """
        environ = os.environ if environ is None else environ
        found: dict[str, tuple[object, Origin]] = {}
        _take(found, _from_mapping(arguments or {}, OriginKind.ARGUMENT, lambda about: about.name))
        _take(found, _from_mapping(command_line or {}, OriginKind.COMMAND_LINE, lambda about: about.flag))
        _take(found, _from_environment(environ))
        _take(found, _from_file(environ, file))
        _take(found, _from_mapping(defaults or {}, OriginKind.DEFAULT, lambda about: "of this command"))
        read = {about.name: _read(about, *found[about.name]) for about in descriptions() if about.name in found}
        origins = {
            about.name: found[about.name][1] if about.name in found else Origin(OriginKind.DEFAULT)
            for about in descriptions()
        }
        _check_relations({about.name: about.default for about in descriptions()} | read, origins)
        return Loaded(cls(**read), origins)

    def as_dict(self) -> dict[str, Any]:
        """Name to value, in the order of the documentation."""
        return {about.name: getattr(self, about.name) for about in descriptions()}


@cache
def descriptions() -> tuple[Description, ...]:
    """Every setting, in the order of the documentation."""
    return tuple(Description(name=f.name, default=f.default, **f.metadata) for f in fields(Settings))


@cache
def _by_name() -> dict[str, Description]:
    return {about.name: about for about in descriptions()}


class OriginKind(StrEnum):
    """The places that a value can come from, first in precedence first."""

    ARGUMENT = "argument"
    COMMAND_LINE = "command line"
    ENVIRONMENT = "environment"
    FILE = "file"
    DEFAULT = "default"


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value came from: `detail` is the argument, flag, variable, or file and key."""

    kind: OriginKind
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.detail}".strip()


@dataclass(frozen=True, slots=True)
class Loaded:
    """What `Settings.load` found: the settings, and each one's origin by name."""

    settings: Settings
    origins: dict[str, Origin]


# ---- the places ------------------------------------------------------------------------------------------------

_Found = dict[str, tuple[object, Origin]]


def _take(found: _Found, later: _Found) -> None:
    for name, value in later.items():
        found.setdefault(name, value)


def _from_mapping(given: Mapping[str, object], kind: OriginKind, detail: Callable[[Description], str]) -> _Found:
    found: _Found = {}
    for name, value in given.items():
        about = _by_name().get(name)
        if about is None:
            raise _unknown(name, Origin(kind), tuple(_by_name()))
        if value is not None:
            found[name] = (value, Origin(kind, detail(about)))
    return found


def _from_environment(environ: Mapping[str, str]) -> _Found:
    """TENSORFERRY_* and the aliases. A variable that is set to nothing counts as not set, as in most tools."""
    own = {about.environment: about for about in descriptions()}
    found: _Found = {}
    for variable in sorted(environ):
        if not variable.startswith(ENV_PREFIX) or variable in NOT_SETTINGS:
            continue
        about = own.get(variable)
        if about is None:
            raise _unknown(variable, Origin(OriginKind.ENVIRONMENT), (*own, *NOT_SETTINGS))
        if environ[variable].strip():
            found[about.name] = (environ[variable], Origin(OriginKind.ENVIRONMENT, variable))
    for about in descriptions():
        for alias in about.aliases:
            if environ.get(alias, "").strip():
                found.setdefault(about.name, (environ[alias], Origin(OriginKind.ENVIRONMENT, alias)))
    return found


def _from_file(environ: Mapping[str, str], file: str | os.PathLike[str] | None) -> _Found:
    named = os.fspath(file) if file is not None else environ.get(CONFIG_VARIABLE, "").strip()
    who = "the caller" if file is not None else CONFIG_VARIABLE
    try:
        path = Path(named or FILE_NAME).expanduser()
    except RuntimeError:  # ~somebody, and there is no such user
        raise ConfigError(f"{who} names {named}, and whose home that is in is not known") from None
    try:
        table = tomllib.loads(_content(path))
    except FileNotFoundError:
        if not named:
            return {}
        raise ConfigError(f"{who} names {path}, which does not exist") from None
    except (ValueError, RecursionError) as error:  # no TOML, no UTF-8, a number too long, brackets too deep
        raise ConfigError(f"{path} is not TOML: {error}", hint="Write `name = value`, one a line") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    found: _Found = {}
    for key, value in table.items():
        if key not in _by_name():
            raise _unknown(key, Origin(OriginKind.FILE, str(path)), tuple(_by_name()))
        found[key] = (value, Origin(OriginKind.FILE, f"{path}: {key}"))
    return found


def _content(path: Path) -> str:
    """The settings file's. Never waits: a FIFO has no end before somebody writes, and a device may have none at all.
    Raises OSError, UnicodeDecodeError, and ConfigError for what is no such file."""
    about = path.stat()
    if os.path.samestat(about, os.stat(os.devnull)):
        return ""
    if not stat.S_ISREG(about.st_mode):
        raise ConfigError(f"{path} is no regular file", hint=f"Name a TOML file, or {os.devnull} for none")
    with path.open("rb") as file:
        content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError(f"{path} has more than {MAX_FILE_BYTES} bytes: it cannot be a file of settings")
    return content.decode()


# ---- checks ----------------------------------------------------------------------------------------------------


def _read(about: Description, value: object, origin: Origin | None = None) -> Any:
    try:
        return about.read(value)
    except ValueError as error:
        where = f" (from {origin})" if origin else ""
        raise ConfigError(
            f"{about.name} {error}, not {value!r}{where}",
            hint=f"The default is {about.default if about.default != '' else 'empty'} {about.unit}".rstrip(),
        ) from None


def _check_relations(settings: Settings | Mapping[str, Any], origins: Mapping[str, Origin] | None = None) -> None:
    """What must hold between settings that are each fine on their own."""

    def value(name: str) -> Any:
        return settings[name] if isinstance(settings, Mapping) else getattr(settings, name)

    def told(name: str) -> str:
        return f"{name} ({value(name):g} s{f', from {origins[name]}' if origins else ''})"

    if value("peer_timeout") <= value("heartbeat"):
        raise ConfigError(
            f"{told('peer_timeout')} must be longer than {told('heartbeat')}",
            hint="A peer that shows life once a heartbeat would count as lost in between",
        )


def _unknown(name: str, where: Origin, known: tuple[str, ...]) -> UnknownOption:
    suggestion = values.did_you_mean(name, known)
    return UnknownOption(
        f"{name!r} ({where}) is not a setting{suggestion}",
        hint="`tensorferry config show` lists the settings",
    )

"""Flags that several commands share, and the flags of the settings, made from the settings themselves."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from typing import Any

from tensorferry.commands.output import BadFlag
from tensorferry.core.errors import ConfigError, UnknownOption
from tensorferry.core.settings import Description, Loaded, OriginKind, Settings, descriptions

_DEST = "setting_"


def common() -> argparse.ArgumentParser:
    """The parent of every command's parser."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("output")
    group.add_argument(
        "--format",
        choices=("terminal", "json"),
        default="terminal",
        help="text for people (default), or one JSON object on standard output",
    )
    group.add_argument("--debug", action="store_true", help="log to standard error, and show tracebacks")
    return parser


def add_settings(group: Any, names: Iterable[str], defaults: Mapping[str, object] | None = None) -> None:
    """Add the flag of each named setting to a parser or group. Values stay text: the settings read and judge them.

    `defaults` are the command's own, for the help; the same go to `load_settings`.
    """
    wanted = set(names)
    for about in descriptions():
        if about.name in wanted:
            default = (defaults or {}).get(about.name, about.default)
            group.add_argument(about.flag, dest=_DEST + about.name, metavar=_metavar(about), help=_help(about, default))


def setting_names() -> tuple[str, ...]:
    return tuple(about.name for about in descriptions())


def load_settings(args: argparse.Namespace, defaults: Mapping[str, object] | None = None) -> Loaded:
    """The settings as this command line, the environment and the file give them. A bad flag is a BadFlag."""
    given = {
        name.removeprefix(_DEST): value
        for name, value in vars(args).items()
        if name.startswith(_DEST) and value is not None
    }
    try:
        return Settings.load(command_line=given, defaults=defaults)
    except UnknownOption:
        raise
    except ConfigError as error:
        if f"from {OriginKind.COMMAND_LINE}" in error.cause:
            raise BadFlag(error.cause, hint=error.hint) from error
        raise


_METAVARS = {
    "transport": "NAME",
    "directory": "URL",
    "require": "rdma",
    "pool_device": "cpu|cuda|cuda:N",
    "destination_device": "cpu|cuda|cuda:N",
    "first_grant_mode": "optimistic|announced",
    "window": "rounds|auto|N",
    "integrity": "auto|full|sampled|off",
    "on_exhausted": "wait|fail",
}


def _metavar(about: Description) -> str:
    return _METAVARS.get(about.name, {"bytes": "BYTES", "seconds": "SECONDS"}.get(about.unit, "N"))


def _help(about: Description, default: object) -> str:
    first = about.meaning.replace("`", "").split(". ")[0].rstrip(".")
    shown = f"{default:g}" if isinstance(default, float) else str(default)
    return f"{first} (default {shown or 'empty'})".replace("%", "%%")

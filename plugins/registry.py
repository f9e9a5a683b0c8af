"""Which transports are installed, what each says about this machine, and how one is opened by name.

A transport is a class that a distribution names under the entry-point group `tensorferry.transports`.
Listing reads the installed metadata and imports no plugin; only the one that is asked for is ever
imported. stevedore does the loading, behind a subclass that keeps it from its cache (which can be stale
after an installation and forgets which distribution an entry came from) and from picking silently among
entries of the same name.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import inspect
import logging
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from tensorferry.core.carriers import close_all
from tensorferry.core.errors import (
    ConfigError,
    FerryError,
    TransportUnavailable,
    UnknownOption,
    UnknownTransport,
    VersionMismatch,
)
from tensorferry.core.selection import Verdict, preference
from tensorferry.core.transport import CONTRACT_VERSION, Options, Probe, Readiness, Transport

if TYPE_CHECKING:
    from stevedore.named import NamedExtensionManager

log = logging.getLogger("tensorferry.plugins")

GROUP = "tensorferry.transports"

AUTO = "auto"
"""In place of a name: all that `automatic` allows, to choose from for each peer."""

NEVER_AUTOMATIC = {"memory": "it joins endpoints of one process, which no deployment has"}
"""Only by name, with the reason."""

BUILT_IN = frozenset({"memory", "shm", "tcp"})
"""They need no engine; where no engine serves, these do."""


@dataclass(frozen=True, slots=True)
class Plugin:
    """One entry point: what some installed distribution says that it has. Nothing of it is imported."""

    name: str
    distribution: str
    version: str
    target: str
    """module:attribute"""

    def __str__(self) -> str:
        return f"{self.distribution} {self.version} ({self.target})"


@dataclass(frozen=True, slots=True)
class Ranked:
    """One transport in the order of preference, with the reason for its place."""

    name: str
    plugins: tuple[Plugin, ...]
    """One; several where distributions quarrel over the name."""
    probe: Probe
    automatic: bool
    """May be chosen without being named."""
    reason: str


def available() -> list[Plugin]:
    """Every installed transport by name, and two of a name where two distributions claim it. Imports none."""
    return sorted({_plugin(entry) for entry in _entry_points()}, key=lambda p: (p.name, p.distribution, p.target))


def load(name: str) -> type[Transport]:
    """The transport's class.

    Raises UnknownTransport where nobody provides the name, ConfigError where two distributions do,
    TransportUnavailable (with the exception as its cause) where it cannot be imported or is no transport, and
    VersionMismatch where it was written for another version of the contract.
    """
    plugin = _only(name)
    failures: list[BaseException] = []
    found: list[Any] = []
    try:
        found = _manager(name, failures).extensions
    except (Exception, SystemExit) as error:  # noqa: BLE001 - foreign code: an import must not end the process
        failures.append(error)
    if failures:
        failure = failures[0]
        missing = failure.name if isinstance(failure, ModuleNotFoundError) else None
        raise TransportUnavailable(
            f"{plugin} cannot be imported: {type(failure).__name__}: {failure}",
            hint=f"Install what provides the module {missing!r}" if missing else "",
            transport=name,
        ) from failure
    return _checked(name, plugin, found[0].plugin)


def probe(name: str) -> Probe:
    """What the transport says about this machine. Never raises: whatever goes wrong is the answer."""
    try:
        answer: object = load(name).probe()
    except FerryError as error:
        # What is missing can be installed; all else that keeps it from loading is a defect of the plugin.
        absent = isinstance(error, UnknownTransport) or isinstance(error.__cause__, ImportError)
        return Probe(Readiness.UNAVAILABLE if absent else Readiness.BROKEN, error.cause, error.hint)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - foreign code, and the answer says what it raised
        return Probe(Readiness.BROKEN, f"its probe raised {type(error).__name__}: {error}")
    if not isinstance(answer, Probe):
        return Probe(Readiness.BROKEN, f"its probe answered with a {type(answer).__name__}")
    return answer


def open_transport(name: str, options: Mapping[str, object] | None = None) -> Transport:
    """Open a transport with options by name. Values may be strings, as from an environment variable.

    Raises UnknownOption, ConfigError for a value that an option cannot have, and whatever `load` raises
    or the transport raises when it is opened.
    """
    cls = load(name)
    given = dict(options or {})
    known = {field.encode_name: field for field in msgspec.structs.fields(cls.options_type)}
    for key in given:
        if key not in known:
            raise UnknownOption(
                f"transport {name} has no option {key!r}",
                hint=_did_you_mean(key, known) + f"It has {_described(cls.options_type)}",
                transport=name,
            )
    try:
        typed = msgspec.convert(given, cls.options_type, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(
            f"an option of transport {name} has a value that it cannot have: {error}",
            hint=f"It has {_described(cls.options_type)}",
            transport=name,
        ) from error
    try:
        return cls(typed)
    except FerryError:
        raise
    except (Exception, SystemExit) as error:  # an engine's import must not end the process either
        raise TransportUnavailable(
            f"transport {name} failed to open: {type(error).__name__}: {error}", transport=name
        ) from error


def open_automatic(options: Mapping[str, object] | None = None) -> tuple[list[Transport], list[Verdict]]:
    """Every transport that may be chosen without being named, open, best first; and those that were passed over, each
    with the reason (but for those that no two processes share). One that goes another way, open, than its probe
    promised, and a worse one, is closed again: it was taken for the way, and an engine that falls back by itself opens
    ports for it that nobody asked for.

    Raises ConfigError for options, which belong to one transport by name, and TransportUnavailable, with every
    transport's reason, where none can be opened.
    """
    if options:
        raise ConfigError(
            f"options ({', '.join(options)}) belong to one transport", hint="Name the transport that they are for"
        )
    opened: list[Transport] = []
    passed_over: list[Verdict] = []
    for entry in ranked():
        name, answer = entry.name, entry.probe
        if entry.automatic:
            try:
                one = open_transport(name)
            except FerryError as error:
                passed_over.append(Verdict(name, answer.path, False, error.cause))
                log.warning("transport %s is not used: %s", name, error)
                continue
            if answer.path and _is_worse(path := one.path(), answer.path):
                close_all([one])
                why = f"its probe found {answer.path} ({answer.reason}), and open it goes over {path}"
                passed_over.append(Verdict(name, path, False, why))
                log.warning("transport %s is not used: %s. `tensorferry doctor %s` says more", name, why, name)
            else:
                opened.append(one)
        elif not answer.usable:
            passed_over.append(Verdict(name, answer.path, False, entry.reason))
        elif name not in NEVER_AUTOMATIC:
            passed_over.append(Verdict(name, answer.path, False, f"taken only when it is named: {answer.reason}"))
    if not opened:
        told = "; ".join(f"{v.name}: {v.reason}" for v in passed_over)
        raise TransportUnavailable(
            f"no transport can be used here. {told or 'None is installed'}",
            hint="`tensorferry transports --why` says what would help",
        )
    return opened, passed_over


def _is_worse(path: str, promised: str) -> bool:
    return preference("", path)[0] > preference("", promised)[0]


def ranked(prober: Callable[[str], Probe] = probe) -> list[Ranked]:
    """All installed transports, best first, as this side sees them; the next usable one is the fallback.

    `prober` answers for one name: give one that asks in a child process where an engine must not be
    loaded here.
    """
    by_name: dict[str, list[Plugin]] = {}
    for plugin in available():
        by_name.setdefault(plugin.name, []).append(plugin)
    answers = {name: prober(name) for name in by_name}
    serve = [
        name
        for name, answer in answers.items()
        if answer.usable and name not in NEVER_AUTOMATIC and (answer.readiness is Readiness.READY or name in BUILT_IN)
    ]

    def only_by_name(name: str) -> str:
        """Why a usable transport is not chosen by itself; empty if it may be."""
        if serve and name not in serve and name not in NEVER_AUTOMATIC:
            return f"it works less well than it could ({answers[name].reason}), and others serve"
        return NEVER_AUTOMATIC.get(name, "")

    def place(name: str) -> tuple[bool, bool, tuple[int, int, str]]:
        answer = answers[name]
        return not answer.usable, bool(only_by_name(name)), preference(name, answer.path)

    result: list[Ranked] = []
    for name in sorted(by_name, key=place):
        answer = answers[name]
        automatic = answer.usable and not only_by_name(name)
        before = [other.name for other in result if other.automatic]
        if not answer.usable:
            reason = f"{answer.readiness}: {answer.reason}"
        elif not automatic:
            reason = f"only when it is named: {only_by_name(name)}"
        elif before:
            reason = f"follows {before[-1]}: {answer.reason}"
        else:
            reason = f"first choice: {answer.reason}"
        result.append(Ranked(name, tuple(by_name[name]), answer, automatic, reason))
    return result


# ---- reading the installed metadata ----------------------------------------------------------------------


def _entry_points() -> list[importlib.metadata.EntryPoint]:
    """Straight from the metadata, sorted, so that entries of one name stand side by side and the order is the
    same everywhere."""
    return sorted(importlib.metadata.entry_points(group=GROUP), key=lambda entry: (entry.name, entry.value))


def _plugin(entry: importlib.metadata.EntryPoint) -> Plugin:
    distribution = entry.dist
    name, version = (distribution.name, distribution.version) if distribution is not None else (None, None)
    return Plugin(entry.name, name or "an unnamed distribution", version or "of unknown version", entry.value)


def _only(name: str) -> Plugin:
    installed = available()
    claims = [plugin for plugin in installed if plugin.name == name]
    if not claims:
        names = sorted({plugin.name for plugin in installed})
        raise UnknownTransport(
            f"no installed distribution provides a transport {name!r}",
            hint=f"{_did_you_mean(name, names)}Installed: {', '.join(names) or 'none'}",
            transport=name,
        )
    if len(claims) > 1:
        raise ConfigError(
            f"transport {name!r} is provided more than once: by {' and by '.join(map(str, claims))}",
            hint="Uninstall all but one of these distributions",
            transport=name,
        )
    return claims[0]


def _manager(name: str, failures: list[BaseException]) -> NamedExtensionManager[Any]:
    """stevedore's manager for one name; what loading raises goes to `failures`."""
    from stevedore.named import NamedExtensionManager  # 10 ms that only those who load a plugin pay

    class Manager(NamedExtensionManager[Any]):
        def list_entry_points(self) -> list[importlib.metadata.EntryPoint]:
            # Not through stevedore's cache. `_only` has seen to it that one entry of the name remains, or
            # several that are equal to each other.
            return [entry for entry in _entry_points() if entry.name == name][:1]

    return Manager(
        namespace=GROUP,
        names=[name],
        on_load_failure_callback=lambda _manager, _entry, error: failures.append(error),
        on_missing_entrypoints_callback=None,
    )


def _checked(name: str, plugin: Plugin, found: object) -> type[Transport]:
    if not (isinstance(found, type) and issubclass(found, Transport)):
        raise TransportUnavailable(f"{plugin} is not a Transport", transport=name)
    stated = any("contract_version" in vars(base) for base in found.__mro__ if base is not Transport)
    if not stated and plugin.distribution != "tensorferry":
        raise VersionMismatch(
            f"{plugin} does not say which version of the transport contract it is written for",
            hint=f"Its class should set contract_version = {CONTRACT_VERSION}",
            transport=name,
        )
    if found.contract_version != CONTRACT_VERSION:
        raise VersionMismatch(
            f"{plugin} is written for version {found.contract_version} of the transport contract; "
            f"this tensorferry has version {CONTRACT_VERSION}",
            hint="Install versions of the two that fit each other",
            transport=name,
        )
    if inspect.isabstract(found):
        lacking = ", ".join(sorted(found.__abstractmethods__))
        raise TransportUnavailable(f"{plugin} lacks {lacking}", transport=name)
    if getattr(found, "name", None) != name:
        raise TransportUnavailable(
            f"{plugin} calls itself {getattr(found, 'name', None)!r}, not {name!r}", transport=name
        )
    return found


def _did_you_mean(wrong: str, names: typing.Iterable[str]) -> str:
    close = difflib.get_close_matches(wrong, list(names), n=1)
    return f"Did you mean {close[0]!r}? " if close else ""


def _described(options: type[Options]) -> str:
    """The options of a transport, each with its default and its documented meaning."""
    hints = typing.get_type_hints(options, include_extras=True)
    lines: list[str] = []
    for field in msgspec.structs.fields(options):
        notes = [note for note in getattr(hints[field.name], "__metadata__", ()) if isinstance(note, msgspec.Meta)]
        meaning = next((note.description for note in notes if note.description), "")
        lines.append(f"{field.encode_name} (default {field.default!r}{': ' + meaning if meaning else ''})")
    return "; ".join(lines) or "no options"
